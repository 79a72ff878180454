"""Train from a recipe: recipe -> datasets and loaders -> `Trainer` -> run folder."""

from __future__ import annotations

import json
import math
import signal
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from parameternet.training import distributed, history
from parameternet.training.datasets import Datasets
from parameternet.training.distributed import Place
from parameternet.training.divergence import ADVICE, is_finite
from parameternet.training.errors import DataError, DivergedError, Interrupted
from parameternet.training.evaluate import evaluate
from parameternet.training.hub_config import hub_config
from parameternet.training.learner import Learner
from parameternet.training.loaders import stop_workers
from parameternet.training.meters import EpochMeter, Progress
from parameternet.training.recipe import Recipe
from parameternet.training.report import Reporter
from parameternet.training.run_folder import RunFolder, locked
from parameternet.training.signals import StopSignals


def run(recipe: Recipe, folder: str | Path, reporter: Reporter | None = None) -> dict[str, Any]:
    """Train from a recipe into a run folder; resume if the folder holds an unfinished run of it.

    Under torchrun every process calls this, and the processes split each batch of the recipe.

    Args:
        recipe: everything that the result depends on.
        folder: the run folder, for recipe.yaml, history.csv, curves.png, last.ckpt and best.safetensors.
        reporter: called at each step, epoch and note.

    Returns:
        `{"best": {...}, "last": {...}, "folder": path}`: rows of the history.

    Raises:
        RecipeError, DataError, CheckpointError: the run cannot start; raised before anything is written.
        FolderInUse: another process is training into the folder.
        DivergedError: a loss or a weight is NaN or infinite; that state is not saved.
        Interrupted: SIGINT or SIGTERM; the checkpoint is written.
    """
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    with distributed.place(recipe.device) as place:
        return _run(recipe, Path(folder), place, reporter if reporter and place.first else Reporter())


def _run(recipe: Recipe, folder: Path, place: Place, reporter: Reporter) -> dict[str, Any]:
    # A separate function, so that the trainer is freed before the process group ends.
    try:
        with locked(folder, place):
            trainer = Trainer(recipe, folder, place, reporter)
            with trainer.signals, closing(trainer):
                return trainer.fit()
    finally:
        reporter.close()


