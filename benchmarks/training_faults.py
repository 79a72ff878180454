"""Count what a run loses when it is killed, when the disk fails, and when it is resumed.

    python benchmarks/training_faults.py [--kills 40] [--json results.json]

Trains a tiny network on synthetic images, with a checkpoint after every update, and

- kills it with SIGKILL at moments swept over an update and its checkpoint, and at every step of the writing of a
  checkpoint, and tries to load `last.ckpt` each time;
- lets every kind of system call of a checkpoint fail in turn with ENOSPC and EACCES, and does the same;
- stops it at an epoch's end and in an epoch's middle, resumes it, and compares every tensor bitwise with a run that
  was never stopped.

Exits with 1 if anything was lost. A few minutes on 2 cores.
"""

from __future__ import annotations

import argparse
import errno
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image

from parameternet import files
from parameternet.training import CheckpointError, Interrupted, Recipe, Reporter, run
from parameternet.training.checkpoint import LAST, load_last


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=40, help="moments at which the run is killed")
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        draw_pictures(root / "pictures")
        figures = {
            "killed": sweep_kills(root, arguments.kills),
            "killed_in_writing": [kill_in_writing(root, point) for point in POINTS],
            "refused": [refuse(root, code, call) for code in (errno.ENOSPC, errno.EACCES) for call in CALLS],
            "resumed": [resume(root, stop, text) for stop, text in STOPS.items()],
        }
    show(figures)
    if arguments.json:
        files.write_json(arguments.json, figures)
    sys.exit(0 if all_well(figures) else 1)


def draw_pictures(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("a", "b", "c"):
        (folder / name).mkdir(parents=True)
        for i in range(16):
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / name / f"{i}.png")


def make_recipe(root: Path, **changes: object) -> Recipe:
    values = dict(
        model="test_efficientnet", train=str(root / "pictures"), val=str(root / "pictures"), input_size=32,
        batch_size=8, epochs=2, lr=1e-3, mixup=0.2, cutmix=0.5, reprob=0.3, color_jitter=0.2, drop_rate=0.2,
        drop_path_rate=0.1, ema_decay=0.9, workers=0, threads=1,
    )  # fmt: skip
    return Recipe(**{**values, **changes})


# ------------------------------------------------------------------------------------------------------------- killed


def sweep_kills(root: Path, kills: int) -> dict[str, int]:
    """Kill the same run again and again, each time a little later; it resumes from `last.ckpt` each time."""
    counts = {"kills": 0, "loadable": 0, "older": 0}
    folder, updates, period = root / "killed", 0, update_seconds(root)
    for kill in range(kills):
        child = start(endless, root, folder)
        wait_until_newer(folder / LAST, child)
        time.sleep(kill / kills * 1.5 * period)  # from the moment that one checkpoint stands, past the next one
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        found = updates_in(folder)
        counts["kills"] += 1
        counts["loadable"] += found is not None
        counts["older"] += found is not None and found < updates  # than one that stood before
        updates = found or updates
    return counts


def start(target: object, *arguments: object) -> multiprocessing.Process:
    child = multiprocessing.get_context("fork").Process(target=target, args=arguments)
    child.start()
    return child


def updates_in(folder: Path) -> int | None:
    """Updates that `last.ckpt` holds; None if it cannot be loaded."""
    try:
        return json.loads(load_last(folder)["progress"])["updates"]
    except CheckpointError as error:
        print(error)
        return None


def endless(root: Path, folder: Path) -> None:
    run(make_recipe(root, epochs=10_000, checkpoint_minutes=0, val=None), folder)


def update_seconds(root: Path) -> float:
    """Seconds from one checkpoint to the next."""
    times: list[float] = []
    clock = Reporter()
    clock.step = lambda *_: times.append(time.monotonic())
    run(make_recipe(root, checkpoint_minutes=0, val=None), root / "timed", clock)
    return float(np.median(np.diff(times)))


POINTS = ("opened", "header written", "half written", "written", "flushed to disk", "renamed")


def kill_in_writing(root: Path, point: str) -> dict[str, object]:
    """Kill a run at one point inside the writing of its fifth checkpoint."""
    folder = root / point.replace(" ", "-")
    child = start(die_in_writing, root, folder, point)
    child.join()
    assert child.exitcode == -signal.SIGKILL, f"the run ended with {child.exitcode}"
    return {"point": point, "updates": updates_in(folder), "unfinished_files": len(list(folder.glob(f".{LAST}.*.tmp")))}


def die_in_writing(root: Path, folder: Path, point: str) -> None:
    real, seen = {"open": open, "fsync": os.fsync, "replace": os.replace}, {"opened": 0}

    def here(now: str) -> None:
        if seen["opened"] == 5 and now == point:
            os.kill(os.getpid(), signal.SIGKILL)

    def opened(path: object, *more: object, **keywords: object):
        file = real["open"](path, *more, **keywords)
        if f".{LAST}." not in str(path):
            return file
        seen["opened"] += 1
        here("opened")
        write = file.write
        wrapped = mock.MagicMock(wraps=file)
        wrapped.__enter__.return_value = wrapped
        wrapped.__exit__.side_effect = lambda *_: file.close()
        wrapped.write.side_effect = lambda data: write_in_halves(write, data)
        return wrapped

    def write_in_halves(write: object, data: memoryview) -> None:
        half = len(data) // 2
        write(data[:half])
        if half > 100:
            here("half written")
        write(data[half:])
        here("written" if half > 100 else "header written")

    def synced(handle: int) -> None:
        real["fsync"](handle)
        here("flushed to disk")

    def renamed(old: object, new: object) -> None:
        real["replace"](old, new)
        if LAST in str(new):
            here("renamed")

    with mock.patch("builtins.open", opened), mock.patch("os.fsync", synced), mock.patch("os.replace", renamed):
        endless(root, folder)


