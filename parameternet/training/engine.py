"""The run: epochs of steps, checkpoints that survive anything, and a folder that tells what happened."""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from timm.data.random_erasing import RandomErasing
from timm.utils import ModelEmaV3
from timm.utils.clip_grad import dispatch_clip_grad
from torch import Tensor, nn

from parameternet import files
from parameternet.data.labels import difference, few
from parameternet.data.sources import Source, Unreadable, classes_of, digest_of, is_stream, notes_of, open_dataset
from parameternet.training import build, checkpoint, distributed, history, teacher
from parameternet.training.data import (
    Images,
    TrainBatches,
    check_classes,
    eval_loader,
    make_loader,
    stop_workers,
    stream_loader,
    train_transforms,
)
from parameternet.training.device_data import Augment, DeviceBatches, DevicePixels, Kept
from parameternet.training.distributed import Place
from parameternet.training.errors import (
    CheckpointError,
    DataError,
    DivergedError,
    Interrupted,
    RecipeError,
    TrainingError,
)
from parameternet.training.evaluate import autocast, evaluate
from parameternet.training.hub_config import class_labels, data_config, hub_config
from parameternet.training.randomness import STEP, mix, seed_all
from parameternet.training.recipe import Recipe, saved_recipe
from parameternet.training.report import Reporter
from parameternet.training.sources import Memory


def run(recipe: Recipe, folder: str | Path, reporter: Reporter | None = None) -> dict[str, Any]:
    """Train as the recipe says, into a run folder; resume if the folder holds a part of this run.

    Started by torchrun, every process calls this, and the recipe's batches are shared among them.

    Args:
        recipe: the whole truth of the run.
        folder: recipe.yaml, history.csv, curves.png, last.ckpt and best.safetensors are written there.
        reporter: hears of steps, epochs and notes.

    Returns:
        `{"best": {...}, "last": {...}, "folder": path}`: rows of the history.

    Raises:
        RecipeError, DataError, CheckpointError: a run that cannot be; raised before anything is written.
        FolderInUse: another process trains into the folder.
        DivergedError: a loss or a weight is NaN or infinite; no checkpoint and no best weights are of that state.
        Interrupted: SIGINT or SIGTERM; the checkpoint is written.
    """
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    with distributed.place(recipe.device) as place:
        return _run(recipe, Path(folder), place, reporter if reporter and place.first else Reporter())


def _run(recipe: Recipe, folder: Path, place: Place, reporter: Reporter) -> dict[str, Any]:
    # The trainer ends with this function: what it holds of the other processes must be gone when they part.
    try:
        with _own(folder, place):
            trainer = Trainer(recipe, folder, place, reporter)
            with trainer.signals, closing(trainer):
                return trainer.fit()
    finally:
        reporter.close()


@contextmanager
def _own(folder: Path, place: Place) -> Iterator[None]:
    """Make the run folder and lock it for the block; a new folder that stays empty is removed again."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    # Processes of an earlier life of the run may need a moment to end, on another machine too.
    timeout = _TAKEOVER if place.world > 1 else 0.0

    def own() -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(checkpoint.claimed(folder / ".lock", f"the run folder {folder}", timeout))
        except OSError as error:
            raise TrainingError(f"cannot write to the run folder {folder}: {error.strerror}") from error

    with ExitStack() as removed:
        removed.callback(_remove_empty, made if place.first else [])
        with ExitStack() as held:
            place.agreed(own)
            yield


_TAKEOVER = 30.0  # seconds


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:  # not empty, or never made
            return


_ADVICE = "Try a lower lr, a longer warm-up (warmup_epochs), clip_grad=1, or amp=bfloat16 or null"


def _finite(*values: float | None) -> bool:
    return all(value is None or math.isfinite(value) for value in values)


def _not_finite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """The name of a tensor with NaN in it, or infinity in a weight or a batch statistic; None where all are numbers."""
    for name, value in tensors:
        # Masks of attention may hold infinity on purpose.
        bad = torch.isnan if "mask" in name else lambda value: ~torch.isfinite(value)
        if value.is_floating_point() and bad(value).any():
            return name
    return None


@contextmanager
def _naming(field: str) -> Iterator[None]:
    """Put a recipe's field in front of what is wrong with the data that it names."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{field}: {error}") from error


