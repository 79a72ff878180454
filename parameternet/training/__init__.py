"""Training and validation with timm: recipe -> loaders -> Trainer -> run folder.

`load_recipe` reads a recipe, `run` trains with it, `validate` measures a model.
"""

from parameternet.deprecation import moved
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
    "run",
    "validate",
]

__getattr__ = moved(__name__, {"release": "parameternet.hub.release:release"})
