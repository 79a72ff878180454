"""Open and check a recipe's training and validation data, and create their loaders."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from parameternet.data.labels import difference, few
from parameternet.data.sources import Source, classes_of, digest_of, is_stream, notes_of, open_dataset
from parameternet.training import teacher
from parameternet.training.batches import Images, TrainBatches
from parameternet.training.device_data import Augment, DeviceBatches, DevicePixels, Kept
from parameternet.training.distributed import Place
from parameternet.training.errors import CheckpointError, DataError, RecipeError
from parameternet.training.hub_config import class_labels, data_config
from parameternet.training.loaders import TrainLoader, eval_loader, make_loader, stream_loader, train_transforms
from parameternet.training.recipe import Recipe
from parameternet.training.report import Reporter, SkippedImages
from parameternet.training.sources import Memory


class Datasets:
    """The images of a run, its classes, and one loader each for training and validation.

    Args:
        r: the recipe.
        folder: the run folder, where a teacher's predictions are cached.
        place: this process. All processes must find the same classes and images.
        reporter: called with notes on skipped files and unreadable images.
        saved: the content of `last.ckpt`, whose classes and images must match; None for a new run.

    Attributes:
        classes: names in the order of the labels, or None if the data has none.
        num_classes: number of classes.
        labels: `label_names` and `label_descriptions` for the checkpoint's config.
        images: digests of names and labels of both datasets.
        config: preprocessing for validation.
        skipped: unreadable images found so far.

    Raises:
        RecipeError: no training data, or a batch size that cannot be split among the processes.
        DataError: no images, classes that do not match, or processes that see different data.
        CheckpointError: classes or images that differ from those of the saved run.
    """

    def __init__(self, r: Recipe, folder: Path, place: Place, reporter: Reporter, saved: dict[str, Any] | None):
        self.r, self.folder, self.place, self.reporter = r, folder, place, reporter
        self.share = r.batch_size // place.world
        self.skipped = SkippedImages(reporter)
        self._check_share()
        with _naming("train"):
            self.train = open_dataset(r.train, "train", batch_size=self.share, seed=r.seed, is_training=True)
        with _naming("val"):
            self.val = None if r.val is None else open_dataset(r.val, "validation", batch_size=self.share)
        self.classes = classes_of(self.train)
        self._compare_classes(saved)
        self.images = {"train": digest_of(self.train), "val": digest_of(self.val)}
        self._compare_images(saved)
        for field, dataset in (("train", self.train), ("val", self.val)):
            for note in notes_of(dataset):
                reporter.note(f"{field}: {note}")
        check_classes(self.classes, classes_of(self.val) if self.val else None)
        self.num_classes = count_classes(r, self.classes)
        self.labels = self._labels(saved)
        self.config = data_config(r)

    def _check_share(self) -> None:
        r, world = self.r, self.place.world
        if r.train is None:
            raise RecipeError("the recipe has no training data: set train=FOLDER or train=FILE.tar")
        if r.batch_size % world:
            raise RecipeError(
                f"batch_size {r.batch_size} cannot be split among {world} processes: use a multiple of {world}"
            )
        if r.mixes and self.share % 2:
            raise RecipeError(
                f"mixup and cutmix pair images, but each process gets {self.share} of batch_size {r.batch_size}: use "
                f"a multiple of {2 * world}"
            )

    def _compare_classes(self, saved: dict[str, Any] | None) -> None:
        """Compare classes and their order with the other processes and with the saved run."""
        found = self.place.gather(self.classes)
        if odd := [rank for rank, classes in enumerate(found) if classes != found[0]]:
            raise DataError(
                f"processes 0 and {odd[0]} find different classes in {self.r.train}: give every machine the same data"
            )
        if saved and saved["classes"] != self.classes:
            before, after = saved["classes"] or [], self.classes or []
            gone, new = ([c for c in before if c not in after], [c for c in after if c not in before])
            what = f"gone {few(gone)}, new {few(new)}" if gone or new else "the same classes in another order"
            raise CheckpointError(
                f"the run in {self.folder} used different classes than {self.r.train} has now: {what}. Restore them, "
                "or choose another folder"
            )

    def _compare_images(self, saved: dict[str, Any] | None) -> None:
        """Compare names and labels with the other processes and with the saved run.

        An image's position in an epoch and its augmentation depend on its index, which added or removed images would
        shift.
        """
        found = self.place.gather(json.dumps(self.images))
        if odd := [rank for rank, images in enumerate(found) if images != found[0]]:
            raise DataError(
                f"processes 0 and {odd[0]} find different images: {_changes(found[0], found[odd[0]])}. Give every "
                "machine the same data"
            )
        before = (saved or {}).get("images")  # absent in checkpoints of 0.1.0
        if before and (changed := _changes(before, found[0])):
            raise CheckpointError(
                f"the run in {self.folder} used different images: {changed}. Restore them, or choose another folder"
            )

    def _labels(self, saved: dict[str, Any] | None) -> dict[str, Any]:
        names = self.r.class_names
        if saved and "labels" in saved and names and not Path(names).exists():
            return saved["labels"]  # a run can resume without the file
        return class_labels(names, self.classes, self.num_classes)

    def train_loader(self) -> TrainLoader:
        """Create the loader for this process's share of each training batch.

        Raises:
            DataError: too few images for one update.
        """
        r, place = self.r, self.place
        if is_stream(r.train):
            return TrainLoader(stream_loader(self.train, r, self.share, place.device, True, self.config), None)
        source = self._source(self.train, r.train)
        batches = TrainBatches(len(source), r.batch_size, r.seed, place.rank, place.world)
        if len(batches) < r.accumulate:
            raise DataError(
                f"{len(source)} training images do not fill one update of batch_size {r.batch_size} x accumulate "
                f"{r.accumulate}; lower one of them"
            )
        if r.cache == "device":
            return TrainLoader(self._device_batches(source, batches), batches)
        images = Images(source, train_transforms(r), r.seed)
        loader = make_loader(images, batches, r.mean, r.std, r.workers, place.device, self.skipped.add)
        return TrainLoader(loader, batches)

    def _device_batches(self, source: Source, batches: TrainBatches) -> DeviceBatches:
        r, place = self.r, self.place
        data = DevicePixels(source, r.cache_size, place.device, self.skipped.add)
        augment, targets = Augment(r, len(source), place.device), None
        if r.teacher:
            found = teacher.answers(r, data, self.classes, self.folder, place, self.reporter.teaching)
            targets = teacher.Targets(data.labels, found, r.teacher_share, r.smoothing)
        return DeviceBatches(data, batches, augment, targets)

    def val_loader(self) -> Any:
        """Create the loader for this process's share of the validation images; return None without validation data."""
        r, place = self.r, self.place
        if self.val is None:
            return None
        batch_size = r.val_batch_size or r.batch_size
        if is_stream(r.val):
            return stream_loader(self.val, r, batch_size, place.device, False, self.config)
        source = self._source(self.val, r.val)
        loader = eval_loader(source, self.config, batch_size, r.workers, place, self.skipped.add_validation)
        return Kept(loader, place.device) if r.cache == "device" else loader

    def _source(self, dataset: Any, spec: str | dict) -> Source | Memory:
        source = Source(dataset, str(spec))
        return Memory(source) if self.r.cache == "ram" else source


