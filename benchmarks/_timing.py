"""Interleaved medians with quartiles, peak memory, errors against a reference, CSV files with a header."""

import csv
import ctypes
import gc
import io
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from datetime import date
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor

from parameternet import files
from parameternet.layers import native

ROOT = Path(__file__).resolve().parent.parent
LEAST = 0.004  # seconds; a shorter run is repeated, so that the clock does not matter
WARM_UP = 2
LIMITS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "PARAMETERNET_NATIVE")

Runs = dict[str, Callable[[], object]]


class Spread(NamedTuple):
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(statistics.median(values), low, high)


def interleave(runs: Runs, rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of each run in each round. Runs take turns, and each round starts with another one."""
    names = list(runs)
    for name in names:
        _seconds(runs[name], 1, device)
    repeats = {name: max(1, math.ceil(LEAST / _seconds(runs[name], 1, device))) for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds + WARM_UP):
        for i in range(len(names)):
            name = names[(turn + i) % len(names)]
            times[name].append(_seconds(runs[name], repeats[name], device))
    return {name: values[WARM_UP:] for name, values in times.items()}


def _seconds(run: Callable[[], object], repeats: int, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


def ratio(times: list[float], base: list[float]) -> Spread:
    """Ratios within each round, so that a temporary slowdown of the machine cancels out."""
    return Spread.of([a / b for a, b in zip(times, base, strict=True)])


def relative_error(got: Tensor, exact: Tensor) -> float:
    """Largest difference, relative to the largest number of the truth."""
    return float((got.detach().double() - exact).abs().max() / exact.abs().max())


def distance(got: Tensor, exact: Tensor) -> float:
    """Length of the difference of two vectors, relative to that of the second."""
    return float((got.double() - exact).norm() / exact.norm())


def accurate(error: float, naive_error: float, dtype: torch.dtype) -> bool:
    """As in the tests: at most twice the error of the naive form in the same dtype, plus a few roundings."""
    return error <= 2 * naive_error + 8 * torch.finfo(dtype).eps


def right(error: float, dtype: torch.dtype) -> bool:
    """Whether half of the digits agree."""
    return error <= torch.finfo(dtype).eps ** 0.5


# memory ---------------------------------------------------------------------------------------------------------------


def peak_mib(build: Callable[[], Callable[[], object]], device: str) -> float:
    """Peak memory in MiB of building something and running it three times, above the start.

    On a CPU that is the resident memory of this process, with what libraries take for themselves, so it wants a fresh
    process (`in_fresh_process`). On a GPU it is what torch's allocator handed out.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    else:
        before = _resident_mib("VmRSS")
    run = build()
    # The highest point of building does not count, only what stays.
    gc.collect()
    _forget_the_peak(device)
    for _ in range(3):
        run()
    if device == "cuda":
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    return _resident_mib("VmHWM") - before


def _forget_the_peak(device: str) -> None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return
    try:
        ctypes.CDLL(None).malloc_trim(0)  # gives freed memory back, where the C library can
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        pass  # not Linux: the peak of the whole process has to do


def _resident_mib(field: str) -> float:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        unit = 2**20 if sys.platform == "darwin" else 2**10  # bytes there, KiB elsewhere
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def in_fresh_process(program: str, case: dict[str, Any]) -> float:
    """What `program --memory-of CASE` prints: a number."""
    command = [sys.executable, "-W", "ignore", program, "--memory-of", json.dumps(case)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the memory of {case} could not be measured:\n{done.stderr}")
    return float(done.stdout.split()[-1])


# files ----------------------------------------------------------------------------------------------------------------


def header(threads: int, device: str) -> list[str]:
    """Machine, versions, date and commit."""
    machine = f"{_processor()}, {threads} of {os.cpu_count()} cores used, {platform.machine()}"
    if device == "cuda":
        machine = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    return [
        f"machine: {machine}",
        f"versions: torch {torch.__version__}, timm {timm.__version__}, Python {platform.python_version()}",
        f"date: {date.today().isoformat()}",
        f"commit: {_commit()}",
        f"native kernels: {native.LEVELS[native.level()]}{_limits()}",
    ]


def _limits() -> str:
    """Return the variables that limit libraries to older instructions than the processor's."""
    found = [f"{name}={os.environ[name]}" for name in LIMITS if name in os.environ]
    return f"; limited by {' '.join(found)}" if found else ""


def kind_of_processor(device: str) -> str:
    """`cuda`, or the vectors that torch uses on this CPU: avx2, avx512, default."""
    return "cuda" if device == "cuda" else torch.backends.cpu.get_cpu_capability().lower()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    flags = next((line for line in lines if line.startswith("flags")), "").split()
    wide = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    return f"{model} ({', '.join(wide)})" if wide else model


def _commit() -> str:
    git = ["git", "-C", str(ROOT)]
    try:
        commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno", "--", "parameternet", "benchmarks/*.py"],
                                 capture_output=True, text=True, check=True)  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit.stdout.strip() + (" and changes to it" if changed.stdout.strip() else "")


def write_csv(path: Path, head: Iterable[str], rows: list[dict[str, Any]]) -> None:
    """Write rows under the column names of the first one, with the header as comments, atomically."""
    path.parent.mkdir(exist_ok=True)
    text = io.StringIO()
    text.writelines(f"# {line}\n" for line in head)
    writer = csv.DictWriter(files.CsvFile(text), list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    files.write_text(path, text.getvalue())


def read_csv(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """(header without its marks, rows)."""
    with path.open(newline="") as file:
        lines = list(file)
    head = list(takewhile(lambda line: line.startswith("# "), lines))
    return [line[2:].rstrip("\n") for line in head], list(csv.DictReader(lines[len(head) :]))


# runs that add up over days and machines ------------------------------------------------------------------------------

Row = dict[str, Any]
RunsOf = dict[tuple[str, str], list[Row]]  # (what was trained, seed) -> its epochs


def read_runs(path: Path, settings: str | None = None) -> RunsOf:
    """Read epochs by the first two columns, variant and seed; empty if there is no file yet.

    Raises SystemExit if the file is of other settings than `settings`, which a header line has to be.
    """
    runs: RunsOf = {}
    if not path.is_file():
        return runs
    head, rows = read_csv(path)
    if settings and settings not in head:
        raise SystemExit(f"{path} is of other settings than {settings}, namely {head[-1]}: move it away first")
    for row in rows:
        what, seed, *_ = row.values()
        runs.setdefault((what, seed), []).append(row)
    return runs


def add_run(path: Path, run: tuple[str, str], epochs: list[Row], order: list[str], head: list[str]) -> None:
    """Add the epochs of a finished run to those of the others, in `order`, other variants last.

    The last line of `head` are the settings, which all runs share.
    """
    others = read_runs(path, head[-1])
    place = {what: index for index, what in enumerate(order)}
    runs = sorted({**others, run: epochs}.items(), key=lambda item: (place.get(item[0][0], len(order)), item[0]))
    known = read_csv(path)[0] if others else []
    write_csv(path, _joined(known, head), [row for _, rows in runs for row in rows])


def _joined(old: list[str], new: list[str]) -> list[str]:
    """Join headers: where machines, versions or days differ, name all of them."""
    values: dict[str, list[str]] = {}
    for line in [*old, *new]:
        key, _, value = line.partition(": ")
        known = values.setdefault(key, [])
        known.extend(part for part in value.split("; ") if part not in known)
    return [f"{key}: {'; '.join(parts)}" for key, parts in values.items()]