class Trainer:
    """One process of a run. `fit` trains from `last.ckpt`, or from the start, to the last epoch.

    Args:
        recipe: everything that the result depends on.
        folder: the run folder.
        place: the rank and number of processes.
        reporter: called at each step, epoch and note.

    Raises:
        RecipeError, DataError, CheckpointError, DivergedError: see `run`.
    """

    def __init__(self, recipe: Recipe, folder: Path, place: Place, reporter: Reporter):
        self.recipe, self.place, self.reporter = recipe, place, reporter
        self.signals, self.folder = StopSignals(), RunFolder(folder, place, reporter)
        saved = self.folder.load(recipe)
        self.data = Datasets(recipe, folder, place, reporter, saved)
        self.train_loader, self.val_loader = self.data.train_loader(), self.data.val_loader()
        updates = len(self.train_loader) // recipe.accumulate  # an epoch is a whole number of updates
        self.steps = updates * recipe.accumulate
        self.learner = Learner(recipe, self.data.num_classes, place, updates, start=saved is None)
        self.progress = self._resume(saved) if saved else Progress()
        self.meter = EpochMeter(self.progress)
        self.folder.prepare(recipe)

    def _resume(self, saved: dict[str, Any]) -> Progress:
        self.learner.load_state_dict(saved)
        progress = Progress(**json.loads(saved["progress"]))
        self.data.skipped.reasons = dict.fromkeys(progress.unreadable, "")
        if not self.place.first:  # the saved sums belong to the first process
            progress.loss_sum, progress.loss_images = 0.0, 0
        return progress

    # -------------------------------------------------------------------------------------------------------- epochs

    def fit(self) -> dict[str, Any]:
        """Train to the last epoch; see `run`."""
        self.reporter.start(self._facts())
        while self.progress.epoch < self.recipe.epochs:
            self.train_epoch()
            self._close_epoch(self.validate())
        self.folder.close()
        rows = self.progress.rows
        scored = [row for row in rows if row.get("top1") is not None]
        best = max(scored, key=lambda row: row["top1"]) if scored else rows[-1]
        return {"best": best, "last": rows[-1], "folder": str(self.folder)}

    def close(self) -> None:
        """Stop the workers."""
        stop_workers(self.train_loader)
        stop_workers(self.val_loader)

    def _facts(self) -> dict[str, Any]:
        parameters = list(self.learner.model.parameters())
        return {
            "folder": str(self.folder),
            "model": self.recipe.model,
            "classes": self.data.num_classes,
            "parameters": sum(p.numel() for p in parameters),
            "trained_parameters": sum(p.numel() for p in parameters if p.requires_grad),
            "epochs": self.recipe.epochs,
            "steps_per_epoch": self.steps,
            "device": str(self.place.device),
            "processes": self.place.world,
            "epoch": self.progress.epoch,
            "step": self.progress.step,
        }

    def train_epoch(self) -> None:
        """Train the rest of the current epoch."""
        p, size = self.progress, self.recipe.size_at(self.progress.epoch)
        self.learner.start_epoch(p.epoch)
        self.meter = EpochMeter(p)
        if p.step < self.steps:  # else the run was stopped while validating
            for images, labels in self.meter.timed(self.train_loader.from_step(p.epoch, p.step, size)):
                self.step(images, labels)
                if p.step == self.steps:
                    break
        self.meter.stop()

    def step(self, images: Tensor, labels: Tensor) -> None:
        """Train on one batch; update the weights after every `accumulate` of them.

        Args:
            images: (B, 3, H, W), normalised, on the device.
            labels: (B,), or (B, classes) with a teacher.
        """
        p = self.progress
        self.meter.add_loss(self.learner.backward(images, labels, p.epoch, p.step), len(images))
        p.step += 1
        if p.step % self.recipe.accumulate == 0:
            p.updates += 1
            self.learner.update(p.updates)
            self._save_if_due()
        self._report_step()

    def validate(self) -> dict[str, float] | None:
        """Evaluate the network, or its EMA, on the validation images; return None if this epoch has no validation."""
        p, r = self.progress, self.recipe
        if self.val_loader is None or ((p.epoch + 1) % r.val_every and p.epoch + 1 < r.epochs):
            return None
        model = self.learner.evaluated
        self.place.share(model.buffers())  # each process has its own batch statistics; the first process's are saved
        found = evaluate(
            model,
            self.val_loader,
            self.place,
            amp=r.amp,
            channels_last=r.channels_last,
            progress=self._during_validation,
        )
        if not found["images"]:
            raise DataError(f"val: no image of {r.val!r} could be read")
        if not is_finite(*found.values()):
            raise self._diverged(f"the validation loss is {found['loss']}")
        return found

    def _close_epoch(self, found: dict[str, float] | None) -> None:
        """Write the best weights, the checkpoint and the history, then stop if a signal asked for it."""
        p, last = self.progress, self.progress.epoch + 1 == self.recipe.epochs
        self._check_weights()
        row = self._row(found or {})
        score = row["top1"] if self.val_loader is not None else float(p.epoch)
        best = score is not None and score > p.best
        p.rows.append(row)
        if best and self._save_best(row, must=last):
            p.best = score
        p.next_epoch()
        signum = self.place.largest(self.signals.received)
        self._save_last(must=last or signum > 0)
        self.folder.write_history(p.rows)
        if self.place.first:
            self.reporter.epoch(row, best)
        if signum and not last:
            raise self._interrupted(signum)

    def _row(self, found: dict[str, float]) -> dict[str, Any]:
        self.data.skipped.share(self.place)
        row = {
            "epoch": self.progress.epoch + 1,
            "updates": self.progress.updates,
            "lr": self.learner.lr,
            "input_size": self.recipe.size_at(self.progress.epoch),
            "val_loss": found.get("loss"),
            "top1": found.get("top1"),
            "top5": found.get("top5"),
            "images": found.get("images"),
            "unreadable": len(self.data.skipped),
            **self.meter.summary(self.place),
        }
        return {name: row[name] for name in history.COLUMNS}

    # ------------------------------------------------------------------------------------------------- between steps

    def _save_if_due(self) -> None:
        """Save after an update if a signal arrived or a checkpoint is due; within an update the state is incomplete."""
        if self.progress.step == self.steps:
            return  # the end of the epoch saves anyway
        due = self.place.first and self.folder.minutes_since_save() >= self.recipe.checkpoint_minutes
        wish = self.place.largest(max(self.signals.received << 1, int(due)))  # the signal's number, and a bit for time
        if wish:
            self._settle_loss()
            self._save_last(must=wish > 1)
        if wish > 1:
            raise self._interrupted(wish >> 1)

    def _report_step(self) -> None:
        p, facts = self.progress, {}
        if p.step % self.recipe.log_every == 0 or p.step == self.steps:
            self._settle_loss()
            rate = self.meter.steps_per_second() * self.recipe.batch_size
            mean = p.loss_sum / max(p.loss_images, 1)
            facts = {"loss": mean, "lr": self.learner.lr, "images_per_second": rate}
        self.reporter.step(p.epoch, p.step, self.steps, facts)

    def _during_validation(self, step: int, steps: int) -> None:
        self.reporter.validating(step, steps)
        if self.signals.received and self.place.world == 1:  # several processes synchronise at the end of the epoch
            self._save_last(must=True)
            raise self._interrupted(self.signals.received)

    # -------------------------------------------------------------------------------------------- checks and writing

    def _settle_loss(self) -> None:
        loss = self.meter.settle()
        if self.place.largest(int(not math.isfinite(loss))):
            raise self._diverged(f"the training loss is {loss} at step {self.progress.step}")

    def _check_weights(self) -> None:
        """Raise an error for NaN or infinity in the weights or their EMA, which the last loss cannot show."""
        for words, name in self.learner.not_finite().items():
            if self.place.largest(int(name is not None)):
                raise self._diverged(f"NaN or infinity in the {words} ({name or 'in another process'})")

    def _save_last(self, must: bool) -> None:
        self._check_weights()
        self.progress.unreadable = self.data.skipped.names
        state = {
            "recipe": json.dumps(asdict(self.recipe)),
            "classes": self.data.classes,
            "labels": self.data.labels,
            "images": json.dumps(self.data.images),
            "progress": json.dumps(asdict(self.progress)),
            **self.learner.state_dict(),
        }
        self.folder.save_last(state, must)

    def _save_best(self, row: dict[str, Any], must: bool) -> bool:
        config = hub_config(self.learner.model, self.recipe, self.data.labels, self.data.config)
        config["results"] = {name: row[name] for name in ("epoch", "updates", "top1", "top5", "images")}
        return self.folder.save_best(self.learner.evaluated.state_dict(), config, must)

    def _interrupted(self, signum: int) -> Interrupted:
        where = f"epoch {self.progress.epoch + 1}, step {self.progress.step} of {self.steps}"
        name = signal.Signals(signum).name
        return Interrupted(signum, f"stopped by {name} at {where}; run the same command to resume")

    def _diverged(self, what: str) -> DivergedError:
        return DivergedError(
            f"the run diverged in epoch {self.progress.epoch + 1}: {what} (lr {self.learner.lr:.3g}). {ADVICE}, in "
            f"another run folder; {self.folder} keeps the last state from before it diverged"
        )
