"""Batches: which images, in which order, how augmented, and on which device."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from timm.data import create_loader, create_transform
from timm.data.loader import PrefetchLoader, fast_collate
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from parameternet.data.labels import few
from parameternet.data.sources import Source, Unreadable
from parameternet.training.distributed import Place
from parameternet.training.errors import DataError, RecipeError
from parameternet.training.randomness import IMAGE, ORDER, mix, seed_cpu
from parameternet.training.recipe import Recipe
from parameternet.training.sources import Memory

_DRAWS = 5
Report = Callable[[Unreadable], None]


class Key(NamedTuple):
    """What a worker is asked for: image `index`, as it looks in `epoch`, at side `size`."""

    index: int
    epoch: int
    size: int


class Images(Dataset):
    """Images of a source under a `Key`, transformed; training transforms draw from (seed, epoch, index) alone."""

    def __init__(self, source: Source | Memory, transforms: dict[int, Callable], seed: int | None):
        self.source, self.transforms, self.seed = source, transforms, seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: Key) -> tuple[Any, int] | Unreadable:
        found = self.source.read(key.index)
        if isinstance(found, Unreadable):
            return found
        transform = self.transforms[key.size]
        if self.seed is None:
            return transform(found[0]), found[1]
        for attempt in range(_DRAWS - 1):
            seed_cpu(mix(IMAGE, self.seed, key.epoch, key.index, attempt))
            # Weak random augmentation now and then asks for posters of 0 bits, which Pillow 12 refuses: draw again.
            with suppress(ValueError):
                return transform(found[0]), found[1]
        return transform(found[0]), found[1]


def collate(samples: list) -> tuple[Tensor, Tensor, list[Unreadable]]:
    """uint8 images (B, 3, H, W), labels (B,), and the images that could not be read: they leave the batch."""
    good = [sample for sample in samples if not isinstance(sample, Unreadable)]
    bad = [sample for sample in samples if isinstance(sample, Unreadable)]
    if not good:
        return torch.empty(0, 3, 1, 1, dtype=torch.uint8), torch.empty(0, dtype=torch.int64), bad
    return *fast_collate(good), bad


class TrainBatches:
    """Batch sampler of one process: its share of each global batch, shuffled anew by (seed, epoch).

    A global batch is the same set of images for any number of processes. `seek` places it anywhere in a run.
    The last images that fill no batch are left out; another epoch's order leaves out others.
    """

    def __init__(self, images: int, batch_size: int, seed: int, rank: int, world: int):
        self.images, self.batch_size, self.seed, self.rank, self.world = images, batch_size, seed, rank, world
        self.seek(0, 0, 0)

    def seek(self, epoch: int, step: int, size: int) -> None:
        """Start the next iteration at `step` of `epoch`, with images of side `size`."""
        self.epoch, self.step, self.size = epoch, step, size

    def __len__(self) -> int:
        return self.images // self.batch_size

    def __iter__(self) -> Iterator[list[Key]]:
        generator = torch.Generator().manual_seed(mix(ORDER, self.seed, self.epoch))
        order = torch.randperm(self.images, generator=generator).tolist()
        share = self.batch_size // self.world
        for step in range(self.step, len(self)):
            start = step * self.batch_size + self.rank * share
            yield [Key(index, self.epoch, self.size) for index in order[start : start + share]]


class EvalBatches:
    """Batch sampler for validation: every image once, over all processes together."""

    def __init__(self, images: int, batch_size: int, size: int, rank: int = 0, world: int = 1):
        self.mine, self.batch_size, self.size = range(rank, images, world), batch_size, size

    def __len__(self) -> int:
        return -(-len(self.mine) // self.batch_size)

    def __iter__(self) -> Iterator[list[Key]]:
        for start in range(0, len(self.mine), self.batch_size):
            yield [Key(index, 0, self.size) for index in self.mine[start : start + self.batch_size]]


class Reported:
    """A loader whose unreadable images have been told to `report`; what is left are (images, labels) pairs."""

    def __init__(self, loader: DataLoader, report: Report):
        self.loader, self.report = loader, report

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels, bad in self.loader:
            for item in bad:
                self.report(item)
            yield images, labels


def make_loader(
    images: Images,
    batches: Any,
    mean: list[float],
    std: list[float],
    workers: int,
    device: torch.device,
    report: Report,
) -> PrefetchLoader:
    """Batches on `device`: float32 images (B, 3, H, W), normalised, and int64 labels (B,).

    Workers decode, augment and stack bytes; timm's PrefetchLoader moves and normalises them.
    """
    loader = DataLoader(
        images,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate,
        persistent_workers=workers > 0,
        pin_memory=device.type == "cuda",
        worker_init_fn=_leave_signals,
        # the cached images are shared with the workers by forking; elsewhere they are sent, which is slow but works
        multiprocessing_context="fork" if workers and "fork" in torch.multiprocessing.get_all_start_methods() else None,
    )
    return PrefetchLoader(Reported(loader, report), mean=tuple(mean), std=tuple(std), device=device)


def _leave_signals(worker: int) -> None:
    # Ctrl-C reaches the workers too; the run decides when they end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def stop_workers(loader: Any) -> None:
    """End a loader's workers now. Those that live until the process ends are killed there, and torch complains."""
    while hasattr(loader, "loader"):  # what wraps torch's own
        loader = loader.loader
    iterator = getattr(loader, "_iterator", None)
    if hasattr(iterator, "_shutdown_workers"):
        iterator._shutdown_workers()


