"""Dataset and batch samplers, which determine the order of images and their augmentation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from timm.data.loader import fast_collate
from torch import Tensor
from torch.utils.data import Dataset

from parameternet.data.sources import Source, Unreadable
from parameternet.training.randomness import IMAGE, ORDER, mix, seed_cpu
from parameternet.training.sources import Memory

_DRAWS = 5  # attempts at a random transform


class Key(NamedTuple):
    """A request to a worker: image `index`, augmented for `epoch`, at `size` pixels."""

    index: int
    epoch: int
    size: int


class Images(Dataset):
    """Read and transform the image of a `Key`; training transforms depend only on (seed, epoch, index).

    Args:
        source: images and labels by index.
        transforms: the transform for each image size.
        seed: seed of random transforms; None if they are not random.
    """

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
            # Weak random augmentation sometimes posterizes to 0 bits, which Pillow 12 rejects: draw again.
            with suppress(ValueError):
                return transform(found[0]), found[1]
        return transform(found[0]), found[1]


def collate(samples: list) -> tuple[Tensor, Tensor, list[Unreadable]]:
    """Stack samples into uint8 images (B, 3, H, W) and labels (B,), and list the unreadable images left out."""
    good = [sample for sample in samples if not isinstance(sample, Unreadable)]
    bad = [sample for sample in samples if isinstance(sample, Unreadable)]
    if not good:
        return torch.empty(0, 3, 1, 1, dtype=torch.uint8), torch.empty(0, dtype=torch.int64), bad
    return *fast_collate(good), bad


class TrainBatches:
    """Sample one process's share of each global batch, shuffled by (seed, epoch).

    A global batch has the same images for any number of processes. `seek` moves to any position in a run. The last,
    incomplete batch is dropped; the dropped images differ from epoch to epoch.
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
    """Sample every image once for validation, split among all processes."""

    def __init__(self, images: int, batch_size: int, size: int, rank: int = 0, world: int = 1):
        self.mine, self.batch_size, self.size = range(rank, images, world), batch_size, size

    def __len__(self) -> int:
        return -(-len(self.mine) // self.batch_size)

    def __iter__(self) -> Iterator[list[Key]]:
        for start in range(0, len(self.mine), self.batch_size):
            yield [Key(index, 0, self.size) for index in self.mine[start : start + self.batch_size]]
