"""Errors about weights, with advice on how to fix them."""

from pathlib import Path

__all__ = ["UnknownWeights", "WeightsDamaged", "WeightsError", "WeightsNotFound", "mend"]


class WeightsError(RuntimeError):
    """A checkpoint cannot be read; the message says why and how to fix it."""


class WeightsNotFound(WeightsError):
    """The checkpoint does not exist, or was not found in any of the places tried."""


class UnknownWeights(WeightsNotFound):
    """No checkpoint with that name is recorded."""


class WeightsDamaged(WeightsError):
    """A file exists, but its content is invalid."""


def mend(path: Path) -> str:
    """Return advice on how to get a good copy of a damaged file, as the last sentence of an error."""
    repository = next((parent for parent in path.parents if parent.name.startswith("models--")), None)
    if repository:
        return f"Remove the Hub's cached copy and try again: delete the folder {repository}"
    return "Remove it and get it again from the Hub, the repository, or its author"
