"""Errors about images and labels. `parameternet.training` raises them too, so its base class is defined here."""

from __future__ import annotations


class TrainingError(Exception):
    """Base class of all errors raised on purpose by data reading, training, validation and release."""


class DataError(TrainingError, ValueError):
    """Images or classes do not match the recipe."""


class ImageError(DataError):
    """An image cannot be read; `name` identifies it, `reason` says why."""

    def __init__(self, name: str, reason: str):
        super().__init__(name, reason)
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"
