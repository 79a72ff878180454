"""Old names that keep working for one release, with a `DeprecationWarning` that says the new one."""

import importlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["moved"]


def moved(module: str, names: Mapping[str, str]) -> Callable[[str], Any]:
    """A `__getattr__` for a module whose names moved.

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
