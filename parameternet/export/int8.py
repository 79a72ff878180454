"""Quantise files to int8 with each runtime's static quantiser, and report the cost.

Convolutions and products with constant kernels get 8-bit weights and inputs; the experts of mixed kernels are stored as
int8 and mixed in float32. Routers, pooling, activations, depthwise convolutions (few weights, and ranges that differ by
channel) and products with mixed kernels stay in float32.

>>> export("parameternet_50m.tin200", "net.onnx", int8="images.tar").int8["agreement"]  # doctest: +SKIP
97.1
"""

import itertools
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import timm
from torch import nn

from parameternet.data import images
from parameternet.data.errors import DataError, ImageError
from parameternet.data.sources import Folder, Tar, arrange, open_files
from parameternet.export.checking import Run
from parameternet.export.metadata import config_of, label_names
from parameternet.prediction.predictor import Preprocess

__all__ = ["FEWEST_IMAGES", "FORMATS", "Images", "quantise"]

FORMATS = ("onnx", "openvino")
FEWEST_IMAGES = 200
MOST_CHECKED = 1000
CHUNK = 10  # batch size of a file with a free batch
ROUNDS = 21

Sample = tuple[str, int | None]  # file name, class index of the network


@dataclass(frozen=True)
class Images:
    """Two disjoint random sets of images, one to calibrate with and one to check on."""

    store: Folder | Tar
    preprocess: Preprocess
    calibration: list[Sample]
    checks: list[Sample]

    @classmethod
    def find(cls, path: str | Path, model: nn.Module, number: int = 300, size: tuple[int, int, int] | None = None):
        """Choose up to `number` images of a folder or tar for calibration, and keep at least a quarter for checks.

        Raises:
            DataError: fewer than `FEWEST_IMAGES` images.
            ValueError: the network does not specify its preprocessing.
        """
        config = _preprocessing(model, size)
        store = _open(path)
        samples = _labelled(store, label_names(model))
        if len(samples) < FEWEST_IMAGES:
            raise DataError(
                f"calibration needs at least {FEWEST_IMAGES} images, {path} has {len(samples)}: give more images like "
                "those that the network will see"
            )
        samples = random.Random(0).sample(samples, len(samples))
        number = min(number, len(samples) * 3 // 4)
        return cls(store, Preprocess(config), samples[:number], samples[number : number + MOST_CHECKED])

    def batches(self, samples: list[Sample], batch: int | None) -> Iterator[tuple[np.ndarray, list[int | None]]]:
        """Yield (images, class indices), skipping unreadable images.

        Args:
            batch: Exact batch size; a smaller last batch is dropped. None: up to `CHUNK`.
        """
        read = ((x, label) for name, label in samples if (x := self._read(name)) is not None)
        while taken := list(itertools.islice(read, batch or CHUNK)):
            if batch is None or len(taken) == batch:
                yield np.stack([x for x, _ in taken]), [label for _, label in taken]

    def _read(self, name: str) -> np.ndarray | None:
        try:
            with images.naming(name):
                data = self.store.data(name)
            return self.preprocess(images.decode(data, name)).numpy()
        except ImageError:
            return None


def _preprocessing(model: nn.Module, size: tuple[int, int, int] | None) -> dict[str, Any]:
    """Return the network's preprocessing as timm's data config, for images of `size`.

    Raises:
        ValueError: the network does not specify its preprocessing.
    """
    cfg = config_of(model)
    if not cfg:
        raise ValueError(
            "int8 requires the network's preprocessing, but the network has no pretrained_cfg: set "
            "model.pretrained_cfg = {'input_size': (3, 224, 224), 'mean': (...), 'std': (...)}"
        )
    config = timm.data.resolve_data_config(pretrained_cfg=cfg, use_test_size=True)
    config |= {"input_size": size} if size else {}
    channels = config["input_size"][0]
    for key in ("mean", "std"):
        if len(config[key]) != channels:
            raise ValueError(
                f"int8 requires a {key} for each of the network's {channels} input channels, but its "
                f"pretrained_cfg has {len(config[key])}: {tuple(config[key])}; set model.pretrained_cfg[{key!r}]"
            )
    return config


def _open(path: str | Path) -> Folder | Tar:
    if not Path(path).is_dir() and Path(path).suffix.lower() != ".tar":
        raise DataError(f"{path} is neither a folder nor a .tar of images")
    try:
        return open_files(path)
    except OSError as error:
        raise DataError(f"cannot read images from {path}: {error}") from error


def _labelled(store: Folder | Tar, names: list[str]) -> list[Sample]:
    found = arrange(store)
    classes = list(found.class_to_idx)
    places = {name: index for index, name in enumerate(names)}
    known = bool(classes) and all(name in places for name in classes)
    labelled = [(file, places[classes[label]] if known else None) for file, label in found.samples]
    return labelled + [(file, None) for file in found.outside]


def quantise(writer: ModuleType, source: Path, target: Path, sets: Images, batch: int | None) -> dict[str, Any]:
    """Quantise the float32 file `source` to the int8 file `target`, and measure both on the images for checks.

    Args:
        batch: Batch size of the file; None: any.
    """
    fed = 0

    def calibration() -> Iterator[np.ndarray]:
        nonlocal fed
        for x, _ in sets.batches(sets.calibration, batch or 1):
            fed += len(x)
            yield x

    one = _first(sets, batch)
    writer.quantise(source, target, calibration())
    report: dict[str, Any] = {"calibration_images": fed}
    report |= _compare(writer.observer(source), writer.observer(target), sets, batch)
    report["bytes"] = {"float32": _bytes(source), "int8": _bytes(target), "ratio": _bytes(target) / _bytes(source)}
    report["ms"] = _latency({"float32": writer.runner(source, 1), "int8": writer.runner(target, 1)}, one)
    return report


def _first(sets: Images, batch: int | None) -> np.ndarray:
    """Return a batch for measuring latency.

    Raises:
        DataError: too few images can be read for one batch of calibration or of checks.
    """
    for what, samples in (("calibrate", sets.calibration), ("check", sets.checks)):
        found = next(sets.batches(samples, batch or 1), None)
        if found is None:
            raise DataError(
                f"batch {batch or 1} requires at least {batch or 1} images to {what} with, but fewer of the "
                f"{len(samples)} chosen can be read: give more images or a smaller batch"
            )
    return found[0]


def _bytes(path: Path) -> int:
    return sum(
        file.stat().st_size for file in path.parent.glob(f"{path.stem}.*") if file.suffix in (path.suffix, ".bin")
    )


Observer = Callable[[np.ndarray], tuple[list[np.ndarray], dict[str, np.ndarray]]]


def _compare(exact: Observer, rounded: Observer, sets: Images, batch: int | None) -> dict[str, Any]:
    """Compare two files by outputs, top-1, predicted classes, and the preferred expert of each layer.

    Of several outputs, only the first is compared. Outputs that are not (batch, classes), such as feature maps, have no
    top-1.
    """
    differences: list[float] = []
    same: list[bool] = []
    right: list[tuple[bool, bool]] = []
    experts: dict[str, list[bool]] = {}
    moved: dict[str, float] = {}
    for x, labels in sets.batches(sets.checks, batch):
        ((logits, *_), routing), ((logits8, *_), routing8) = exact(x), rounded(x)
        differences += _relative(logits, logits8)
        if logits.ndim == 2:
            guesses = list(zip(logits.argmax(1).tolist(), logits8.argmax(1).tolist(), strict=True))
            same += [one == other for one, other in guesses]
            right += [(a == y, b == y) for (a, b), y in zip(guesses, labels, strict=True) if y is not None]
        for layer, weights in routing.items():
            experts.setdefault(layer, []).extend(weights.argmax(1) == routing8[layer].argmax(1))
            moved[layer] = max(moved.get(layer, 0.0), float(np.abs(weights - routing8[layer]).max()))
    return {
        "checked_images": len(differences),
        "difference": statistics.fmean(differences),
        "agreement": _percent(same) if same else None,
        "top1": _top1(right),
        "routing_agreement": {layer: _percent(values) for layer, values in experts.items()},
        "routing_difference": moved,
    }


def _relative(exact: np.ndarray, rounded: np.ndarray) -> list[float]:
    """Return each image's distance from the exact output, relative to that output's norm."""
    exact, rounded = (values.reshape(len(values), -1) for values in (exact, rounded))
    lengths = np.maximum(np.linalg.norm(exact, axis=1), np.finfo(np.float32).tiny)
    return (np.linalg.norm(rounded - exact, axis=1) / lengths).tolist()


def _top1(right: list[tuple[bool, bool]]) -> dict[str, float] | None:
    if not right:
        return None
    exact, rounded = _percent([a for a, _ in right]), _percent([b for _, b in right])
    return {"float32": exact, "int8": rounded, "lost": exact - rounded}


def _percent(values: Iterable[bool]) -> float:
    return 100 * statistics.fmean(map(bool, values))


def _latency(runs: dict[str, Run], x: np.ndarray) -> dict[str, float]:
    """Return the median latency of each run in ms; the runs are interleaved."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(ROUNDS + 2):
        for name, run in runs.items():
            start = time.perf_counter()
            run(x)
            if round_ >= 2:
                times[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(values) for name, values in times.items()}
