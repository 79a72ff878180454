"""The history of a run: history.csv, curves.png and, if installed, TensorBoard."""

from __future__ import annotations

import csv
import importlib.util
import io
from pathlib import Path
from typing import Any

from parameternet import files

FILES = ("history.csv", "curves.png")
COLUMNS = (
    "epoch",
    "updates",
    "lr",
    "input_size",
    "train_loss",
    "val_loss",
    "top1",
    "top5",
    "images",
    "unreadable",
    "images_per_second",
    "data_share",
    "seconds",
)


def write_history(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Write all epochs to history.csv; missing values are empty."""
    text = io.StringIO()
    writer = csv.DictWriter(files.CsvFile(text), COLUMNS)
    writer.writeheader()
    writer.writerows({key: _short(value) for key, value in row.items()} for row in rows)
    files.write_text(folder / "history.csv", text.getvalue())


def _short(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value


def draw_curves(folder: Path, rows: list[dict[str, Any]]) -> bool:
    """Plot loss, accuracy and learning rate to curves.png. Return False if matplotlib is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # needs no display and no global state
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3), layout="constrained")
    FigureCanvasAgg(figure)
    panels = {"loss": ("train_loss", "val_loss"), "accuracy, %": ("top1", "top5"), "learning rate": ("lr",)}
    for axes, (title, names) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        for name in names:
            points = [(row["epoch"], row[name]) for row in rows if row.get(name) is not None]
            if points:
                axes.plot(*zip(*points, strict=True), label=name, marker="." if len(points) < 20 else None)
        axes.set(title=title, xlabel="epoch")
        if axes.lines:
            axes.legend()
    with files.atomic_write(folder / "curves.png") as file:
        figure.savefig(file, format="png", dpi=120)
    return True


class Board:
    """Write scalars for TensorBoard into the run folder, if TensorBoard is installed."""

    def __init__(self, folder: Path):
        self.writer = None
        if importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(folder / "tensorboard")

    def add(self, row: dict[str, Any]) -> None:
        """Add one epoch."""
        if self.writer is not None:
            for name, value in row.items():
                if isinstance(value, (int, float)) and name != "epoch":
                    self.writer.add_scalar(name, value, row["epoch"])

    def close(self) -> None:
        """Flush and close the file."""
        if self.writer is not None:
            self.writer.close()
