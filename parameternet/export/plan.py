"""Define the plan of an export (form, batch, size), and helpers for the writers."""

import contextlib
import io
import logging
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from parameternet.layers.dynamic_conv import same_padding

__all__ = ["Plan", "quiet", "simple_padding"]


@dataclass(frozen=True)
class Plan:
    """The settings of an export.

    `batch` is None if it is free. `size` is (channels, height, width); with `dynamic_size`, height and width are only
    examples. With `int8`, the file is written for quantisation: with operators that suit int8, whatever the batch.
    """

    form: str
    batch: int | None
    size: tuple[int, int, int]
    dynamic_size: bool = False
    opset: int | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    int8: bool = False

    def dynamic_dims(self, batch: int | None) -> dict[int, Any]:
        """Return the input's free dimensions for torch.export; `batch` (None: free) may differ from the plan's."""
        dims: dict[int, Any] = {} if batch else {0: torch.export.Dim("batch", min=1)}
        if self.dynamic_size:
            dims |= {2: torch.export.Dim("height", min=1), 3: torch.export.Dim("width", min=1)}
        return dims


_one_at_a_time = threading.Lock()


@contextlib.contextmanager
def simple_padding() -> Iterator[None]:
    """Make timm's layers with SAME padding use our `same_padding`, which torch.export can trace."""
    from timm.layers import padding

    with _one_at_a_time:
        original = padding.get_same_padding
        padding.get_same_padding = same_padding
        try:
            yield
        finally:
            padding.get_same_padding = original


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress the prints, warnings and logs of exporters, which raise exceptions for anything important."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
