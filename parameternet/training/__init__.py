"""Training and validation on timm's parts: recipe -> data -> engine -> run folder.

`load_recipe` reads a recipe, `run` trains by it.
"""

from parameternet.training.engine import run
from parameternet.training.errors import Interrupted, TrainingError
from parameternet.training.recipe import Recipe, load_recipe
from parameternet.training.report import Reporter

__all__ = ["Interrupted", "Recipe", "Reporter", "TrainingError", "load_recipe", "run"]
