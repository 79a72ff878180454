"""8-bit files: static calibration by the quantiser of each runtime, and a report of what it costs.

Convolutions and products by constant kernels get 8-bit weights and inputs; the experts of mixed kernels are stored in
8 bits and mixed in 32. Routers, pooling, activations, depthwise convolutions (few weights, and ranges that differ by
channel) and the products by mixed kernels stay in 32-bit floats.

>>> export("parameternet_50m.tin200", "net.onnx", int8="images.tar").int8["agreement"]  # doctest: +SKIP
97.1
"""

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
from parameternet.prediction.predictor import Preprocess

__all__ = ["FEWEST_IMAGES", "FORMATS", "Images", "quantise"]

FORMATS = ("onnx", "openvino")
FEWEST_IMAGES = 200
MOST_CHECKED = 1000
CHUNK = 10  # images that the runtimes are given at once
ROUNDS = 21

Sample = tuple[str, int | None]  # file, class of the network


@dataclass(frozen=True)
class Images:
    """Two random sets of images that have none in common: to calibrate with, and to check on."""

    store: Folder | Tar
    preprocess: Preprocess
    calibration: list[Sample]
    checks: list[Sample]

    @classmethod
    def find(cls, path: str | Path, model: nn.Module, number: int = 300, size: tuple[int, int, int] | None = None):
        """Images of a folder or tar. At least a quarter of them is for checks, whatever `number` says.

        Raises:
            DataError: fewer than `FEWEST_IMAGES`, or none that can be read.
        """
        config = timm.data.resolve_data_config(pretrained_cfg=dict(model.pretrained_cfg), use_test_size=True)
        store = _open(path)
        samples = _labelled(store, list(model.pretrained_cfg.get("label_names") or []))
        if len(samples) < FEWEST_IMAGES:
            raise DataError(
                f"calibration needs at least {FEWEST_IMAGES} images, {path} has {len(samples)}: give more images like "
                "those that the network will see"
            )
        samples = random.Random(0).sample(samples, len(samples))
        number = min(number, len(samples) * 3 // 4)
        preprocess = Preprocess(config | ({"input_size": size} if size else {}))
        return cls(store, preprocess, samples[:number], samples[number : number + MOST_CHECKED])

    def batches(self, samples: list[Sample], size: int = CHUNK) -> Iterator[tuple[np.ndarray, list[int | None]]]:
        """(images, their classes), `size` at a time; unreadable images are left out."""
        for start in range(0, len(samples), size):
            read = [(x, label) for name, label in samples[start : start + size] if (x := self._read(name)) is not None]
            if read:
                yield np.stack([x for x, _ in read]), [label for _, label in read]

    def _read(self, name: str) -> np.ndarray | None:
        try:
            with images.naming(name):
                data = self.store.data(name)
            return self.preprocess(images.decode(data, name)).numpy()
        except ImageError:
            return None


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
    """Write the file `source` in 8 bits as `target`, and measure both on the images that are to be checked.

    Args:
        batch: That of the file; None: any.
    """
    writer.quantise(
        source, target, (x for x, _ in sets.batches(sets.calibration, batch or 1) if len(x) == (batch or 1))
    )
    report: dict[str, Any] = {"calibration_images": len(sets.calibration)}
    report |= _compare(writer.observer(source), writer.observer(target), sets, batch)
    report["bytes"] = {"float32": _bytes(source), "int8": _bytes(target), "ratio": _bytes(target) / _bytes(source)}
    x = next(sets.batches(sets.checks, batch or 1))[0]
    report["ms"] = _latency({"float32": writer.runner(source, 1), "int8": writer.runner(target, 1)}, x)
    return report


def _bytes(path: Path) -> int:
    return sum(
        file.stat().st_size for file in path.parent.glob(f"{path.stem}.*") if file.suffix in (path.suffix, ".bin")
    )


Observer = Callable[[np.ndarray], tuple[list[np.ndarray], dict[str, np.ndarray]]]


def _compare(exact: Observer, rounded: Observer, sets: Images, batch: int | None) -> dict[str, Any]:
    """Top-1 of both, how often they agree, and how often each layer prefers the same expert."""
    same: list[bool] = []
    right: list[tuple[bool, bool]] = []
    experts: dict[str, list[bool]] = {}
    moved: dict[str, float] = {}
    for x, labels in sets.batches(sets.checks, batch or CHUNK):
        if batch and len(x) != batch:
            continue
        (logits, routing), (logits8, routing8) = exact(x), rounded(x)
        guesses = list(zip(logits[0].argmax(1).tolist(), logits8[0].argmax(1).tolist(), strict=True))
        same += [one == other for one, other in guesses]
        right += [(a == y, b == y) for (a, b), y in zip(guesses, labels, strict=True) if y is not None]
        for layer, weights in routing.items():
            experts.setdefault(layer, []).extend(weights.argmax(1) == routing8[layer].argmax(1))
            moved[layer] = max(moved.get(layer, 0.0), float(np.abs(weights - routing8[layer]).max()))
    if not same:
        raise DataError("none of the images that were to check the file could be read")
    return {
        "checked_images": len(same),
        "agreement": _percent(same),
        "top1": _top1(right),
        "routing_agreement": {layer: _percent(values) for layer, values in experts.items()},
        "routing_difference": moved,
    }


def _top1(right: list[tuple[bool, bool]]) -> dict[str, float] | None:
    if not right:
        return None
    exact, rounded = _percent([a for a, _ in right]), _percent([b for _, b in right])
    return {"float32": exact, "int8": rounded, "lost": exact - rounded}


def _percent(values: Iterable[bool]) -> float:
    return 100 * statistics.fmean(map(bool, values))


def _latency(runs: dict[str, Run], x: np.ndarray) -> dict[str, float]:
    """Medians in ms; the runs take turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(ROUNDS + 2):
        for name, run in runs.items():
            start = time.perf_counter()
            run(x)
            if round_ >= 2:
                times[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(values) for name, values in times.items()}
