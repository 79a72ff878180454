"""Detect NaN and infinity in losses and weights."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

ADVICE = "Try a lower lr, a longer warmup (warmup_epochs), clip_grad=1, or amp=bfloat16 or null"


def is_finite(*values: float | None) -> bool:
    """Return whether every value is a finite number or None."""
    return all(value is None or math.isfinite(value) for value in values)


def first_not_finite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """Return the name of the first tensor with NaN, or with infinity in a weight or a batch statistic; else None."""
    for name, value in tensors:
        # Attention masks may hold infinity on purpose.
        bad = torch.isnan if "mask" in name else lambda value: ~torch.isfinite(value)
        if value.is_floating_point() and bad(value).any():
            return name
    return None
