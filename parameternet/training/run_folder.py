"""The run folder: the files that a run writes, the lock on them, and the rules for resuming."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from parameternet import files
from parameternet.training import checkpoint, history, teacher
from parameternet.training.distributed import Place
from parameternet.training.divergence import ADVICE, first_not_finite, is_finite
from parameternet.training.errors import CheckpointError, DivergedError, TrainingError
from parameternet.training.recipe import Recipe, saved_recipe
from parameternet.training.report import Reporter

RECIPE = "recipe.yaml"
# After a restart, old processes may need a moment to exit, on other machines too.
TAKEOVER_SECONDS = 30.0


class RunFolder:
    """The files of a run: recipe.yaml, history.csv, curves.png, last.ckpt, best.safetensors and tensorboard/.

    Every process creates one of these objects; only the first process writes.
    """

    def __init__(self, path: Path, place: Place, reporter: Reporter):
        self.path, self.place, self.reporter = path, place, reporter
        self.board: history.Board | None = None
        self.saved_at = time.monotonic()

    def __str__(self) -> str:
        return str(self.path)

    def load(self, recipe: Recipe) -> dict[str, Any] | None:
        """Read `last.ckpt`; return None for a new run.

        Raises:
            CheckpointError: the file is damaged, or the folder belongs to a run with another recipe.
            DivergedError: the saved network has diverged; only earlier versions saved such networks.
        """
        if not (self.path / checkpoint.LAST).exists():
            # The run was killed before the first checkpoint, or last.ckpt was deleted: keep the best weights' recipe.
            if (self.path / checkpoint.BEST).exists() and (self.path / RECIPE).exists():
                self._check_recipe((self.path / RECIPE).read_text("utf-8"), recipe)
            return None
        state = checkpoint.load_last(self.path)
        self._check_recipe(state["recipe"], recipe)
        rows = json.loads(state["progress"])["rows"]
        bad = next((row for row in rows if not is_finite(row["train_loss"], row["val_loss"])), None)
        if bad or first_not_finite(state["model"].items()):
            what = f"in epoch {bad['epoch']} (validation loss {bad['val_loss']})" if bad else "(NaN in its weights)"
            raise DivergedError(
                f"{self} holds a run that diverged {what} and cannot be resumed. {ADVICE}, in another folder"
            )
        return state

    def _check_recipe(self, text: str, recipe: Recipe) -> None:
        if changed := saved_recipe(text).differences(recipe):
            raise CheckpointError(
                f"{self} holds a run with another recipe ({'; '.join(changed)}): choose another folder, or resume with "
                f"its own recipe, {self.path / RECIPE}"
            )

    def prepare(self, recipe: Recipe) -> None:
        """Remove files left by a killed run, and write the recipe.

        Raises:
            CheckpointError: the folder cannot be written.
        """
        self.place.wait()
        if not self.place.first:
            return
        for name in (checkpoint.LAST, checkpoint.BEST, teacher.ANSWERS, RECIPE, *history.FILES):
            files.remove_leftovers(self.path / name)
        try:
            files.write_text(self.path / RECIPE, recipe.to_yaml())
        except OSError as error:
            raise CheckpointError(f"cannot write to the run folder {self}: {error}") from error
        self.board = history.Board(self.path)

    def minutes_since_save(self) -> float:
        """Return minutes since `last.ckpt` was written, or since the run started."""
        return (time.monotonic() - self.saved_at) / 60

    def save_last(self, state: dict[str, Any], must: bool) -> None:
        """Write `last.ckpt`. If that fails, keep the old one and continue.

        Args:
            must: Raise instead, because the run ends here.

        Raises:
            CheckpointError: the file cannot be written and `must` is set.
        """
        self.saved_at = time.monotonic()
        if not self.place.first:
            return
        try:
            checkpoint.save_last(self.path, state)
        except OSError as error:
            text = f"cannot write {self.path / checkpoint.LAST}: {error}; the previous checkpoint is intact"
            if must:
                raise CheckpointError(
                    f"{text}. Free some space or fix the permissions, then run the command again"
                ) from error
            self.reporter.note(text)

    def save_best(self, weights: dict[str, Tensor], config: dict[str, Any], must: bool) -> bool:
        """Write `best.safetensors`. If that fails, return False, so that a later epoch can still become the best.

        Args:
            must: Raise instead, because no epoch follows.

        Raises:
            CheckpointError: the file cannot be written and `must` is set.
        """
        if not self.place.first:
            return True
        try:
            checkpoint.save_weights(self.path / checkpoint.BEST, weights, config)
        except OSError as error:
            text = f"cannot write {self.path / checkpoint.BEST}: {error}"
            if must:
                raise CheckpointError(f"{text}. Free some space, then run the command again") from error
            self.reporter.note(f"{text}; the previous file is intact")
            return False
        return True

    def write_history(self, rows: list[dict[str, Any]]) -> None:
        """Write history.csv, curves.png and TensorBoard events; `rows` has one row for each epoch so far."""
        if not self.place.first:
            return
        try:
            history.write_history(self.path, rows)
            if not history.draw_curves(self.path, rows) and rows[-1]["epoch"] == 1:
                self.reporter.note("curves.png is not written without matplotlib: pip install matplotlib")
            self.board.add(rows[-1])
        except OSError as error:
            self.reporter.note(f"cannot write the history: {error}")

    def close(self) -> None:
        """Flush TensorBoard events."""
        if self.board:
            self.board.close()


@contextmanager
def locked(folder: Path, place: Place) -> Iterator[None]:
    """Create a run folder and lock it while the block runs; remove it if it is new and stays empty.

    Raises:
        FolderInUse: another process holds the lock.
        TrainingError: the folder cannot be written.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    timeout = TAKEOVER_SECONDS if place.world > 1 else 0.0

    def lock() -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(checkpoint.claimed(folder / ".lock", f"the run folder {folder}", timeout))
        except OSError as error:
            raise TrainingError(f"cannot write to the run folder {folder}: {error.strerror}") from error

    with ExitStack() as removed:
        removed.callback(_remove_empty, made if place.first else [])
        with ExitStack() as held:
            place.agreed(lock)
            yield


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:  # not empty, or never created
            return
