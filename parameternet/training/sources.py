"""Where images come from: timm's readers, with unreadable images named instead of replaced."""

from __future__ import annotations

import os
import struct
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from timm.data import IterableImageDataset, create_dataset
from timm.utils.misc import natural_key

from parameternet.training.errors import DataError

# What Pillow, tarfile and the file system raise on a damaged file.
_DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    struct.error,
    zlib.error,
    tarfile.TarError,
    Image.DecompressionBombError,
)
_STREAMS = ("wds/", "tfds/", "hfids/")
_MIB = 1 << 20


class Unreadable(NamedTuple):
    """An image that could not be read: its place in the data, its name, and what went wrong."""

    index: int
    name: str
    why: str


class Source:
    """Images by index over a dataset of timm. `read(i)` gives an RGB image and its label, or an `Unreadable`.

    timm's own dataset answers a broken image with its neighbour, which may be of another class; this asks the reader
    underneath instead.
    """

    def __init__(self, dataset: Any, where: str):
        self.reader = getattr(dataset, "reader", None)
        self.dataset, self.where = dataset, where
        self.classes = classes_of(dataset)
        self.tar = getattr(self.reader, "tar_state", None) if getattr(self.reader, "root_is_tar", False) else None
        self.process = os.getpid()

    def __len__(self) -> int:
        return len(self.dataset)

    def name(self, index: int) -> str:
        """The image's file name, as the reader knows it."""
        return str(self.reader.filename(index)) if self.reader is not None else f"{self.where}[{index}]"

    def read(self, index: int) -> tuple[Image.Image, int] | Unreadable:
        """Image `index` (RGB) and its label, or what is wrong with it."""
        self._own_tar()
        try:
            image, label = self.reader[index] if self.reader is not None else self.dataset[index]
            if isinstance(image, Image.Image):
                return image.convert("RGB"), int(label)
            with image:
                return Image.open(image).convert("RGB"), int(label)
        except _DAMAGE as error:
            return self._unreadable(index, error)
        except Exception as error:
            # Another package may try more formats after Pillow has given up, and then fail by whatever it lacks.
            if isinstance(error.__context__, UnidentifiedImageError):
                return self._unreadable(index, error.__context__)
            raise

    def _unreadable(self, index: int, error: BaseException) -> Unreadable:
        return Unreadable(index, self.name(index), f"{type(error).__name__}: {error}")

    def _own_tar(self) -> None:
        # An open tar that forked workers share has one file position for all, and they would read each other's images.
        if self.tar is not None and self.process != os.getpid():
            self.process, self.tar.tf = os.getpid(), None


class Memory:
    """The images of another source, decoded once. Pixels lie in large blocks that forked workers share."""

    def __init__(self, source: Source):
        self.classes, self.where, self.name = source.classes, source.where, source.name
        self.items: list[Unreadable | tuple[int, int]] = []  # what is wrong, or (block, offset)
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
                f"cache: ram needs about {missing >> 20:,} MiB more for {self.where}, and {free >> 20:,} MiB "
                "are free: set cache=none"
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
        """Image `index` (RGB) and its label, or what was wrong with it when it was decoded."""
        item = self.items[index]
        if isinstance(item, Unreadable):
            return item
        (block, offset), (height, width) = item, self.shapes[index]
        pixels = self.blocks[block][offset : offset + height * width * 3].reshape(height, width, 3)
        return Image.fromarray(pixels), int(self.labels[index])


def decoded(source: Source) -> Iterator[tuple[int, Sequence[tuple[Image.Image, int] | Unreadable]]]:
    """Every image of a source, in slices: the index of the first, and what `read` gave. A pool of threads decodes."""
    threads = 1 if source.tar is not None else os.cpu_count()  # an open tar has one file position
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(source), 1024):  # the pool would hold every decoded image at once
            yield start, list(pool.map(source.read, range(start, min(start + 1024, len(source)))))


def free_memory(device: torch.device | None = None) -> int | None:
    """Bytes that can be used on a device (None: in main memory, without swapping), where the system tells."""
    if device is not None and device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as lines:
            return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None


def is_stream(spec: str | dict) -> bool:
    """Whether the images can only be read in order (webdataset, TFDS, streamed Hub data sets)."""
    name = spec.get("name", "") if isinstance(spec, dict) else spec
    return name.startswith(_STREAMS)


def open_dataset(spec: str | dict, split: str, **kwargs: Any) -> Any:
    """timm's dataset for a recipe's `train` or `val`.

    Args:
        spec: a folder, a tar, `hfds/NAME[:split]`, `wds/FOLDER:split`, another prefix of timm's, or a dictionary of
            arguments of `timm.data.create_dataset`.
        split: used where the spec names none.
        kwargs: passed on to streams (batch size, seed, whether training).

    Raises:
        DataError: nothing there, or no images in it.
    """
    arguments = _arguments(spec, split)
    if is_stream(spec):
        arguments |= kwargs
    try:
        dataset = _in_order(create_dataset(**arguments), arguments)
    except (OSError, RuntimeError, AssertionError, ValueError, TypeError, ImportError, tarfile.TarError) as error:
        raise DataError(f"cannot read images from {spec!r}: {error or type(error).__name__}. {_EXPECTED}") from error
    if not isinstance(dataset, IterableImageDataset) and len(dataset) == 0:
        raise DataError(f"no images in {spec!r}. {_EXPECTED}")
    return dataset


def _in_order(dataset: Any, arguments: dict[str, Any]) -> Any:
    """The dataset with labels in one order: timm leaves that of names that differ only by case to the hash seed."""
    names = classes_of(dataset) if getattr(dataset, "reader", None) is not None else None
    if not names or arguments.get("name") or arguments.get("class_map"):
        return dataset
    order = sorted(names, key=lambda name: (natural_key(name), name))
    if [natural_key(name) for name in order] != [natural_key(name) for name in names] or order == names:
        return dataset
    return create_dataset(**arguments, class_map={name: label for label, name in enumerate(order)})


_EXPECTED = "Expected a folder or a .tar with one sub-folder of images a class, or hfds/NAME, or wds/FOLDER:shards"


def _arguments(spec: str | dict, split: str) -> dict[str, Any]:
    if isinstance(spec, dict):
        return {"split": split, **spec}
    prefix, slash, rest = spec.partition("/")
    if slash and prefix in ("hfds", "hfids"):
        name, _, named = rest.partition(":")
        return {"name": f"{prefix}/{name}", "split": named or split}
    if slash and prefix in ("wds", "tfds", "torch"):
        root, _, named = rest.partition(":")
        name = f"{prefix}/" if prefix == "wds" else f"{prefix}/{root}"
        return {"name": name, "root": root if prefix == "wds" else None, "split": named or split}
    if not Path(spec).exists():
        raise DataError(f"{spec!r} does not exist. {_EXPECTED}")
    return {"name": "", "root": spec, "search_split": False}


def classes_of(dataset: Any) -> list[str] | None:
    """Class names in the order of their labels, where the reader knows them."""
    reader = getattr(dataset, "reader", dataset)
    table = getattr(reader, "class_to_idx", None) or getattr(reader, "class_name_to_idx", None)
    return sorted(table, key=table.get) if table else None
