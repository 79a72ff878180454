"""Untrusted text: escape it for terminals, and remove local paths from what is published."""

import json
import re
import unicodedata
from typing import Any

__all__ = ["escape_json", "printable", "printable_lines", "without_local_paths"]

_JOINERS = "\u200c\u200d"  # letters of Persian and of Indic scripts need them, and emoji too


def printable(text: str) -> str:
    """Escape whatever is no visible character, so that a name cannot move the cursor or forge a line.

    >>> printable("cat" + chr(27) + "[2K")
    'cat\\\\x1b[2K'
    """
    text = text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")  # names that are no UTF-8
    return "".join(c if _is_visible(c) else c.encode("unicode_escape").decode() for c in text)


def printable_lines(text: str) -> str:
    """Escape like `printable`, but keep line breaks: for text of ours with names from elsewhere in it."""
    return "\n".join(map(printable, text.split("\n")))


def escape_json(text: str) -> str:
    """Escape JSON text like `printable_lines`, in JSON's own way, so that a parser reads the same values."""
    return "".join(c if c == "\n" or _is_visible(c) else json.dumps(c)[1:-1] for c in text)


def _is_visible(c: str) -> bool:
    return c.isprintable() or c in _JOINERS or unicodedata.category(c) == "Zs"


# What timm's data sets and this package put in front of a path.
_PREFIX = re.compile(r"(?:(?:hfds|hfids|tfds|torch|wds)/|local-dir:|file:(?://)?)(?=[/\\~]|\.\.[\\/]|[A-Za-z]:[\\/])")
_ABSOLUTE = re.compile(r"(?:~[\w.-]*[\\/]|[A-Za-z]:[\\/]|[\\/]|\.\.[\\/])")
# Within other text: after a space or one of the signs that end a word, and not the // of an address.
_WITHIN = re.compile(r"(?<![^\s='\"(\[{,;:|])(?:~[\w.-]*|\.\.|[A-Za-z]:)?[\\/](?![\\/])[^\s'\")\]},;|:]+")


def without_local_paths(value: Any) -> Any:
    """Reduce every path outside the working directory in text, or in lists and dictionaries of it, to its last part.

    Published files must not reveal local paths (users, customers, disks).

    >>> without_local_paths({"train": "wds//home/me/shards:train-{0..9}.tar"})
    {'train': 'wds/shards:train-{0..9}.tar'}
    """
    if isinstance(value, dict):
        return {key: without_local_paths(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(without_local_paths, value))
    if not isinstance(value, str):
        return value
    found = _PREFIX.match(value)
    head = re.sub("^file:.*", "", found.group()) if found else ""
    rest = value[found.end() :] if found else value
    if _ABSOLUTE.match(rest):
        return head + _last_part(rest)
    return head + _WITHIN.sub(lambda path: _last_part(path.group()), rest)


def _last_part(path: str) -> str:
    return re.split(r"[\\/]", path.rstrip("\\/"))[-1] or "."