@contextmanager
def _naming(field: str) -> Iterator[None]:
    """Prefix data errors with the name of the recipe field."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{field}: {error}") from error


def _changes(old: str, new: str) -> str:
    """Describe how two JSON strings with digests by field (train, val) differ; return '' if they do not."""
    before, after = json.loads(old), json.loads(new)
    both = [field for field in before if before[field] and after.get(field)]
    found = {field: difference(before[field], after[field]) for field in both}
    return "; ".join(f"{field}: {what}" for field, what in found.items() if what)


def count_classes(r: Recipe, classes: list[str] | None) -> int:
    """Return the number of classes, from the data or from the recipe.

    Raises:
        RecipeError: neither specifies it.
        DataError: they differ, or there is only one class.
    """
    given, found = r.num_classes, len(classes) if classes else None
    if given is None and found is None:
        raise RecipeError("this training data has no class names: set num_classes")
    if given is not None and found is not None and given != found:
        raise DataError(
            f"num_classes is {given}, but {r.train!r} has {found} classes: set it to {found} or leave it out"
        )
    if (given or found) == 1:
        only = f"one class, {few(classes)}" if classes else "one class"
        raise DataError(
            f"train: {r.train!r} has {only}, but a classifier needs at least two. Each direct subfolder is a class: "
            "give the folder that contains the class folders"
        )
    return given or found


def check_classes(train: list[str] | None, val: list[str] | None) -> None:
    """Check that training and validation data have the same classes in the same order.

    Raises:
        DataError: they differ; the message names the missing classes, or the first label with two meanings.
    """
    if train is None or val is None or train == val:
        return
    missing, extra = sorted(set(train) - set(val)), sorted(set(val) - set(train))
    if not missing and not extra:
        label = next(i for i, names in enumerate(zip(train, val, strict=True)) if names[0] != names[1])
        raise DataError(
            f"training and validation data number their classes differently: label {label} is {few([train[label]])} "
            f"in training and {few([val[label]])} in validation; give both the same class_map"
        )
    raise DataError(
        f"training and validation data must have the same classes, but have {len(train)} and {len(val)}: "
        f"only in training {few(missing)}, only in validation {few(extra)}"
    )
