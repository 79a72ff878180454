"""Decode images once into memory (`cache: ram`), and check for free memory."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image

from parameternet.data.sources import Source, Unreadable
from parameternet.deprecation import moved
from parameternet.training.errors import DataError

__all__ = ["Memory", "decoded", "free_memory"]

__getattr__ = moved(
    __name__, {name: f"parameternet.data.sources:{name}" for name in ("classes_of", "is_stream", "open_dataset")}
)

_MIB = 1 << 20


class Memory:
    """Decode the images of a source once, into large memory blocks shared by forked workers."""

    def __init__(self, source: Source):
        self.classes, self.where, self.name = source.classes, source.where, source.name
        self.items: list[Unreadable | tuple[int, int]] = []  # an unreadable image, or (block, offset)
        self.shapes = np.zeros((len(source), 2), np.int32)
        self.labels = np.zeros(len(source), np.int64)
        self.blocks: list[np.ndarray] = []
        self.used = 0
        for start, found in decoded(source):
            self.items += [self._store(start + i, item) for i, item in enumerate(found)]
            self._check_room(len(source))

    def __len__(self) -> int:
        return len(self.items)

    def _check_room(self, total: int) -> None:
        used = int(self.shapes.prod(1, dtype=np.int64).sum()) * 3
        missing = used * (total - len(self.items)) // len(self.items)
        if (free := free_memory()) is not None and missing > free:
            raise DataError(
                f"cache: ram needs about {missing >> 20:,} MiB more for {self.where}, but only {free >> 20:,} MiB are "
                "free: set cache=none"
            )

    def _store(self, index: int, found: tuple[Image.Image, int] | Unreadable) -> tuple[int, int] | Unreadable:
        if isinstance(found, Unreadable):
            return found
        pixels = np.asarray(found[0])
        self.shapes[index], self.labels[index] = pixels.shape[:2], found[1]
        if not self.blocks or self.used + pixels.size > self.blocks[-1].size:
            self.blocks.append(np.empty(max(64 * _MIB, pixels.size), np.uint8))
            self.used = 0
        place = (len(self.blocks) - 1, self.used)
        self.blocks[-1][self.used : self.used + pixels.size] = pixels.ravel()
        self.used += pixels.size
        return place

    def read(self, index: int) -> tuple[Image.Image, int] | Unreadable:
        """Return image `index` (RGB) and its label, or `Unreadable` with the reason."""
        item = self.items[index]
        if isinstance(item, Unreadable):
            return item
        (block, offset), (height, width) = item, self.shapes[index]
        pixels = self.blocks[block][offset : offset + height * width * 3].reshape(height, width, 3)
        return Image.fromarray(pixels), int(self.labels[index])


def decoded(source: Source) -> Iterator[tuple[int, Sequence[tuple[Image.Image, int] | Unreadable]]]:
    """Decode every image of a source in a thread pool; yield slices as (first index, results of `read`)."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(source), 1024):  # without slices, all decoded images would be in memory
            yield start, list(pool.map(source.read, range(start, min(start + 1024, len(source)))))


def free_memory(device: torch.device | None = None) -> int | None:
    """Return free bytes of a CUDA device, or of main memory without swap; None if unknown."""
    if device is not None and device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as lines:
            return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None