def wait_until_newer(path: Path, child: multiprocessing.Process) -> None:
    before = path.stat().st_mtime_ns if path.exists() else 0
    while not path.exists() or path.stat().st_mtime_ns == before:
        if not child.is_alive():
            raise RuntimeError("the run ended by itself")
        time.sleep(0.001)


# ------------------------------------------------------------------------------------------------------------ refused

CALLS = ("open", "write", "fsync", "replace")


def refuse(root: Path, code: int, call: str) -> dict[str, object]:
    """Let `call` fail with `code` for every checkpoint but the first; the file must load, and be the first."""
    folder = root / f"refused-{code}-{call}"
    run_until(make_recipe(root, checkpoint_minutes=0), folder, steps=2)
    before = (folder / LAST).read_bytes()
    with refusing(call, code):
        try:
            run(make_recipe(root, checkpoint_minutes=0), folder)
            end = "went on"
        except (CheckpointError, OSError):
            end = "stopped with a message"
    same = (folder / LAST).read_bytes() == before
    run(make_recipe(root, checkpoint_minutes=0), folder)  # the disk has room again
    return {
        "error": errno.errorcode[code], "call": call, "run": end, "old_last_stands": same,
        "loadable": bool(load_last(folder)), "leftovers": len(list(folder.glob(".*.tmp"))),
    }  # fmt: skip


def refusing(call: str, code: int) -> mock._patch:
    error = OSError(code, os.strerror(code))
    if call in ("fsync", "replace"):
        return mock.patch.object(os, call, side_effect=error)
    real = open

    def opened(path: object, mode: str = "r", *more: object, **keywords: object):
        if ".tmp" not in str(path):
            return real(path, mode, *more, **keywords)
        if call == "open":
            raise error
        file = mock.MagicMock(wraps=real(path, mode, *more, **keywords))
        file.__enter__.return_value = file
        file.write.side_effect = error
        return file

    return mock.patch("builtins.open", opened)


# ------------------------------------------------------------------------------------------------------------ resumed

STOPS = {6: "epoch's end", 3: "middle of an epoch", 9: "middle of the last epoch"}


def resume(root: Path, stop: int, text: str) -> dict[str, object]:
    """Stop after `stop` updates, resume, and compare with the uninterrupted run."""
    whole, parts = root / "whole", root / f"stopped-{stop}"
    if not whole.exists():
        run(make_recipe(root), whole)
    run_until(make_recipe(root), parts, steps=stop)
    run(make_recipe(root), parts)
    mine, theirs = load_last(whole), load_last(parts)
    pairs = [(mine[part][name], theirs[part][name]) for part in ("model", "ema") for name in mine[part]]
    pairs += [
        (torch.as_tensor(value), torch.as_tensor(theirs["optimizer"]["state"][key][name]))
        for key, slots in mine["optimizer"]["state"].items()
        for name, value in slots.items()
    ]
    best = [(folder / "best.safetensors").read_bytes() for folder in (whole, parts)]
    return {
        "stopped_at": text, "tensors": len(pairs), "bitwise_equal": sum(torch.equal(a, b) for a, b in pairs),
        "best_file_equal": best[0] == best[1],
    }  # fmt: skip


class Stop(Reporter):
    """Sends Ctrl-C after so many steps."""

    def __init__(self, steps: int):
        self.steps = steps

    def step(self, *_: object) -> None:
        self.steps -= 1
        if self.steps == 0:
            os.kill(os.getpid(), signal.SIGINT)


def run_until(recipe: Recipe, folder: Path, steps: int) -> None:
    try:
        run(recipe, folder, Stop(steps))
    except Interrupted:
        return
    raise RuntimeError(f"the run was not stopped after {steps} steps")


# -------------------------------------------------------------------------------------------------------------- shown


def show(figures: dict) -> None:
    killed = figures["killed"]
    print(
        f"SIGKILL, swept over an update and its checkpoint: {killed['kills']} kills, {killed['loadable']} loadable, "
        f"{killed['older']} older than what stood before"
    )
    for row in figures["killed_in_writing"]:
        print(
            f"SIGKILL in the writing of checkpoint 5, {row['point']}: last.ckpt holds update {row['updates']}, "
            f"unfinished files beside it: {row['unfinished_files']}"
        )
    for row in figures["refused"]:
        print(
            f"{row['error']} in {row['call']}: the run {row['run']}, old last stands: {row['old_last_stands']}, "
            f"loadable after: {row['loadable']}, leftovers: {row['leftovers']}"
        )
    for row in figures["resumed"]:
        print(
            f"resumed from {row['stopped_at']}: {row['bitwise_equal']} of {row['tensors']} tensors bitwise equal, "
            f"best.safetensors equal: {row['best_file_equal']}"
        )


def all_well(figures: dict) -> bool:
    killed = figures["killed"]
    return (
        killed["loadable"] == killed["kills"]
        and not killed["older"]
        and all(row["updates"] in (4, 5) for row in figures["killed_in_writing"])
        and all(row["old_last_stands"] and row["loadable"] and not row["leftovers"] for row in figures["refused"])
        and all(row["bitwise_equal"] == row["tensors"] and row["best_file_equal"] for row in figures["resumed"])
    )


if __name__ == "__main__":
    main()
