"""Write predictions as CSV, JSON lines or Parquet, one row per image."""

import csv
import importlib
import io
import json
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import BinaryIO

from parameternet.files import CsvFile, atomic_write, check_file
from parameternet.prediction.predictor import Result

__all__ = ["FORMATS", "check_output", "errors_of", "write_errors", "write_rows"]

ROW_GROUP = 10_000  # rows of a Parquet file in memory at once


def check_output(path: Path) -> None:
    """Check that a file of predictions can be written to `path`, and that of errors next to it.

    Raises:
        ValueError: the suffix is not a supported format, or the folder cannot be written.
        ModuleNotFoundError: its format needs a package that is not installed.
    """
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"unsupported format {path.name}; use {', '.join(FORMATS)}")
    check_file(path)
    check_file(errors_of(path))
    if path.suffix.lower() == ".parquet":
        importlib.import_module("pyarrow.parquet")


def errors_of(path: Path) -> Path:
    """Return the file that lists the images without a row in `path`."""
    return path.with_name(f"{path.name}.errors.csv")


def write_rows(path: Path, results: Iterable[Result], topk: int) -> None:
    """Write results atomically, in the format of the suffix.

    Args:
        topk: Classes of each result.
    """
    with atomic_write(path) as file:
        FORMATS[path.suffix.lower()](file, results, topk)


def write_errors(path: Path, results: Iterable[Result]) -> None:
    """Write the path and the error of results that have one, as CSV."""
    with atomic_write(path) as file, _Text(file) as text:
        table = csv.writer(CsvFile(text))
        table.writerow(["path", "error"])
        table.writerows([_unicode(result.path), _unicode(result.error or "")] for result in results)


def _csv(file: BinaryIO, results: Iterable[Result], topk: int) -> None:
    with _Text(file) as text:
        table = csv.writer(CsvFile(text))
        names = [f"{column}_{k}" for k in range(1, topk + 1) for column in ("index", "label", "probability")]
        table.writerow(["path", *names])
        for result in results:
            classes = zip(result.indices, map(_unicode, result.labels), result.probabilities, strict=True)
            table.writerow([_unicode(result.path), *(cell for row in classes for cell in row)])


def _jsonl(file: BinaryIO, results: Iterable[Result], topk: int) -> None:
    for result in results:
        classes = zip(result.indices, map(_unicode, result.labels), result.probabilities, strict=True)
        named = [{"index": index, "label": label, "probability": value} for index, label, value in classes]
        file.write(json.dumps({"path": _unicode(result.path), "classes": named}).encode() + b"\n")


def _parquet(file: BinaryIO, results: Iterable[Result], topk: int) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = {"path": pa.string(), "indices": pa.list_(pa.int32())}
    kinds |= {"labels": pa.list_(pa.string()), "probabilities": pa.list_(pa.float32())}
    schema, rows = pa.schema(kinds), iter(results)
    with pq.ParquetWriter(file, schema) as writer:
        while group := list(islice(rows, ROW_GROUP)):
            columns = {
                "path": [_unicode(result.path) for result in group],
                "indices": [result.indices for result in group],
                "labels": [[*map(_unicode, result.labels)] for result in group],
                "probabilities": [result.probabilities for result in group],
            }
            writer.write_table(pa.table(columns, schema))


FORMATS: dict[str, Callable[[BinaryIO, Iterable[Result], int], None]] = {
    ".csv": _csv,
    ".jsonl": _jsonl,
    ".parquet": _parquet,
}


class _Text(io.TextIOWrapper):
    """UTF-8 text in a binary file that stays open."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file, encoding="utf-8", newline="")

    def __exit__(self, *error: object) -> None:
        self.detach()  # flushes


def _unicode(text: str) -> str:
    # File names may contain invalid UTF-8, which no format can store, and labels NUL, which CSV readers reject.
    return text.encode("utf-8", "backslashreplace").decode().replace("\0", "\\x00")
