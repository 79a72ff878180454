# SPDX-License-Identifier: AGPL-3.0-or-later
"""Build YAMLs by name: `yolo11x-seg-dynamicconv.yaml` is the installed `yolo11-seg.yaml` with rows replaced.

Nothing of Ultralytics is copied, so networks follow its releases. The rules are files in configs/yolo.
"""

import atexit
import os
import re
import stat
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import timm
import yaml

from parameternet import files, weights

__all__ = ["find", "rules", "variant"]

FAMILIES = r"(?:yolov8|yolov9|yolov10|yolo11|yolo12|yolo26)"
TASKS = r"(?:-(?:seg|pose|obb|cls))?"
# Rows at the end of a backbone that are kept after a timm network.
TAIL = ("SPPF", "C2PSA", "C2fPSA", "PSA")


@lru_cache
def rules() -> dict[str, dict[str, Any]]:
    """Return suffix of a YAML's name -> rule: `{"replace": {stock: ours}, "keep": rows}`."""
    folder = weights.shipped("configs") / "yolo"
    return {path.stem: yaml.safe_load(path.read_text("utf-8")) for path in sorted(folder.glob("*.yaml"))}


def find(file: str, stock: Callable[[str], Any]) -> str | None:
    """Return the file of a YAML that this package generates, or None.

    Args:
        file: The name that Ultralytics looks for; only names without folder and scale that do not exist as files are
        ours. stock: Finds a stock YAML by name, like Ultralytics.
    """
    name = re.fullmatch(rf"({FAMILIES})([nslmx]?)({TASKS})-(.+)\.yaml", file)
    if not name or Path(file).exists():
        return None
    family, scale, task, suffix = name.groups()
    known = suffix in rules() or timm.is_model(suffix)
    if not known or scale:
        return None  # Ultralytics removes the scale and asks again
    path = stock(f"{family}{task}.yaml")
    if not path:
        return None
    made = variant(yaml.safe_load(Path(path).read_text("utf-8", errors="ignore")), suffix)
    target = _folder() / file
    files.write_text(target, yaml.safe_dump(made, sort_keys=False, default_flow_style=None))
    return str(target)


def _folder() -> Path:
    """Return this user's private folder for YAMLs; checkpoints refer to the files in it."""
    user = os.getuid() if hasattr(os, "getuid") else None  # Windows has a temporary folder per user
    folder = Path(tempfile.gettempdir()) / ("parameternet-yolo" if user is None else f"parameternet-yolo-{user}")
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    private = user is None or (found.st_uid == user and not found.st_mode & 0o022)
    return folder if stat.S_ISDIR(found.st_mode) and private else folder_of_this_process()


@lru_cache(maxsize=1)
def folder_of_this_process() -> Path:
    # Another user created it and could replace our networks.
    folder = tempfile.TemporaryDirectory(prefix="parameternet-yolo-")
    atexit.register(folder.cleanup)
    return Path(folder.name)


def variant(stock: dict[str, Any], suffix: str) -> dict[str, Any]:
    """Return a stock network's dictionary with rows replaced by a rule, or with a timm network as its backbone."""
    rule = rules().get(suffix)
    return _replaced(stock, rule) if rule else _with_backbone(stock, suffix)


def _replaced(stock: dict[str, Any], rule: dict[str, Any]) -> dict[str, Any]:
    kept = rule.get("keep", [])
    out, index = {**stock}, 0
    for part in ("backbone", "head"):
        rows = []
        for row in stock[part]:
            ours = rule["replace"].get(row[2]) if index not in kept else None
            rows.append([row[0], row[1], ours or row[2], list(row[3])])
            index += 1
        out[part] = rows
    return out


def _with_backbone(stock: dict[str, Any], name: str) -> dict[str, Any]:
    old = stock["backbone"]
    tail = [row for row in old if row[2] in TAIL]
    used = sorted({i for row in stock["head"] for i in _sources(row) if 0 <= i < len(old)} | {len(old) - 1})
    # A head reads the features with strides 8 and 16, and the last row, with stride 32, whatever comes after it.
    strides = [8, 16, 32][-len(used) :]
    rows = [[-1, 1, "TimmBackbone", [name]]]
    rows += [[0, 1, "TimmStage", [stride]] for stride in strides]
    places = {index: 1 + position for position, index in enumerate(used)}
    rows += [[-1, row[1], row[2], list(row[3])] for row in tail]
    places[len(old) - 1] = len(rows) - 1
    shift = len(rows) - len(old)

    def moved(i: int) -> int:
        return i if i < 0 else places[i] if i < len(old) else i + shift

    head = [
        [[moved(i) for i in row[0]] if isinstance(row[0], list) else moved(row[0]), row[1], row[2], list(row[3])]
        for row in stock["head"]
    ]
    return {**stock, "backbone": rows, "head": head}


def _sources(row: list[Any]) -> list[int]:
    return row[0] if isinstance(row[0], list) else [row[0]]
