"""Progress of a run, and meters for the loss, the time and the time spent waiting for data."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from parameternet.training.distributed import Place


@dataclass
class Progress:
    """Position and results of a run. With the tensors, this is all that `last.ckpt` needs."""

    epoch: int = 0
    step: int = 0  # batches done in this epoch
    updates: int = 0
    best: float = -math.inf  # top-1 of best.safetensors, percent
    loss_sum: float = 0.0  # over this epoch, weighted by images
    loss_images: int = 0
    seconds: float = 0.0  # spent on this epoch before this process started
    waited: float = 0.0  # seconds of this epoch spent waiting for data
    unreadable: list[str] = field(default_factory=list)  # names, each once
    rows: list[dict] = field(default_factory=list)

    def next_epoch(self) -> None:
        """Move to the first step of the next epoch."""
        self.epoch, self.step = self.epoch + 1, 0
        self.loss_sum, self.loss_images, self.seconds, self.waited = 0.0, 0, 0.0, 0.0


class EpochMeter:
    """Measure one epoch of training; a resumed epoch continues from the sums in `progress`."""

    def __init__(self, progress: Progress):
        self.progress = progress
        self.reported_at, self.reported_step = time.monotonic(), progress.step
        self.started = self.reported_at - progress.seconds
        self.train_seconds = 0.0
        self._clear()

    def _clear(self) -> None:
        self.losses: list[Tensor] = []  # kept on the device, because reading each one would synchronise
        self.images = 0

    def timed(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Yield the batches, and add up the time spent waiting for them."""
        while True:
            begun = time.monotonic()
            batch = next(batches, None)
            self.progress.waited += time.monotonic() - begun
            if batch is None:
                return
            yield batch

    def add_loss(self, loss: Tensor, images: int) -> None:
        """Add a batch's mean loss."""
        self.losses.append(loss * images)
        self.images += images

    def settle(self) -> float:
        """Add the losses since the last call to `progress` and return the epoch's sum."""
        p = self.progress
        if self.losses:
            # float64 sums of float32 values are exact, so the result does not depend on how often this is called.
            p.loss_sum += float(torch.stack(self.losses).cpu().double().sum())
        p.loss_images += self.images
        p.seconds = time.monotonic() - self.started
        self._clear()
        return p.loss_sum

    def steps_per_second(self) -> float:
        """Return the steps per second since the last call."""
        now, step = time.monotonic(), self.progress.step
        rate = (step - self.reported_step) / (now - self.reported_at)
        self.reported_at, self.reported_step = now, step
        return rate

    def stop(self) -> None:
        """Mark the end of training; validation is not part of `train_seconds`."""
        self.train_seconds = time.monotonic() - self.started

    def summary(self, place: Place) -> dict[str, float]:
        """Return the epoch's loss over all processes, its rate, and the fraction of time spent waiting for data."""
        p = self.progress
        loss, images = place.sum(torch.tensor([p.loss_sum, p.loss_images], dtype=torch.float64)).tolist()
        return {
            "train_loss": loss / max(images, 1),
            "images_per_second": images / self.train_seconds,
            "data_share": p.waited / self.train_seconds,
            "seconds": time.monotonic() - self.started,
        }
