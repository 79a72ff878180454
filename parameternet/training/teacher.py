"""What a teacher says of the training images: asked once, before the first step, then mixed into the labels.

A network learns more from how alike classes look to one that knows them than from labels alone (distillation,
arXiv:1503.02531). The teacher sees whole images, the student crops of them.
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
    """The teacher's probabilities for every image of `data`, float16 (N, classes) on its device.

    They are kept in the run folder, so that a run that resumes does not ask again. They are taken from there only for
    the same pixels and labels and, where its file still exists, the same teacher.

    Args:
        r: a recipe with a `teacher`.
        classes: what the data calls its classes, in the order of the labels.
        progress: told (batches done, batches) of this process's share.

    Raises:
        CheckpointError, WeightsError: no such teacher, or damaged, or it answers with NaN.
        DataError: a teacher that does not know the classes.
    """
    path, asked = folder / ANSWERS, _question(r, data, classes)
    if path.is_file() and asked.items() <= weights.metadata(path).items():
        return weights.read(path)["probabilities"].to(data.device)
    found = place.sum(_ask(r, data, classes, place, progress).float()).half()
    if not torch.isfinite(found).all():
        raise CheckpointError(
            f"teacher: {r.teacher} answers some images with NaN or infinity: its weights are unusable, or amp "
            f"({r.amp}) is too narrow for it"
        )
    if place.first:
        folder.mkdir(parents=True, exist_ok=True)
        weights.save({"probabilities": found}, path, asked)
    return found.to(data.device)


def _question(r: Recipe, data: DevicePixels, classes: list[str] | None) -> dict[str, str]:
    """All that the answers depend on, by content."""
    asked = {"teacher": str(r.teacher), "size": str(r.teacher_size), "images": data.digest}
    asked["classes"] = json.dumps(classes)
    if digest := _digest(str(r.teacher)):
        asked["teacher_sha256"] = digest
    return asked


def _digest(teacher: str) -> str | None:
    """SHA-256 of a teacher's weights and config; None where they are gone, or known by their name alone."""
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
    """This process's share of the images; the others' rows are zero."""
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
    """The same answers sooner: normalisation folded in, and what was upcycled and never trained on dense again."""
    if any(isinstance(module, DynamicConv) for module in network.modules()):
        network, _ = collapse(network, [images], inplace=True)
    return fuse(network)


class _Preparation:
    """Bytes (B, 3, H, W) as the teacher's config wants them, at `teacher_size`."""

    def __init__(self, r: Recipe, config: dict, device: torch.device):
        found = resolve_data_config(pretrained_cfg=config["pretrained_cfg"], use_test_size=True)
        self.size = (r.teacher_size,) * 2 if r.teacher_size else tuple(found["input_size"][1:])
        self.mean, self.std = (torch.tensor(found[name], device=device)[:, None, None] for name in ("mean", "std"))
        self.format = torch.channels_last if r.channels_last else torch.contiguous_format

    def __call__(self, pixels: Tensor) -> Tensor:
        images = F.interpolate(pixels.float(), self.size, mode="bicubic", antialias=True).clamp(0, 255) / 255
        return ((images - self.mean) / self.std).contiguous(memory_format=self.format)


class Targets:
    """What a batch is taught. Without a teacher its labels (B,), with one the mixture of both (B, classes).

    Args:
        labels: of all images, (N,).
        answers: the teacher's probabilities, (N, classes).
        share: of the teacher's answers in the mixture; the labels have the rest.
        smoothing: of the labels.
    """

    def __init__(self, labels: Tensor, answers: Tensor, share: float, smoothing: float):
        self.labels, self.answers, self.share, self.smoothing = labels, answers, share, smoothing

    def __getitem__(self, index: Tensor) -> Tensor:
        answers = self.answers[index].float()
        labels = F.one_hot(self.labels[index], answers.shape[1]).float()
        labels = labels * (1 - self.smoothing) + self.smoothing / answers.shape[1]
        return torch.lerp(labels, answers, self.share)