class StopSignals:
    """SIGINT and SIGTERM as a wish that the run grants at its next update; a second one acts as it always does."""

    def __init__(self):
        self.received = 0

    def __enter__(self) -> StopSignals:
        self.old = {}
        if threading.current_thread() is threading.main_thread():  # others may not set handlers
            self.old = {s: signal.signal(s, self._receive) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        self.received = signum
        self.__exit__()

    def __exit__(self, *_: object) -> None:
        for signum, handler in self.old.items():
            signal.signal(signum, handler)
        self.old = {}


def _changes(old: str, new: str) -> str:
    """What differs between two JSON texts of digests by field (train, val); empty if nothing does."""
    before, after = json.loads(old), json.loads(new)
    both = [field for field in before if before[field] and after.get(field)]
    found = {field: difference(before[field], after[field]) for field in both}
    return "; ".join(f"{field}: {what}" for field, what in found.items() if what)


@dataclass
class Progress:
    """Where a run is, and what it has seen. With the tensors, all that `last.ckpt` needs."""

    epoch: int = 0
    step: int = 0  # batches done in this epoch
    updates: int = 0
    best: float = -math.inf  # top-1 of best.safetensors, percent
    loss_sum: float = 0.0  # over this epoch, weighted by images
    loss_images: int = 0
    seconds: float = 0.0  # spent on this epoch before the process that runs now
    waited: float = 0.0  # of this epoch's seconds, those spent on waiting for images
    unreadable: list[str] = field(default_factory=list)  # names, each once
    rows: list[dict] = field(default_factory=list)


class Trainer:
    """One process of a run. `fit` goes from wherever `last.ckpt` is to the recipe's last epoch."""

    def __init__(self, recipe: Recipe, folder: Path, place: Place, reporter: Reporter):
        self.recipe, self.folder, self.place, self.reporter = recipe, folder, place, reporter
        self.signals, self.progress = StopSignals(), Progress()
        self.state = self._last()
        self._open_data()
        self._build()
        self._open_folder()

    # ------------------------------------------------------------------------------------------------- preparation

    def _open_data(self) -> None:
        r = self.recipe
        if r.train is None:
            raise RecipeError("the recipe names no training data: train=FOLDER, or train=FILE.tar")
        if r.batch_size % self.place.world:
            raise RecipeError(f"batch_size {r.batch_size} cannot be shared by {self.place.world} processes")
        if r.mixes and self._share % 2:
            raise RecipeError(
                f"mixup and cutmix pair images, and each process has {self._share} of batch_size {r.batch_size}"
            )
        self.bad: dict[str, str] = {}
        with _naming("train"):
            train = open_dataset(r.train, "train", batch_size=self._share, seed=r.seed, is_training=True)
        with _naming("val"):
            val = None if r.val is None else open_dataset(r.val, "validation", batch_size=self._share)
        self.classes = classes_of(train)
        self._compare_classes()
        self.images = {"train": digest_of(train), "val": digest_of(val)}
        self._compare_images()
        for text in [f"train: {note}" for note in notes_of(train)] + [f"val: {note}" for note in notes_of(val)]:
            self.reporter.note(text)
        check_classes(self.classes, classes_of(val) if val else None)
        self.num_classes = self._count_classes()
        self.labels = self._labels()
        self.config = data_config(r)
        self.train_loader = self._train_loader(train)
        self.val_loader = None if val is None else self._val_loader(val)

    def _compare_classes(self) -> None:
        """Every process must have found the same classes in the same order, or they train on different labels."""
        found = self.place.gather(self.classes)
        if odd := [rank for rank, classes in enumerate(found) if classes != found[0]]:
            raise DataError(
                f"processes 0 and {odd[0]} do not find the same classes in {self.recipe.train}: give every machine the "
                "same data"
            )
        if self.state and self.state["classes"] != self.classes:
            before, after = self.state["classes"] or [], self.classes or []
            gone, new = ([c for c in before if c not in after], [c for c in after if c not in before])
            what = f"gone {few(gone)}, new {few(new)}" if gone or new else "the same ones in another order"
            raise CheckpointError(
                f"{self.folder} holds a run on other classes than those of {self.recipe.train}: {what}. Restore them, "
                "or choose another folder"
            )

    def _compare_images(self) -> None:
        """Names and labels must be those of the other processes, and of the run when it began.

        An image's place in an epoch and its augmentation go by its index, which other images would shift.
        """
        found = self.place.gather(json.dumps(self.images))
        if odd := [rank for rank, images in enumerate(found) if images != found[0]]:
            raise DataError(
                f"processes 0 and {odd[0]} do not find the same images: {_changes(found[0], found[odd[0]])}. Give "
                "every machine the same data"
            )
        saved = (self.state or {}).get("images")  # 0.1.0 saved none
        if saved and (changed := _changes(saved, found[0])):
            raise CheckpointError(
                f"{self.folder} holds a run on other images: {changed}. Restore them, or choose another folder"
            )

    def _labels(self) -> dict[str, Any]:
        names = self.recipe.class_names
        if self.state and "labels" in self.state and names and not Path(names).exists():
            return self.state["labels"]  # the checkpoint is enough to resume
        return class_labels(names, self.classes, self.num_classes)

    @property
    def _share(self) -> int:
        return self.recipe.batch_size // self.place.world

    def _count_classes(self) -> int:
        given, found = self.recipe.num_classes, len(self.classes) if self.classes else None
        if given is None and found is None:
            raise RecipeError("this training data does not tell its classes: set num_classes")
        if given is not None and found is not None and given != found:
            raise DataError(
                f"num_classes is {given}, but {self.recipe.train!r} has {found} classes: set it to {found} or "
                "leave it out"
            )
        if (given or found) == 1:
            only = f"one class, {few(self.classes)}" if self.classes else "one class"
            raise DataError(
                f"train: {self.recipe.train!r} has {only}, and a classifier needs two. Every folder directly below is "
                "a class: give the folder in which the class folders lie"
            )
        return given or found

    def _train_loader(self, dataset: Any) -> Any:
        r, place = self.recipe, self.place
        self.batches = None
        if is_stream(r.train):
            return stream_loader(dataset, r, self._share, place.device, True, self.config)
        source = self._source(dataset, r.train)
        self.batches = TrainBatches(len(source), r.batch_size, r.seed, place.rank, place.world)
        if len(self.batches) < r.accumulate:
            raise DataError(
                f"{len(source)} training images do not fill one update of batch_size {r.batch_size} x accumulate "
                f"{r.accumulate}; lower one of them"
            )
        if r.cache == "device":
            data = DevicePixels(source, r.cache_size, place.device, self._unreadable)
            return DeviceBatches(data, self.batches, Augment(r, len(source), place.device), self._targets(data))
        images = Images(source, train_transforms(r), r.seed)
        return make_loader(images, self.batches, r.mean, r.std, r.workers, place.device, self._unreadable)

    def _targets(self, data: DevicePixels) -> teacher.Targets | None:
        r = self.recipe
        if not r.teacher:
            return None
        found = teacher.answers(r, data, self.classes, self.folder, self.place, self.reporter.teaching)
        return teacher.Targets(data.labels, found, r.teacher_share, r.smoothing)

    def _val_loader(self, dataset: Any) -> Any:
        r, place = self.recipe, self.place
        batch = r.val_batch_size or r.batch_size
        if is_stream(r.val):
            return stream_loader(dataset, r, batch, place.device, False, self.config)
        source = self._source(dataset, r.val)
        loader = eval_loader(source, self.config, batch, r.workers, place, self._unreadable_in_val)
        return Kept(loader, place.device) if r.cache == "device" else loader

    def _source(self, dataset: Any, spec: str | dict) -> Source | Memory:
        source = Source(dataset, str(spec))
        return Memory(source) if self.recipe.cache == "ram" else source

    def _build(self) -> None:
        r, device = self.recipe, self.place.device
        self.model = build.make_model(r, self.num_classes, start=self.state is None).to(device)
        if r.sync_bn and self.place.world > 1:
            self.model = nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
        if r.channels_last:
            self.model = self.model.to(memory_format=torch.channels_last)
        build.check_sizes(r, self.model, self.num_classes, device, self._share)
        self.frozen = build.freeze(self.model, r.freeze)
        self.optimizer = build.make_optimizer(r, self.model)
        self.steps = len(self.train_loader) // r.accumulate * r.accumulate  # an epoch is a whole number of updates
        self.scheduler = build.make_scheduler(r, self.optimizer, self.steps // r.accumulate)
        self.ema = ModelEmaV3(self.model, decay=r.ema_decay, use_warmup=True) if r.ema_decay else None
        self.scaler = torch.amp.GradScaler(device.type, enabled=r.amp == "float16")
        self.mixup = build.make_mixup(r, self.num_classes)
        self.criterion = build.make_loss(r)
        erases = r.reprob and not r.no_aug
        self.erase = RandomErasing(r.reprob, mode=r.remode, device=device) if erases else None
        self.network = self._wrapped()

    def _wrapped(self) -> nn.Module:
        network = torch.compile(self.model) if self.recipe.compile else self.model
        if self.place.world == 1:
            return network
        ids = [self.place.device.index] if self.place.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(network, device_ids=ids)

    # ------------------------------------------------------------------------------------------------------ folder

    def _last(self) -> dict[str, Any] | None:
        """What `last.ckpt` holds, or None where the run begins.

        Raises:
            CheckpointError: damaged, or of another recipe.
            DivergedError: an earlier version saved a network that had diverged.
        """
        if not (self.folder / checkpoint.LAST).exists():
            return None
        state = checkpoint.load_last(self.folder)
        changed = saved_recipe(state["recipe"]).differences(self.recipe)
        if changed:
            raise CheckpointError(
                f"{self.folder} holds a run of another recipe ({'; '.join(changed)}): choose another folder, or give "
                f"its own {self.folder / 'recipe.yaml'} to resume it"
            )
        rows = json.loads(state["progress"])["rows"]
        bad = next((row for row in rows if not _finite(row["train_loss"], row["val_loss"])), None)
        if bad or _not_finite(state["model"].items()):
            what = f"in epoch {bad['epoch']} (validation loss {bad['val_loss']})" if bad else "(NaN in its weights)"
            raise DivergedError(
                f"{self.folder} holds a run that diverged {what} and cannot be resumed. {_ADVICE}, in another folder"
            )
        return state

    def _open_folder(self) -> None:
        self.board = None
        if self.state:
            self._resume(self.state)
            self.state = None
        self.place.wait()
        if self.place.first:
            for name in (checkpoint.LAST, checkpoint.BEST, teacher.ANSWERS, "recipe.yaml", *history.FILES):
                files.remove_leftovers(self.folder / name)
            try:
                files.write_text(self.folder / "recipe.yaml", self.recipe.to_yaml())
            except OSError as error:
                raise CheckpointError(f"cannot write to the run folder {self.folder}: {error}") from error
            self.board = history.Board(self.folder)

    def _resume(self, state: dict[str, Any]) -> None:
        self.progress = Progress(**json.loads(state["progress"]))
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.ema:
            self.ema.module.load_state_dict(state["ema"])
        self.bad = dict.fromkeys(self.progress.unreadable, "")
        if not self.place.first:  # the sums are those of the first process
            self.progress.loss_sum, self.progress.loss_images = 0.0, 0

    def _state(self) -> dict[str, Any]:
        self.progress.unreadable = sorted(self.bad)
        return {
            "recipe": json.dumps(asdict(self.recipe)),
            "classes": self.classes,
            "labels": self.labels,
            "images": json.dumps(self.images),
            "progress": json.dumps(asdict(self.progress)),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema else None,
        }

    def _save_last(self, must: bool) -> None:
        """Write `last.ckpt`. Where that fails, keep the old one, unless this was the last chance (`must`)."""
        self._check_weights()
        self.saved_at = time.monotonic()
        if not self.place.first:
            return
        try:
            checkpoint.save_last(self.folder, self._state())
        except OSError as error:
            text = f"cannot write {self.folder / checkpoint.LAST}: {error}; the one before it still stands"
            if must:
                raise CheckpointError(f"{text}. Make room or fix the permission, then run the command again") from error
            self.reporter.note(text)

    # --------------------------------------------------------------------------------------------------------- run

    def fit(self) -> dict[str, Any]:
        """Train to the last epoch; see `run`."""
        self.saved_at = time.monotonic()
        self.reporter.start(self._facts())
        while self.progress.epoch < self.recipe.epochs:
            self._train_epoch()
            self._close_epoch(self._validate())
        if self.board:
            self.board.close()
        rows = self.progress.rows
        scored = [row for row in rows if row.get("top1") is not None]
        best = max(scored, key=lambda row: row["top1"]) if scored else rows[-1]
        return {"best": best, "last": rows[-1], "folder": str(self.folder)}

    def close(self) -> None:
        """End the workers."""
        stop_workers(self.train_loader)
        stop_workers(self.val_loader)

    def _facts(self) -> dict[str, Any]:
        return {
            "folder": str(self.folder),
            "model": self.recipe.model,
            "classes": self.num_classes,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "trained_parameters": sum(p.numel() for p in self.model.parameters() if p.requires_grad),
            "epochs": self.recipe.epochs,
            "steps_per_epoch": self.steps,
            "device": str(self.place.device),
            "processes": self.place.world,
            "epoch": self.progress.epoch,
            "step": self.progress.step,
        }

    def _train_epoch(self) -> None:
        p, r = self.progress, self.recipe
        self._training_mode()
        if self.mixup:
            self.mixup.mixup_enabled = not r.mixup_off_epoch or p.epoch < r.mixup_off_epoch
        self.loss, self.loss_images = torch.tensor(p.loss_sum, dtype=torch.float64), p.loss_images
        self.losses: list[Tensor] = []  # on the device, since the last look at them
        self.report_time, self.report_step = time.monotonic(), p.step
        self.started = self.report_time - p.seconds
        for images, labels in self._timed(self._remaining_batches()):
            self._step(images, labels)
            p.step += 1
            if p.step % r.accumulate == 0:
                self._after_update()
            self._report_step()
            if p.step == self.steps:
                break
        self.train_seconds = time.monotonic() - self.started

    def _timed(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The batches, with the time that it took to get them added up."""
        while True:
            begun = time.monotonic()
            batch = next(batches, None)
            self.progress.waited += time.monotonic() - begun
            if batch is None:
                return
            yield batch

    def _training_mode(self) -> None:
        self.network.train()
        for module in self.frozen:
            module.eval()

    def _remaining_batches(self) -> Iterator[Any]:
        p = self.progress
        if p.step >= self.steps:  # stopped while validating
            return
        if self.batches is not None:
            self.batches.seek(p.epoch, p.step, self.recipe.size_at(p.epoch))
            yield from self.train_loader
            return
        self.train_loader.dataset.set_epoch(p.epoch)
        for position, batch in enumerate(self.train_loader):  # a stream: read up to where we were
            if position >= p.step:
                yield batch

    def _step(self, images: Tensor, labels: Tensor) -> None:
        """Forward and backward of one batch; an update after every `accumulate` of them."""
        r, p = self.recipe, self.progress
        seed_all(mix(STEP, r.seed, p.epoch, p.step, self.place.rank))
        updating = (p.step + 1) % r.accumulate == 0
        quiet = nullcontext() if updating or self.place.world == 1 else self.network.no_sync()
        with quiet:
            with autocast(self.place.device, r.amp):
                loss = self._loss(images, labels)
            self.scaler.scale(loss / r.accumulate).backward()
        self.losses.append(loss.detach() * len(images))
        self.loss_images += len(images)
        if updating:
            self._update()

    def _loss(self, images: Tensor, labels: Tensor) -> Tensor:
        if not len(images):  # none of the batch could be read; other processes wait for our (zero) gradients
            size = self.recipe.size_at(self.progress.epoch)
            return self.network(torch.zeros(2, 3, size, size, device=self.place.device)).sum() * 0
        if len(images) == 1 < self._share:  # batch norm cannot do with one image where a map has one position
            images, labels = torch.cat([images] * 2), torch.cat([labels] * 2)
        if self.erase:
            images = self.erase(images)
        if self.mixup:
            even = len(images) // 2 * 2  # mixing pairs images, and an unreadable one leaves its partner alone
            images, labels = self.mixup(images[:even], labels[:even])
        if self.recipe.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        return self.criterion(self.network(images), labels)

    def _update(self) -> None:
        r, p = self.recipe, self.progress
        if r.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            dispatch_clip_grad(self.model.parameters(), r.clip_grad, mode=r.clip_mode)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        p.updates += 1
        if self.ema:
            self.ema.update(self.model, step=p.updates)
        if self.scheduler:
            self.scheduler.step_update(p.updates)

    def _after_update(self) -> None:
        """Look at the clock and at the signals: the state is whole here, and only here."""
        if self.progress.step == self.steps:
            return  # the end of the epoch does the same, and more
        due = time.monotonic() - self.saved_at >= 60 * self.recipe.checkpoint_minutes
        wish = self.place.largest(max(self.signals.received << 1, int(due and self.place.first)))
        if wish:
            self._settle_loss()
            self._save_last(must=wish > 1)
        if wish > 1:
            raise self._interrupted(wish >> 1)

    def _interrupted(self, signum: int) -> Interrupted:
        where = f"epoch {self.progress.epoch + 1}, step {self.progress.step} of {self.steps}"
        name = signal.Signals(signum).name
        return Interrupted(signum, f"stopped by {name} at {where}; the same command goes on from there")

    def _settle_loss(self) -> None:
        """Add up the losses since the last look, and stop where one is not a number."""
        if self.losses:
            # float64 holds such a sum of float32 exactly, so that it does not matter how often somebody looks
            self.loss += torch.stack(self.losses).cpu().double().sum()
            self.losses = []
        if self.place.largest(int(not torch.isfinite(self.loss))):
            raise self._diverged(f"the training loss is {float(self.loss)} by step {self.progress.step}")
        self.progress.loss_sum, self.progress.loss_images = float(self.loss), self.loss_images
        self.progress.seconds = time.monotonic() - self.started

    def _diverged(self, what: str) -> DivergedError:
        """The error, and what remains: neither `last.ckpt` nor the best weights are of the state that diverged."""
        epoch, lr = self.progress.epoch + 1, self.optimizer.param_groups[0]["lr"]
        return DivergedError(
            f"the run diverged in epoch {epoch}: {what} (lr {lr:.3g}). {_ADVICE}, in another run folder; what "
            f"{self.folder} holds is from before"
        )

    def _check_weights(self) -> None:
        """Stop where the weights, or their average, are not numbers: the loss of the last step does not show it."""
        networks = {"weights": self.model, "averaged weights": self.ema.module if self.ema else None}
        for words, network in networks.items():
            name = _not_finite(network.state_dict().items()) if network is not None else None
            if self.place.largest(int(name is not None)):
                raise self._diverged(f"NaN or infinity in the {words} ({name or 'of another process'})")

    def _report_step(self) -> None:
        p, facts = self.progress, {}
        if p.step % self.recipe.log_every == 0 or p.step == self.steps:
            self._settle_loss()
            now = time.monotonic()
            rate = (p.step - self.report_step) * self.recipe.batch_size / (now - self.report_time)
            self.report_time, self.report_step = now, p.step
            mean = p.loss_sum / max(p.loss_images, 1)
            facts = {"loss": mean, "lr": self.optimizer.param_groups[0]["lr"], "images_per_second": rate}
        self.reporter.step(p.epoch, p.step, self.steps, facts)

    # --------------------------------------------------------------------------------------------------- epoch's end

    def _validate(self) -> dict[str, float] | None:
        p, r = self.progress, self.recipe
        if self.val_loader is None or ((p.epoch + 1) % r.val_every and p.epoch + 1 < r.epochs):
            return None
        model = self.ema.module if self.ema else self.model
        self.place.share(model.buffers())  # batch statistics are each process's own; the first one's are saved
        found = evaluate(
            model,
            self.val_loader,
            self.place,
            amp=r.amp,
            channels_last=r.channels_last,
            progress=self._during_validation,
        )
        if not found["images"]:
            raise DataError(f"val: not one image of {r.val!r} could be read")
        if not _finite(*(value for value in found.values())):
            raise self._diverged(f"the validation loss is {found['loss']}")
        return found

    def _during_validation(self, step: int, steps: int) -> None:
        self.reporter.validating(step, steps)
        if self.signals.received and self.place.world == 1:  # many processes agree at the end of the epoch
            self._save_last(must=True)
            raise self._interrupted(self.signals.received)

    def _close_epoch(self, found: dict[str, float] | None) -> None:
        p, r = self.progress, self.recipe
        self._check_weights()
        row = self._row(found)
        score = row["top1"] if self.val_loader is not None else float(p.epoch)
        best = score is not None and score > p.best
        p.rows.append(row)
        if best and self._save_best(row, must=p.epoch + 1 == r.epochs):
            p.best = score
        p.epoch, p.step, p.loss_sum, p.loss_images, p.seconds = p.epoch + 1, 0, 0.0, 0, 0.0
        p.waited = 0.0
        signum = self.place.largest(self.signals.received)
        self._save_last(must=p.epoch == r.epochs or signum > 0)
        if self.place.first:
            self._publish(row, best)
        if signum and p.epoch < r.epochs:
            raise self._interrupted(signum)

    def _row(self, found: dict[str, float] | None) -> dict[str, Any]:
        p, found = self.progress, found or {}
        loss, images = self.place.sum(torch.tensor([p.loss_sum, p.loss_images], dtype=torch.float64)).tolist()
        self.bad = self.place.union(self.bad)
        return {
            "epoch": p.epoch + 1,
            "updates": p.updates,
            "lr": self.optimizer.param_groups[0]["lr"],
            "input_size": self.recipe.size_at(p.epoch),
            "train_loss": loss / max(images, 1),
            "val_loss": found.get("loss"),
            "top1": found.get("top1"),
            "top5": found.get("top5"),
            "images": found.get("images"),
            "unreadable": len(self.bad),
            "images_per_second": images / self.train_seconds,
            "data_share": p.waited / self.train_seconds,
            "seconds": time.monotonic() - self.started,
        }

    def _save_best(self, row: dict[str, Any], must: bool) -> bool:
        """Write `best.safetensors`; False where that failed and a later epoch may do better (`must`: none will)."""
        if not self.place.first:
            return True
        model = self.ema.module if self.ema else self.model
        config = hub_config(self.model, self.recipe, self.labels, self.config)
        config["results"] = {name: row[name] for name in ("epoch", "updates", "top1", "top5", "images")}
        try:
            checkpoint.save_weights(self.folder / checkpoint.BEST, model.state_dict(), config)
        except OSError as error:
            text = f"cannot write {self.folder / checkpoint.BEST}: {error}"
            if must:
                raise CheckpointError(f"{text}; make room, then run the command again") from error
            self.reporter.note(f"{text}; the one before it still stands")
            return False
        return True

    def _publish(self, row: dict[str, Any], best: bool) -> None:
        try:
            history.write_history(self.folder, self.progress.rows)
            if not history.draw_curves(self.folder, self.progress.rows) and row["epoch"] == 1:
                self.reporter.note("no curves.png: pip install matplotlib")
            self.board.add(row)
        except OSError as error:
            self.reporter.note(f"cannot write the history: {error}")
        self.reporter.epoch(row, best)

    def _unreadable_in_val(self, item: Unreadable) -> None:
        self._unreadable(item, "val: ")  # training may hold an image of the same name

    def _unreadable(self, item: Unreadable, prefix: str = "") -> None:
        if prefix + item.name not in self.bad:
            self.bad[prefix + item.name] = item.why
            self.reporter.note(f"skipped an unreadable image: {prefix}{item.name} ({item.why})")
