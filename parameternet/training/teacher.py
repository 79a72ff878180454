"""Distillation (arXiv:1503.02531): compute a teacher's predictions once and mix them into the labels.

The teacher sees whole images; the student sees crops of them.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from timm.data import resolve_data_config
from torch import Tensor, nn

from parameternet import weights
from parameternet.layers import DynamicConv
from parameternet.models import loading
from parameternet.surgery import collapse, fuse
from parameternet.training.device_data import DevicePixels
from parameternet.training.distributed import Place
from parameternet.training.errors import CheckpointError, missing_model
from parameternet.training.evaluate import autocast
from parameternet.training.recipe import Recipe
from parameternet.training.validate import load, translation

ANSWERS = "teacher.safetensors"
_BATCH = 100
Progress = Callable[[int, int], None]


def answers(
    r: Recipe, data: DevicePixels, classes: list[str] | None, folder: Path, place: Place, progress: Progress
) -> Tensor:
    """Return the teacher's probabilities for every image of `data`, float16 (N, classes) on its device.

    They are saved in the run folder. A resumed run reuses them if pixels, labels and teacher are unchanged; it no
    longer needs the teacher itself.

    Args:
        r: a recipe with a `teacher`.
        classes: names of the data's classes, in the order of the labels.
        folder: the run folder.
        progress: called with (batches done, batches) of this process.

    Raises:
        CheckpointError, WeightsError: no such teacher, damaged weights, or NaN in its predictions.
        DataError: the teacher does not have all of the classes.
    """
    path, asked = folder / ANSWERS, _question(r, data, classes)
    if path.is_file() and asked.items() <= weights.metadata(path).items():
        return weights.read(path)["probabilities"].to(data.device)
    found = place.sum(_ask(r, data, classes, place, progress).float()).half()
    if not torch.isfinite(found).all():
        raise CheckpointError(
            f"teacher: {r.teacher} predicts NaN or infinity for some images: its weights are unusable, or amp={r.amp} "
            "overflows; try amp=null"
        )
    if place.first:
        folder.mkdir(parents=True, exist_ok=True)
        weights.save({"probabilities": found}, path, asked)
    return found.to(data.device)


def _question(r: Recipe, data: DevicePixels, classes: list[str] | None) -> dict[str, str]:
    """Return digests of everything that the predictions depend on."""
    asked = {"teacher": str(r.teacher), "size": str(r.teacher_size), "images": data.digest}
    asked["classes"] = json.dumps(classes)
    if digest := _digest(str(r.teacher)):
        asked["teacher_sha256"] = digest
    return asked


def _digest(teacher: str) -> str | None:
    """Return the SHA-256 of a teacher's weights and config; None if they are gone or not local files."""
    try:
        source = loading.parse_source(teacher)
    except weights.WeightsError:
        return None
    if source.name in weights.known():
        return " ".join(weights.digests(source.name))
    if source.path is None:
        return None
    found = hashlib.sha256(source.path.read_bytes())
    if (config := source.path.with_name(weights.CONFIG_NAME)).is_file():
        found.update(config.read_bytes())
    return found.hexdigest()


@torch.inference_mode()
def _ask(r: Recipe, data: DevicePixels, classes: list[str] | None, place: Place, progress: Progress) -> Tensor:
    """Predict this process's share of the images; other rows are zero."""
    with missing_model("teacher"):
        network, config = load(r.teacher)
    columns = translation(classes, config, place)
    prepare = _Preparation(r, config, data.device)
    network = network.eval().to(data.device, memory_format=prepare.format)
    found = torch.zeros(len(data.labels), network.num_classes if columns is None else len(columns), dtype=torch.float16)
    mine = torch.nonzero(data.readable)[place.rank :: place.world, 0]
    for start in range(0, len(mine), _BATCH):
        index = mine[start : start + _BATCH]
        images = prepare(data.pixels[index.to(data.device)])
        network = network if start else _plain(network, images).to(memory_format=prepare.format)
        with autocast(data.device, r.amp):
            logits = network(images)
        logits = logits.float() if columns is None else logits.float()[:, columns]
        found[index] = logits.softmax(1).half().cpu()
        progress(start // _BATCH + 1, math.ceil(len(mine) / _BATCH))
    return found


def _plain(network: nn.Module, images: Tensor) -> nn.Module:
    """Return a faster network with the same predictions: batch norm folded, untrained dynamic layers collapsed."""
    if any(isinstance(module, DynamicConv) for module in network.modules()):
        network, _ = collapse(network, [images], inplace=True)
    return fuse(network)


class _Preparation:
    """Preprocess uint8 images (B, 3, H, W) for the teacher, at `teacher_size`."""

    def __init__(self, r: Recipe, config: dict, device: torch.device):
        found = resolve_data_config(pretrained_cfg=config["pretrained_cfg"], use_test_size=True)
        self.size = (r.teacher_size,) * 2 if r.teacher_size else tuple(found["input_size"][1:])
        self.mean, self.std = (torch.tensor(found[name], device=device)[:, None, None] for name in ("mean", "std"))
        self.format = torch.channels_last if r.channels_last else torch.contiguous_format

    def __call__(self, pixels: Tensor) -> Tensor:
        images = F.interpolate(pixels.float(), self.size, mode="bicubic", antialias=True).clamp(0, 255) / 255
        return ((images - self.mean) / self.std).contiguous(memory_format=self.format)


class Targets:
    """Soft targets (B, classes) of a batch: the labels mixed with the teacher's predictions.

    Args:
        labels: labels of all images, (N,).
        answers: the teacher's probabilities, (N, classes).
        share: weight of the teacher; the labels get the rest.
        smoothing: label smoothing.
    """

    def __init__(self, labels: Tensor, answers: Tensor, share: float, smoothing: float):
        self.labels, self.answers, self.share, self.smoothing = labels, answers, share, smoothing

    def __getitem__(self, index: Tensor) -> Tensor:
        answers = self.answers[index].float()
        labels = F.one_hot(self.labels[index], answers.shape[1]).float()
        labels = labels * (1 - self.smoothing) + self.smoothing / answers.shape[1]
        return torch.lerp(labels, answers, self.share)
