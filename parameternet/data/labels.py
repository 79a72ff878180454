"""Label images by class folder, number the classes, and describe how the data changed."""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from parameternet.data.errors import DataError
from parameternet.data.images import is_image_name
from parameternet.text import printable

TRAIN_SPLITS = ("train", "training")
EVAL_SPLITS = ("val", "valid", "validation", "eval", "evaluation")
SPLITS = frozenset({*TRAIN_SPLITS, *EVAL_SPLITS, "test", "testing"})
# Folders that operating systems and programs create; names with a leading dot are hidden too.
_SYSTEM = frozenset({"__MACOSX", "__pycache__", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found"})


def is_hidden(name: str) -> bool:
    """Return whether a file or folder of this name is not part of the user's data."""
    return name.startswith(".") or name in _SYSTEM


def natural_key(name: str) -> tuple[list[str | int], str]:
    """Sort `a9` before `a10` and ignore case, like timm, but with a fixed order for names that differ only by case."""
    parts = re.split(r"(\d+)", name.lower())
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], name


def class_order(names: Iterable[str]) -> list[str]:
    """Return class names in the order of their labels."""
    return sorted(set(names), key=natural_key)


def few(names: Sequence[str], limit: int = 5) -> str:
    """Format names as `a, b, c and 7 more`, or `none`."""
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f"{', '.join(map(printable, names[:limit])) or 'none'}{rest}"


# ---------------------------------------------------------------------------------------------------------------------
# From file names to labels
# ---------------------------------------------------------------------------------------------------------------------


class Listing(NamedTuple):
    """Labelled images by name. `class_to_idx` has the classes in the order of their labels.

    `outside` has images outside of class folders; `notes` describe skipped files.
    """

    class_to_idx: dict[str, int]
    samples: list[tuple[str, int]]
    outside: list[str]
    notes: list[str]


def arrange(
    names: Sequence[str],
    folders: Sequence[str] = (),
    hidden: Sequence[str] = (),
    *,
    own_name: str = "",
    class_map: Mapping[str, int] | None = None,
    is_image: Callable[[str], bool] = is_image_name,
) -> Listing:
    """Label images by their top-level folder.

    Args:
        names: files relative to the root, with slashes, without hidden ones.
        folders: the same for folders; needed to find classes without images.
        hidden: hidden files and folders, for the notes.
        own_name: the name of the root. A single folder with this name, or that of a split, that contains all class
            folders is skipped: `train.tar` may contain `train/cat/1.jpg`.
        class_map: labels by class; images of other classes are left out.
        is_image: returns whether a file name is that of an image.

    Raises:
        DataError: a class name that is not UTF-8, or a class map with gaps.
    """
    images = [name for name in names if is_image(name)]
    prefix = _wrapper(images, own_name)
    inside = [name for name in images if "/" in name[len(prefix) :]]
    class_of = {name: name[len(prefix) :].split("/", 1)[0] for name in inside}
    found = class_order(class_of.values())
    _check_names(found)
    table = {name: label for label, name in enumerate(found)} if class_map is None else _checked(class_map)
    samples = [(name, table[class_of[name]]) for name in inside if class_of[name] in table]
    samples.sort(key=lambda sample: natural_key(sample[0]))
    outside = sorted((name for name in images if name not in class_of), key=natural_key)
    tops = class_order(top for path in folders if (top := _top(path, prefix)))
    notes = [
        prefix and f"the classes are the folders in {printable(prefix)}",
        _note("hidden files and folders skipped", hidden),
        _note("images outside the class folders skipped", outside),
        _note("files without an image's extension ignored", sorted(set(names) - set(images), key=natural_key)),
        _note("class folders without images left out", [top for top in tops if top not in set(found)]),
        _note("classes missing from class_map left out", [name for name in found if name not in table]),
        class_map and _note("classes of class_map without images", [c for c in table if c not in set(found)]),
    ]
    return Listing(table, samples, outside, [note for note in notes if note])


def _wrapper(images: Sequence[str], own_name: str) -> str:
    """Return the prefix (`train/`, or empty) that contains the class folders."""
    prefix = ""
    while True:
        below = [name[len(prefix) :].split("/") for name in images]
        tops = {parts[0] for parts in below}
        if len(tops) != 1 or any(len(parts) < 3 for parts in below) or len({parts[1] for parts in below}) < 2:
            return prefix
        top = tops.pop()
        if top.lower() not in SPLITS and top != own_name:
            return prefix
        prefix += f"{top}/"


def _top(folder: str, prefix: str) -> str | None:
    return folder[len(prefix) :].split("/", 1)[0] if folder.startswith(prefix) else None


def _check_names(classes: Sequence[str]) -> None:
    odd = [name for name in classes if any("\ud800" <= c <= "\udfff" for c in name)]
    if odd:
        raise DataError(f"class folders must have names in UTF-8, got {few(odd)}: rename them")


def _checked(class_map: Mapping[str, int]) -> dict[str, int]:
    table = {name: label for name, label in class_map.items() if name != ""}  # a blank line is not a class
    if sorted(table.values()) != list(range(len(table))):
        raise DataError(
            f"class_map must number its {len(table)} classes from 0 to {len(table) - 1}: remove repeated or blank lines"
        )
    return dict(sorted(table.items(), key=lambda item: item[1]))


def _note(what: str, names: Sequence[str]) -> str:
    return f"{what} ({len(names)}): {few(names)}" if names else ""


# ---------------------------------------------------------------------------------------------------------------------
# Changes in the data
# ---------------------------------------------------------------------------------------------------------------------


def digest(samples: Iterable[tuple[str, int]], classes: Sequence[str] | None) -> dict[str, Any]:
    """Return a digest of image names and labels, in order, as plain data for a checkpoint.

    Returns:
        `sha256` of all, and `classes`: {name: [images, sha256 of their names]}.
    """
    whole, members = hashlib.sha256(), defaultdict(list)
    for name, label in samples:
        line = name.encode("utf-8", "surrogateescape") + b"\0"
        whole.update(line + str(label).encode() + b"\0")
        members[classes[label] if classes else str(label)].append(line)
    return {
        "sha256": whole.hexdigest(),
        "classes": {
            name: [len(lines), hashlib.sha256(b"".join(sorted(lines))).hexdigest()[:16]]
            for name, lines in members.items()
        },
    }


def difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    """Describe the difference between two digests by class; empty if they are equal."""
    if old["sha256"] == new["sha256"]:
        return ""
    before, after = old["classes"], new["classes"]
    found = []
    for name in class_order([*before, *after]):
        (was, was_names), (now, now_names) = before.get(name, [0, ""]), after.get(name, [0, ""])
        if was != now:
            found.append(f"{printable(name)} has {now} images instead of {was}")
        elif was_names != now_names:
            found.append(f"{printable(name)} has other images")
    return few(found) if found else "the images have different labels or a different order"
