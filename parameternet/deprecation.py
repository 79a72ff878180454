"""Old names that keep working for one release, with a `DeprecationWarning` that gives the new one."""

import functools
import importlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["moved", "renamed", "renamed_arguments"]


def moved(module: str, names: Mapping[str, str]) -> Callable[[str], Any]:
    """Return a `__getattr__` for a module whose names have moved.

    Args:
        module: The module's `__name__`.
        names: Old name -> new place, `package.module:name`.

    >>> __getattr__ = moved(__name__, {"draw": "parameternet.routing.plot:draw"})  # doctest: +SKIP
    """

    def __getattr__(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        place, _, attribute = names[name].partition(":")
        new = f"{place}.{attribute}"
        warnings.warn(f"{module}.{name} is deprecated, use {new}", DeprecationWarning, stacklevel=2)
        return getattr(importlib.import_module(place), attribute)

    return __getattr__


def renamed(old: str, new: str) -> property:
    """Return a read-only property that warns and returns the attribute `new`."""

    def get(self: Any) -> Any:
        warnings.warn(f"{type(self).__name__}.{old} is deprecated, use {new}", DeprecationWarning, stacklevel=2)
        return getattr(self, new)

    return property(get, doc=f"Deprecated, use `{new}`.")


def renamed_arguments(**names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Let a function accept its old keyword arguments, with a warning: `@renamed_arguments(old="new")`."""

    def decorate(function: Callable[..., Any]) -> Any:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            for old in names.keys() & kwargs.keys():
                new = names[old]
                if new in kwargs:
                    raise TypeError(f"got both {new} and its former name {old}: give {new} alone")
                warnings.warn(f"the argument {old} is deprecated, use {new}", DeprecationWarning, stacklevel=2)
                kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        call.former_arguments = names  # type: ignore[attr-defined]
        return call

    return decorate
