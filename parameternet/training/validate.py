"""Measure a model's accuracy on labelled images, with the preprocessing of the checkpoint."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from timm.data import resolve_data_config
from torch import nn

from parameternet.data.labels import few
from parameternet.data.sources import Source, is_stream, notes_of, open_dataset
from parameternet.deprecation import moved
from parameternet.models import loading
from parameternet.training import distributed
from parameternet.training.distributed import Place
from parameternet.training.errors import DataError, DivergedError, missing_model
from parameternet.training.evaluate import evaluate
from parameternet.training.loaders import eval_loader, stop_workers, stream_loader
from parameternet.training.recipe import Recipe
from parameternet.training.report import Reporter, SkippedImages

AGREE = 0.1  # tolerance between recorded and measured top-1, in percentage points: results vary between machines

__getattr__ = moved(__name__, {"read_config": "parameternet.models.loading:read_config"})


def validate(
    model: str | Path,
    data: str | Path | dict,
    *,
    batch_size: int = 128,
    workers: int = 2,
    device: str = "auto",
    threads: int | None = None,
    amp: str | None = None,
    channels_last: bool = False,
    reporter: Reporter | None = None,
    around: Callable[[nn.Module], AbstractContextManager[Any]] = nullcontext,
) -> dict[str, Any]:
    """Measure a model on labelled images. Under torchrun, the processes split the images.

    Args:
        model: as for `parameternet.models.loading.parse_source`: a name, a run folder, a weights folder, a
            .safetensors file, `local-dir:DIR`, `hf-hub:ORG/NAME`; timm models too.
        data: as a recipe's `val`: a folder, a tar, `hfds/...`, `wds/...`.
        batch_size: images per step and process.
        workers: data loading workers per process.
        device: auto (the first accelerator, or the CPU), cpu, cuda, cuda:1 or mps.
        threads: CPU threads per process; None: torch's default.
        amp: mixed precision: None, float16 or bfloat16.
        channels_last: memory format of images and weights.
        reporter: called at each step and for unreadable images.
        around: called with the network; returns a context manager that is active during the measurement.

    Returns:
        top1, top5 (percent), top1_interval (half the width of the 95 % interval, points), loss (cross-entropy),
        images (number), unreadable (names), input_size [3, H, W], crop_pct, interpolation, parameters, seconds, device,
        threads, model, architecture, recorded (top-1 in the checkpoint for as many images, or None) and agrees (whether
        both are within 0.1 points, or None).

    Raises:
        CheckpointError, WeightsError: no such model, or damaged weights.
        DataError: no images, or classes that the model does not have.
        DivergedError: the loss is NaN or infinite.
    """
    data = str(data) if isinstance(data, Path) else data
    if threads:
        torch.set_num_threads(threads)
    with distributed.place(device) as place:
        network, config = load(model)
        reporter = reporter or Reporter()
        loader = _Loader(data, config, batch_size, workers, place, reporter)
        network = network.to(place.device)
        network = network.to(memory_format=torch.channels_last) if channels_last else network
        start = time.monotonic()
        with around(network):
            found = evaluate(network, loader, place, amp=amp, channels_last=channels_last, progress=reporter.validating)
        loader.skipped.share(place)
        stop_workers(loader.loader)
    if not found["images"]:
        raise DataError(f"no image of {data!r} could be read")
    if not math.isfinite(found["loss"]):
        raise DivergedError(
            f"the loss of {model} on {data} is {found['loss']}, so its accuracy is meaningless. Try amp=null (it was "
            f"{amp}), or other weights"
        )
    return {
        "model": str(model),
        "architecture": config["architecture"],
        **found,
        "top1_interval": interval(found["top1"], found["images"]),
        "unreadable": loader.skipped.names,
        "input_size": list(loader.config["input_size"]),
        "crop_pct": loader.config["crop_pct"],
        "interpolation": loader.config["interpolation"],
        "parameters": sum(p.numel() for p in network.parameters()),
        "seconds": time.monotonic() - start,
        "device": str(place.device),
        "threads": torch.get_num_threads(),
        **_compare(config.get("results") or {}, found),
    }


def interval(top1: float, images: int) -> float:
    """Return half the width of the 95 % confidence interval of an accuracy (percent) on `images`, in points.

    Source: E. B. Wilson, 1927. Unlike the normal approximation, it is not 0 if all or none of a few images are right.
    """
    share, z = top1 / 100, 1.96
    return 100 * z * math.sqrt(share * (1 - share) / images + (z / (2 * images)) ** 2) / (1 + z**2 / images)


def _compare(results: dict[str, Any], found: dict[str, float]) -> dict[str, Any]:
    # Results on different numbers of images are not comparable.
    same = results.get("top1") is not None and results.get("images") == found["images"]
    recorded = results["top1"] if same else None
    return {"recorded": recorded, "agrees": abs(recorded - found["top1"]) <= AGREE if same else None}


def load(model: str | Path) -> tuple[nn.Module, dict[str, Any]]:
    """Load a model of this package or of timm, and its config in timm's Hub format.

    Raises:
        CheckpointError: no such file, folder or model name.
        WeightsError: missing or damaged weights.
    """
    with missing_model():
        found = loading.load(model, dense=True)
    return found.model, found.config


class _Loader:
    """Validation batches preprocessed for a model, with the data's labels mapped to the model's."""

    def __init__(
        self, data: str | dict, config: dict[str, Any], batch_size: int, workers: int, place: Place, reporter: Reporter
    ):
        self.skipped = SkippedImages(reporter)
        self.config = resolve_data_config(pretrained_cfg=config["pretrained_cfg"], use_test_size=True)
        dataset = open_dataset(data, "validation", batch_size=batch_size)
        source = Source(dataset, str(data))
        for note in notes_of(dataset) if place.first else []:
            reporter.note(f"{data}: {note}")
        self.labels = translation(source.classes, config, place)
        if is_stream(data):
            recipe = Recipe(workers=workers)
            self.loader = stream_loader(dataset, recipe, batch_size, place.device, False, self.config)
        else:
            self.loader = eval_loader(source, self.config, batch_size, workers, place, self.skipped.add)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Any:
        for images, labels in self.loader:
            yield images, labels if self.labels is None else self.labels[labels]


def _names(config: dict[str, Any]) -> list[str]:
    names = config.get("label_names") or config["pretrained_cfg"].get("label_names") or []
    return list(names.values() if isinstance(names, dict) else names)


def translation(classes: list[str] | None, config: dict[str, Any], place: Place) -> torch.Tensor | None:
    """Return a lookup table from the data's labels to the model's; None if they are the same.

    The data may have only some of the model's classes.

    Raises:
        DataError: the model does not have one of the classes.
    """
    names = _names(config)
    if classes is None or classes == names:
        return None
    outputs = config.get("num_classes") or config["pretrained_cfg"]["num_classes"]
    if not names and len(classes) == outputs:
        return None
    unknown = [name for name in classes if name not in names]
    if unknown:
        raise DataError(
            f"the model's {outputs} classes do not include {few(unknown)} of the data's {len(classes)}: use data with "
            "the classes that the model was trained on"
        )
    return torch.tensor([names.index(name) for name in classes], device=place.device)