def eval_loader(
    source: Source | Memory, config: dict[str, Any], batch_size: int, workers: int, place: Place, report: Report
) -> PrefetchLoader:
    """A loader that shows every image of `source` once, over all processes together, as `config` prepares it.

    `config` holds arguments of timm's `create_transform`, as `resolve_data_config` gives them.
    """
    size = config["input_size"][-1]
    transform = create_transform(**config, is_training=False, use_prefetcher=True)
    batches = EvalBatches(len(source), batch_size, size, place.rank, place.world)
    images = Images(source, {size: transform}, None)
    return make_loader(images, batches, config["mean"], config["std"], workers, place.device, report)


def train_transform_arguments(r: Recipe) -> dict[str, Any]:
    """A recipe's augmentation as arguments of timm's `create_transform` and `create_loader`."""
    return dict(
        is_training=True,
        no_aug=r.no_aug,
        train_crop_mode=r.crop_mode,
        scale=tuple(r.scale),
        ratio=tuple(r.ratio),
        hflip=r.hflip,
        vflip=r.vflip,
        color_jitter=r.color_jitter,
        auto_augment=r.auto_augment,
        interpolation=r.interpolation,
        mean=tuple(r.mean),
        std=tuple(r.std),
    )


def train_transforms(r: Recipe) -> dict[int, Callable]:
    """The training transform for every side that the recipe visits; images come out as bytes.

    Raises:
        RecipeError: an `auto_augment` that timm does not know.
    """
    sizes = {r.input_size, *(stage["input_size"] for stage in r.resolution_schedule)}
    try:
        return {size: create_transform(size, use_prefetcher=True, **train_transform_arguments(r)) for size in sizes}
    except (AssertionError, ValueError, KeyError) as error:
        raise RecipeError(f"auto_augment: timm does not know the policy {r.auto_augment!r}: {error}") from error


def stream_loader(
    dataset: Any, r: Recipe, batch_size: int, device: torch.device, training: bool, data_config: dict
) -> PrefetchLoader:
    """timm's own loader over a stream, which can only be read in order.

    Images that a stream cannot decode are skipped by its reader, which logs them. Augmentation depends on the workers,
    and a run that is resumed reads on from the beginning of the epoch's stream.
    """
    arguments = train_transform_arguments(r) if training else data_config
    size = r.input_size if training else data_config["input_size"]
    return create_loader(
        dataset,
        **{**arguments, "input_size": size},
        batch_size=batch_size,
        num_workers=max(1, r.workers),
        device=device,
        use_prefetcher=True,
        persistent_workers=True,
    )


def check_classes(train: list[str] | None, val: list[str] | None) -> None:
    """Training and validation must name the same classes in the same order, or labels mean different things.

    Raises:
        DataError: with the classes that one of them lacks, or the first label of two meanings.
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
        f"training data has {len(train)} classes, validation data {len(val)}, and they must be the same: "
        f"only in training {few(missing)}, only in validation {few(extra)}"
    )
