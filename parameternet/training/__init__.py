"""Training and validation with timm: recipe -> loaders -> Trainer -> run folder -> checkpoint.

`load_recipe` reads a recipe, `run` trains by it, `validate` measures a model, `release` makes a checkpoint of a run.
"""

from parameternet.training.errors import (
    CheckpointError,
    DataError,
    DivergedError,
    FolderInUse,
    Interrupted,
    RecipeError,
    TrainingError,
)
from parameternet.training.recipe import Recipe, load_recipe
from parameternet.training.release import release
from parameternet.training.report import Reporter
from parameternet.training.trainer import run
from parameternet.training.validate import validate

__all__ = [
    "CheckpointError",
    "DataError",
    "DivergedError",
    "FolderInUse",
    "Interrupted",
    "Recipe",
    "RecipeError",
    "Reporter",
    "TrainingError",
    "load_recipe",
    "release",
    "run",
    "validate",
]
