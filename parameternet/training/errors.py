"""What can go wrong in a run, said so that the reader knows what to do next."""

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
    """A recipe that cannot be meant: unknown key, wrong type, value out of its range, contradicting fields."""


class CheckpointError(TrainingError, ValueError):
    """A checkpoint that is missing, damaged or of another network."""


class MissingModel(CheckpointError, weights.WeightsNotFound):
    """A model that is named and is not there: both kinds, as callers catch either."""


@contextmanager
def missing_model(field: str = "") -> Iterator[None]:
    """Raise what says that there is no such model as `MissingModel`, with a recipe's field in front.

    Raises:
        MissingModel: no such name, folder, file or config, or a file of another format.
        WeightsDamaged: as it came.
    """
    prefix = f"{field}: " if field else ""
    try:
        yield
    except weights.WeightsDamaged as error:
        raise weights.WeightsDamaged(f"{prefix}{error}") from error
    except weights.WeightsError as error:
        raise MissingModel(f"{prefix}{error}") from error


class FolderInUse(TrainingError):
    """Another process writes the folder."""


class DivergedError(TrainingError):
    """A loss of training or validation, or a weight, is NaN or infinite."""


class Interrupted(TrainingError):
    """A signal asked the run to stop, and the checkpoint has been written.

    `signum` is the signal's number; a command exits with 128 + `signum`.
    """

    def __init__(self, signum: int, message: str):
        super().__init__(message)
        self.signum = signum


def nearest(word: str, choices: Iterable[str], n: int = 3) -> str:
    """`; closest: a, b` for an error message, or an empty string when nothing is near."""
    close = difflib.get_close_matches(word, list(choices), n=n, cutoff=0.5)
    return f"; closest: {', '.join(close)}" if close else ""
