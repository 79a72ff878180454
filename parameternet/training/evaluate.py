"""Measure the accuracy of a network on a loader."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from parameternet.training.distributed import Place


def autocast(device: torch.device, amp: str | None) -> AbstractContextManager:
    """Return the autocast context of `device` for `amp`: None, float16 or bfloat16."""
    return torch.autocast(device.type, dtype=getattr(torch, amp or "bfloat16"), enabled=amp is not None)


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: Any,
    place: Place,
    *,
    amp: str | None = None,
    channels_last: bool = False,
    progress: Callable[[int, int], None] = lambda step, steps: None,
) -> dict[str, float]:
    """Measure top-1 and top-5 accuracy (percent), cross-entropy and the number of images, over all processes.

    Args:
        model: put into evaluation mode.
        loader: yields images (B, 3, H, W) and labels (B,) on the place's device.
        progress: called with (step, steps) after each batch; an exception ends the evaluation.
    """
    model.eval()
    steps = len(loader)
    counts = [torch.zeros(4, device=place.device)]
    for step, (images, labels) in enumerate(loader):
        if len(images):
            images = images.contiguous(memory_format=torch.channels_last) if channels_last else images
            with autocast(place.device, amp):
                logits = model(images)
            counts.append(_count(logits.float(), labels))
        progress(step + 1, steps)
    top1, top5, loss, images = place.sum(torch.stack(counts).cpu().double().sum(0)).tolist()
    each = max(images, 1.0)
    return {"top1": 100 * top1 / each, "top5": 100 * top5 / each, "loss": loss / each, "images": int(images)}


def _count(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    # Counts stay on the device: reading them after each batch would wait for it.
    ranked = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
    loss = F.cross_entropy(logits, labels, reduction="sum")
    return torch.stack([ranked[:, 0].sum(), ranked.sum(), loss, torch.full_like(loss, len(labels))])
