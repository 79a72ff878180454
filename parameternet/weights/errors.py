"""What can be wrong with weights, and how to fix it."""

from pathlib import Path

__all__ = ["UnknownWeights", "WeightsDamaged", "WeightsError", "WeightsNotFound", "mend"]


class WeightsError(RuntimeError):
    """A checkpoint cannot be read; the message says why and what to do."""


class WeightsNotFound(WeightsError):
    """No checkpoint of that name, or none in any of the places tried."""


class UnknownWeights(WeightsNotFound):
    """No checkpoint of that name is recorded."""


class WeightsDamaged(WeightsError):
    """A file exists, but its content is not what it should be."""


def mend(path: Path) -> str:
    """Return the last sentence of an error about a damaged file: how to get a good copy."""
    repository = next((parent for parent in path.parents if parent.name.startswith("models--")), None)
    if repository:
        return f"Remove the Hub's cached copy and try again: delete the folder {repository}"
    return "Remove it and get it again from the Hub, the repository, or its author"
