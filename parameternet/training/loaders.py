"""Create loaders, which yield batches of images and labels on a device."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from typing import Any

import torch
from timm.data import create_loader, create_transform
from timm.data.loader import PrefetchLoader
from torch import Tensor
from torch.utils.data import DataLoader

from parameternet.data.sources import Source, Unreadable
from parameternet.training.batches import EvalBatches, Images, TrainBatches, collate
from parameternet.training.distributed import Place
from parameternet.training.errors import RecipeError
from parameternet.training.recipe import Recipe
from parameternet.training.sources import Memory

Report = Callable[[Unreadable], None]


class Reported:
    """Call `report` for each unreadable image of a loader, and yield (images, labels)."""

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
    """Create a loader of float32 images (B, 3, H, W), normalised, and int64 labels (B,) on `device`.

    Workers decode, augment and stack uint8 images; timm's PrefetchLoader moves them to the device and normalises them.

    Args:
        batches: a batch sampler of `Key`s.
        report: called for each unreadable image, which is left out of its batch.
    """
    loader = DataLoader(
        images,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate,
        persistent_workers=workers > 0,
        pin_memory=device.type == "cuda",
        worker_init_fn=_ignore_signals,
        # Forked workers share the cached images; elsewhere they are copied, which is slow but works.
        multiprocessing_context="fork" if workers and "fork" in torch.multiprocessing.get_all_start_methods() else None,
    )
    return PrefetchLoader(Reported(loader, report), mean=tuple(mean), std=tuple(std), device=device)


def _ignore_signals(worker: int) -> None:
    # Ctrl-C reaches the workers too, but the run still needs them to finish cleanly.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def stop_workers(loader: Any) -> None:
    """Stop a loader's workers; torch would kill them at exit, with an error."""
    while hasattr(loader, "loader"):  # wrappers of torch's DataLoader
        loader = loader.loader
    iterator = getattr(loader, "_iterator", None)
    if hasattr(iterator, "_shutdown_workers"):
        iterator._shutdown_workers()


def eval_loader(
    source: Source | Memory, config: dict[str, Any], batch_size: int, workers: int, place: Place, report: Report
) -> PrefetchLoader:
    """Create a loader that yields every image of `source` once, over all processes.

    Args:
        config: arguments of timm's `create_transform`, as returned by `resolve_data_config`.
    """
    size = config["input_size"][-1]
    transform = create_transform(**config, is_training=False, use_prefetcher=True)
    batches = EvalBatches(len(source), batch_size, size, place.rank, place.world)
    images = Images(source, {size: transform}, None)
    return make_loader(images, batches, config["mean"], config["std"], workers, place.device, report)


def train_transform_arguments(r: Recipe) -> dict[str, Any]:
    """Return a recipe's augmentation as arguments of timm's `create_transform` and `create_loader`."""
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
    """Create the training transform for each input size of the recipe; they return uint8.

    Raises:
        RecipeError: timm does not know the `auto_augment` policy.
    """
    sizes = {r.input_size, *(stage["input_size"] for stage in r.resolution_schedule)}
    try:
        return {size: create_transform(size, use_prefetcher=True, **train_transform_arguments(r)) for size in sizes}
    except (AssertionError, ValueError, KeyError) as error:
        raise RecipeError(f"auto_augment: timm does not know the policy {r.auto_augment!r}: {error}") from error


def stream_loader(
    dataset: Any, r: Recipe, batch_size: int, device: torch.device, training: bool, data_config: dict
) -> PrefetchLoader:
    """Create timm's own loader for a stream, which can only be read in order.

    The stream's reader skips and logs images that it cannot decode. Augmentation depends on the number of workers.
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


class TrainLoader:
    """Training batches, starting at any position of a run.

    Args:
        loader: yields images (B, 3, H, W) and labels.
        batches: the sampler of `loader`; None for a stream, whose earlier batches are read and discarded.
    """

    def __init__(self, loader: Any, batches: TrainBatches | None):
        self.loader, self.batches = loader, batches

    def __len__(self) -> int:
        return len(self.loader)

    def from_step(self, epoch: int, step: int, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of `epoch`, starting at `step`, with images of `size` pixels."""
        if self.batches is not None:
            self.batches.seek(epoch, step, size)
            yield from self.loader
            return
        self.loader.dataset.set_epoch(epoch)
        for position, batch in enumerate(self.loader):
            if position >= step:
                yield batch
