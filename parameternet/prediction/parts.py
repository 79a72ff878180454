"""Partial results of a bulk prediction on disk, from which a killed run resumes."""

import heapq
import json
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from parameternet import files
from parameternet.text import printable

__all__ = ["Answer", "Parts"]

SETUP = "setup.json"
NAME_BYTES = 8  # of the random name of a part
PART = "[0-9a-f]" * (2 * NAME_BYTES) + ".jsonl"  # matches no file of anyone else


class Answer(NamedTuple):
    """The prediction for image `index`: its classes, most probable first, or why it could not be read."""

    index: int
    classes: list[int]
    probabilities: list[float]
    error: str | None = None


class Parts:
    """The folder `OUTPUT.parts`: the setup, and a file of predictions per process and start of the run.

    A start never changes files of earlier ones, so a line truncated by a kill stays the last of its file. The setup is
    the first file of a run and the first to go, so parts without it are of no run. Other files in the folder stay.
    """

    patience = 15.0  # seconds: a killed run's processes may need a moment to notice

    def __init__(self, output: Path) -> None:
        self.output = output
        self.folder = output.with_name(f"{output.name}.parts")

    def check(self) -> None:
        """Check that the output is not complete.

        Raises:
            ValueError: it exists.
        """
        if self.output.exists() and not (self.folder / SETUP).exists():
            raise ValueError(f"{self.output} exists; delete it, or give another --output")

    @contextmanager
    def begin(self, setup: dict[str, Any]) -> Iterator[None]:
        """Lock the run for this process, new or resumed.

        Raises:
            Locked: another process is writing.
            ValueError: the output exists, or the parts belong to another setup.
        """
        lock = self.output.with_name(f".{self.output.name}.lock")
        with files.lock(lock, str(self.output), timeout=self.patience):
            self.check()
            if (self.folder / SETUP).exists():
                self._check_setup(setup)
            else:
                self.folder.mkdir(exist_ok=True)
                self._remove_files()  # of a run that was killed while removing them
                files.write_json(self.folder / SETUP, setup)
            yield

    def _check_setup(self, setup: dict[str, Any]) -> None:
        try:
            begun = json.loads((self.folder / SETUP).read_text())
        except ValueError:
            begun = {}
        for key, value in setup.items():
            if begun.get(key) != value:
                was, now = (printable(str(found.get(key)))[:80] for found in (begun, setup))
                raise ValueError(
                    f"{self.folder} holds a run started with another {key}: {was}, now {now}. "
                    "Use the same again, delete the folder to start over, or give another --output"
                )

    def check_shared(self, patience: float = 30.0) -> None:
        """Check that this process sees the folder created by the first process.

        Raises:
            ValueError: the folder does not appear within `patience` seconds.
        """
        end = time.monotonic() + patience  # network file systems may show a new folder with a delay
        while not (self.folder / SETUP).exists():
            if time.monotonic() > end:
                raise ValueError(f"{self.folder} is not seen by all hosts; put --output in a folder that they share")
            time.sleep(0.1)

    @contextmanager
    def append(self) -> Iterator["Writer"]:
        """Open this process's file for further predictions."""
        with open(self.folder / f"{secrets.token_hex(NAME_BYTES)}.jsonl", "xb") as file:
            yield Writer(file)
            os.fsync(file.fileno())

    def known(self) -> set[int]:
        """Return the indices of images that have a prediction."""
        return {answer.index for path in self._files() for answer in _read(path)}

    def merged(self) -> Iterator[Answer]:
        """Return the prediction of each index; the first if overlapping processes made two."""
        last = -1
        for answer in heapq.merge(*map(_read, self._files()), key=lambda answer: answer.index):
            if answer.index > last:
                yield answer
            last = answer.index

    def remove(self) -> None:
        """Remove the run's files, and the folder if nothing else is in it."""
        with suppress(OSError):
            (self.folder / SETUP).unlink(missing_ok=True)
            self._remove_files()
            self.folder.rmdir()

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob(PART))

    def _remove_files(self) -> None:
        files.remove_leftovers(self.folder / SETUP)
        for path in self._files():
            path.unlink(missing_ok=True)


class Writer:
    """Append predictions to a file, indices ascending."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def write(self, answers: list[Answer]) -> None:
        self.file.write(b"".join(json.dumps(answer).encode() + b"\n" for answer in answers))
        self.file.flush()


def _read(path: Path) -> Iterator[Answer]:
    """Return the predictions of a file up to an incomplete line."""
    with open(path, "rb") as file:
        for line in file:
            try:
                if not line.endswith(b"\n"):
                    return
                yield Answer(*json.loads(line))
            except (ValueError, TypeError):
                return
