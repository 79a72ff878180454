"""What is to be written: form, batch, size; and what every writer needs for it."""

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
    """`batch` None: free. `size` is (channels, height, width); with `dynamic_size` the latter two are only examples.

    With `int8` the file is made to be quantised: whatever the batch, with operators that suit 8 bits.
    """

    form: str
    batch: int | None
    size: tuple[int, int, int]
    dynamic_size: bool = False
    opset: int | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    int8: bool = False

    def dynamic_dims(self, batch: int | None) -> dict[int, Any]:
        """Free dimensions of the input as torch.export wants them, where `batch` (None: free) may differ from ours."""
        dims: dict[int, Any] = {} if batch else {0: torch.export.Dim("batch", min=1)}
        if self.dynamic_size:
            dims |= {2: torch.export.Dim("height", min=1), 3: torch.export.Dim("width", min=1)}
        return dims


_one_at_a_time = threading.Lock()


@contextlib.contextmanager
def simple_padding() -> Iterator[None]:
    """Let timm's layers with SAME padding compute it by our `same_padding`, which torch.export can follow."""
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
    """Exporters talk while they work; what matters of it they raise."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
