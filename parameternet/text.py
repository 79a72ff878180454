"""Escape untrusted text for terminals, and remove local paths from published text."""

import json
import re
import unicodedata
from typing import Any

__all__ = ["address_error", "escape_json", "printable", "printable_lines", "without_local_paths"]

_JOINERS = "\u200c\u200d"  # needed by Persian and Indic scripts and by emoji


def printable(text: str) -> str:
    """Escape non-printable characters, so that a name cannot move the cursor or forge a line.

    >>> printable("cat" + chr(27) + "[2K")
    'cat\\\\x1b[2K'
    """
    text = text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")  # names that are not UTF-8
    return "".join(c if _is_visible(c) else c.encode("unicode_escape").decode() for c in text)


def printable_lines(text: str) -> str:
    """Escape like `printable`, but keep line breaks: for our own text with untrusted names in it."""
    return "\n".join(map(printable, text.split("\n")))


def escape_json(text: str) -> str:
    """Escape JSON text like `printable_lines`, in JSON's own way, so that a parser reads the same values."""
    return "".join(c if c == "\n" or _is_visible(c) else json.dumps(c)[1:-1] for c in text)


def _is_visible(c: str) -> bool:
    return c.isprintable() or c in _JOINERS or unicodedata.category(c) == "Zs"


def address_error(text: str) -> str | None:
    """Return an error message if `text` is a URL such as https://..., which is not supported; None for other text.

    >>> address_error("https://example.org/a.tar")
    'https://example.org/a.tar is a URL, and URLs are not supported: download it and give the path'
    """
    if not re.match(r"(?!local-dir:)[A-Za-z][A-Za-z0-9+.-]+://?[^/]", text):  # pathlib turns // into /
        return None
    return f"{printable(text)} is a URL, and URLs are not supported: download it and give the path"


# Prefixes of paths in timm and in this package.
_PREFIX = re.compile(r"(?:(?:hfds|hfids|tfds|torch|wds)/|local-dir:|file:(?://)?)(?=[/\\~]|\.\.[\\/]|[A-Za-z]:[\\/])")
_ABSOLUTE = re.compile(r"(?:~[\w.-]*[\\/]|[A-Za-z]:[\\/]|[\\/]|\.\.[\\/])")
# Within other text: after a space or punctuation, but not the // of a URL.
_WITHIN = re.compile(r"(?<![^\s='\"(\[{,;:|])(?:~[\w.-]*|\.\.|[A-Za-z]:)?[\\/](?![\\/])[^\s'\")\]},;|:]+")


def without_local_paths(value: Any) -> Any:
    """Shorten every path outside the working directory to its last part, in text, lists and dictionaries.

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
