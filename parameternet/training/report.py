"""What a run says while it goes: a reporter hears it, and decides what becomes of it."""

from __future__ import annotations

import logging
from typing import Any

_logger = logging.getLogger(__name__)


class Reporter:
    """Hears of a run's events. This one only logs; a command line overrides what it shows."""

    def start(self, facts: dict[str, Any]) -> None:
        """The run begins: its folder, model, images, device, steps an epoch, and where it starts."""
        _logger.info("start %s", facts)

    def step(self, epoch: int, step: int, steps: int, facts: dict[str, float]) -> None:
        """`step` of `steps` is done; `facts` (loss, lr, images_per_second) come every `log_every` steps, else {}."""

    def validating(self, step: int, steps: int) -> None:
        """`step` of `steps` validation batches is done."""

    def teaching(self, step: int, steps: int) -> None:
        """The teacher has answered `step` of `steps` batches of training images."""

    def epoch(self, row: dict[str, Any], best: bool) -> None:
        """An epoch is done: its line of history.csv, and whether it is the best so far."""
        _logger.info("epoch %s%s", row, " (best)" if best else "")

    def note(self, text: str) -> None:
        """Something worth knowing: an unreadable image, a checkpoint that could not be written."""
        _logger.warning(text)

    def close(self) -> None:
        """The run is over, for whatever reason."""
