"""Errors of training, validation and release."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from parameternet import weights
from parameternet.data.errors import DataError, TrainingError

__all__ = [
    "CheckpointError",
    "DataError",
    "DivergedError",
    "FolderInUse",
    "Interrupted",
    "RecipeError",
    "TrainingError",
    "nearest",
]


class RecipeError(TrainingError, ValueError):
    """The recipe is invalid: unknown key, wrong type, value out of range, contradicting fields."""


class CheckpointError(TrainingError, ValueError):
    """A checkpoint is missing or damaged, or does not match."""


class MissingModel(CheckpointError, weights.WeightsNotFound):
    """The model does not exist. Callers may catch either base class."""


@contextmanager
def missing_model(field: str = "") -> Iterator[None]:
    """Convert errors about a missing model to `MissingModel`, prefixed with the recipe's field.

    Raises:
        MissingModel: no such name, folder, file or config, or an unsupported file format.
        WeightsDamaged: re-raised with the field as a prefix.
    """
    prefix = f"{field}: " if field else ""
    try:
        yield
    except weights.WeightsDamaged as error:
        raise weights.WeightsDamaged(f"{prefix}{error}") from error
    except weights.WeightsError as error:
        raise MissingModel(f"{prefix}{error}") from error


class FolderInUse(TrainingError):
    """Another process is writing to the folder."""


class DivergedError(TrainingError):
    """A training loss, a validation loss or a weight is NaN or infinite."""


class Interrupted(TrainingError):
    """A signal stopped the run after it wrote a checkpoint.

    `signum` is the signal's number; a command exits with 128 + `signum`.
    """

    def __init__(self, signum: int, message: str):
        super().__init__(message)
        self.signum = signum


def nearest(word: str, choices: Iterable[str], n: int = 3) -> str:
    """Return `; closest: a, b` for an error message, or an empty string."""
    close = difflib.get_close_matches(word, list(choices), n=n, cutoff=0.5)
    return f"; closest: {', '.join(close)}" if close else ""
