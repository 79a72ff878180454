"""Errors about images and labels. `parameternet.training` raises them too, so its base class is defined here."""

from __future__ import annotations


class TrainingError(Exception):
    """Base of everything that reading data, training, validation and release raise on purpose."""


class DataError(TrainingError, ValueError):
    """Images or classes that are not what the recipe says."""


class ImageError(DataError):
    """An image that cannot be read: its `name`, and the `reason` in words."""

    def __init__(self, name: str, reason: str):
        super().__init__(name, reason)
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"
