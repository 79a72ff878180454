"""Reporters, which are called during a run to log or show its progress."""

from __future__ import annotations

import logging
from typing import Any

from parameternet.data.sources import Unreadable
from parameternet.training.distributed import Place

_logger = logging.getLogger(__name__)


class Reporter:
    """Log a run's events. Subclasses override methods to show them."""

    def start(self, facts: dict[str, Any]) -> None:
        """Called when the run starts, with its folder, model, classes, device, steps per epoch and first step."""
        _logger.info("start %s", facts)

    def step(self, epoch: int, step: int, steps: int, facts: dict[str, float]) -> None:
        """Called after `step` of `steps`.

        Every `log_every` steps, `facts` has loss, lr and images_per_second; otherwise it is empty.
        """

    def validating(self, step: int, steps: int) -> None:
        """Called after `step` of `steps` validation batches."""

    def teaching(self, step: int, steps: int) -> None:
        """Called when the teacher has predicted `step` of `steps` batches of training images."""

    def epoch(self, row: dict[str, Any], best: bool) -> None:
        """Called after each epoch, with its row of history.csv and whether it is the best so far."""
        _logger.info("epoch %s%s", row, " (best)" if best else "")

    def note(self, text: str) -> None:
        """Called with a warning, e.g. about an unreadable image or a failed checkpoint."""
        _logger.warning(text)

    def close(self) -> None:
        """Called when the run ends, for any reason."""


class SkippedImages:
    """Collect unreadable images, and report each once."""

    def __init__(self, reporter: Reporter):
        self.reporter = reporter
        self.reasons: dict[str, str] = {}  # by name

    def __len__(self) -> int:
        return len(self.reasons)

    @property
    def names(self) -> list[str]:
        """Names in alphabetical order."""
        return sorted(self.reasons)

    def add(self, item: Unreadable, prefix: str = "") -> None:
        """Report `item` unless it was reported before."""
        name = prefix + item.name
        if name not in self.reasons:
            self.reasons[name] = item.why
            self.reporter.note(f"skipped an unreadable image: {name} ({item.why})")

    def add_validation(self, item: Unreadable) -> None:
        """Report an unreadable validation image; training may have an image of the same name."""
        self.add(item, "val: ")

    def share(self, place: Place) -> None:
        """Merge the unreadable images of all processes."""
        self.reasons = place.union(self.reasons)
