"""Fields of a recipe: their documentation, types and allowed values."""

from __future__ import annotations

import math
import re
import types
import typing
from collections.abc import Callable
from dataclasses import field
from typing import Any, NamedTuple

from parameternet.training.errors import RecipeError


class Rule(NamedTuple):
    """Allowed values of a field, or of each item of a list: a description for messages, and the check."""

    words: str
    holds: Callable[[Any], bool]


def number(low: float, high: float = math.inf, *, low_open: bool = False, high_open: bool = False) -> Rule:
    """Allow numbers from `low` to `high`; open ends are excluded."""
    if low_open or high_open or high == math.inf:
        start = f"above {low:g}" if low_open else f"at least {low:g}"
        words = start if high == math.inf else f"{start} and {'below' if high_open else 'at most'} {high:g}"
    else:
        words = f"from {low:g} to {high:g}"

    def holds(value: Any) -> bool:
        return (low < value if low_open else low <= value) and (value < high if high_open else value <= high)

    return Rule(words, holds)


def one_of(*choices: str | None) -> Rule:
    """Allow only these values."""
    return Rule(f"one of {', '.join(map(str, choices))}", lambda value: value in choices)


def matching(pattern: str, words: str) -> Rule:
    """Allow text that fully matches `pattern`."""
    return Rule(words, lambda value: re.fullmatch(pattern, value) is not None)


def is_plain(value: Any) -> bool:
    """Return whether both a checkpoint and YAML can store `value`."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and is_plain(item) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(is_plain, value))
    return value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value))


FRACTION = number(0, 1)
FRACTION_BELOW_1 = number(0, 1, high_open=True)
# Beta(a, a) returns NaN for a smaller `a`.
MIXING = Rule("0, or from 0.001 to 100", lambda value: value == 0 or 0.001 <= value <= 100)
COUNT = number(1)
SIZE = number(1, 8192)
POSITIVE = number(0, low_open=True)
NOT_NEGATIVE = number(0)
TEXT = Rule("non-empty printable text", lambda value: value.isprintable() and bool(value.strip()))
PLAIN = Rule("a dictionary of text, finite numbers, true, false, null, lists and dictionaries", is_plain)
SOURCE = Rule(f"{TEXT.words}, or {PLAIN.words}", lambda value: (PLAIN if isinstance(value, dict) else TEXT)[1](value))
NUMBER = r"\d+(\.\d+)?"
POLICY = matching(
    rf"rand(-(m\d+|n\d+|p{NUMBER}|mstd{NUMBER}|mmax\d+|inc[01]|t(weights|3aw|3a)))*"
    rf"|augmix(-(m\d+|w\d+|d\d+|b[01]|a{NUMBER}|mstd{NUMBER}))*|(original|originalr|v0|v0r|3a)(-mstd{NUMBER})?",
    "a timm policy, e.g. rand-m7-mstd0.5-inc1, augmix-m5 or original",
)


def setting(default: Any, doc: str, rule: Rule | None = None, *, free: bool = False, length: int | None = None) -> Any:
    """Define a recipe field with its documentation.

    Args:
        rule: allowed values besides null; for a list, of each item.
        free: may change when a run resumes, because the result does not depend on the field.
        length: number of items, for a list.
    """
    metadata = {"doc": doc, "free": free, "rule": rule, "length": length}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def typed(name: str, value: Any, kind: Any) -> Any:
    """Convert a field's value to its type `kind`.

    Raises:
        RecipeError: it has another type; the message names the field, the expected type and the value.
    """
    for option in _options(kind):
        fits, converted = _fit(value, option)
        if fits:
            return converted
    wanted = " or ".join(_type_name(option) for option in _options(kind))
    raise RecipeError(f"{name} must be {wanted}, got {value!r} ({type(value).__name__})")


def _options(kind: Any) -> tuple:
    return typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)


def _type_name(kind: Any) -> str:
    if kind is type(None):
        return "null"
    inner = typing.get_args(kind)
    return f"a list of {inner[0].__name__}" if inner else kind.__name__


def _fit(value: Any, kind: Any) -> tuple[bool, Any]:
    if kind is float:
        return _fit_float(value)
    if typing.get_origin(kind) is list:
        return _fit_list(value, typing.get_args(kind)[0])
    # bool is a subclass of int, but `epochs: true` is a mistake.
    return isinstance(value, kind) and not (kind is int and isinstance(value, bool)), value


def _fit_list(value: Any, kind: Any) -> tuple[bool, Any]:
    if not isinstance(value, (list, tuple)):
        return False, value
    fits = [_fit(item, kind) for item in value]
    return all(fit for fit, _ in fits), [item for _, item in fits]


def _fit_float(value: Any) -> tuple[bool, Any]:
    # YAML 1.1 reads 1e-3 (without a decimal point) as text.
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return False, value
    try:
        return True, float(value)
    except (ValueError, OverflowError):
        return False, value


def check_rule(name: str, value: Any, rule: Rule | None, length: int | None) -> None:
    """Check `value`, or each item of a list, against the field's rule.

    Raises:
        RecipeError: it breaks the rule; the message names the field, the allowed values and the value.
    """
    items = value if isinstance(value, list) else [value]
    if length is not None and len(items) != length:
        raise RecipeError(f"{name} must have {length} numbers, got {value!r}")
    for item in items:
        if item is None:
            continue
        if isinstance(item, float) and not math.isfinite(item):
            raise RecipeError(f"{name} must be a finite number, got {value!r}")
        if rule and not rule.holds(item):
            raise RecipeError(f"{name} must be {rule.words}, got {value!r}")
