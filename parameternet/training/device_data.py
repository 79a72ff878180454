"""Keep images on the training device (`cache: device`): decode them once, and augment whole batches there.

A fast device never waits for data, because nothing is read, decoded or copied during training. Augmentation depends on
(seed, epoch, index) alone, so runs resume exactly, for any number of processes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from timm.data.loader import PrefetchLoader
from torch import Tensor

from parameternet.data.sources import Source, Unreadable
from parameternet.training.batches import TrainBatches
from parameternet.training.errors import DataError, RecipeError
from parameternet.training.loaders import Report, stop_workers
from parameternet.training.randomness import IMAGE, mix
from parameternet.training.recipe import Recipe
from parameternet.training.sources import decoded, free_memory

_TRIES = 10  # attempts at a crop that fits, as in torchvision's RandomResizedCrop
_SAMPLED = ("nearest", "bilinear", "bicubic")  # interpolations of torch's grid_sample
_MIB = 1 << 20


class DevicePixels:
    """All images of a source as uint8 on a device.

    Args:
        source: read once, in order.
        side: images are resized (bicubic) and center-cropped to this square; None if all have the same size.
        report: called for each unreadable image.

    Attributes:
        pixels: (N, 3, H, W), on the device.
        labels: (N,), on the device.
        readable: (N,), on the CPU.
        digest: SHA-256 of pixels and labels.

    Raises:
        DataError: images of several sizes without `side`, too little memory, or no readable image.
    """

    def __init__(self, source: Source, side: int | None, device: torch.device, report: Report):
        self.source, self.side, self.device = source, side, device
        self.pixels: Tensor | None = None
        self.labels = torch.zeros(len(source), dtype=torch.int64)
        self.readable = torch.zeros(len(source), dtype=torch.bool)
        hashed = hashlib.sha256()
        for start, found in decoded(source):
            good = [(start + i, *item) for i, item in enumerate(found) if not isinstance(item, Unreadable)]
            for item in found:
                if isinstance(item, Unreadable):
                    report(item)
            if good:
                self._store(*zip(*good, strict=True), hashed)
        if self.pixels is None:
            raise DataError(f"no image of {source.where} could be read")
        hashed.update(self.labels.numpy().tobytes() + self.readable.numpy().tobytes())
        self.digest = hashed.hexdigest()
        self.labels = self.labels.to(device)

    def _store(
        self, indices: tuple[int, ...], images: tuple[Image.Image, ...], labels: tuple[int, ...], hashed: Any
    ) -> None:
        images = [image if self.side is None else _square(image, self.side) for image in images]
        if self.pixels is None:
            self.pixels = self._room(images[0].size)
        size = self.pixels.shape[-1], self.pixels.shape[-2]
        if other := next((image.size for image in images if image.size != size), None):
            raise DataError(
                f"cache: device needs images of the same size, but {self.source.where} has {size[0]} x {size[1]} and "
                f"{other[0]} x {other[1]}: set cache_size to resize and crop them"
            )
        rows = torch.stack([_bytes(image) for image in images])
        hashed.update(rows.numpy())
        self.pixels[torch.tensor(indices, device=self.device)] = rows.to(self.device)
        self.labels[list(indices)] = torch.tensor(labels)
        self.readable[list(indices)] = True

    def _room(self, size: tuple[int, int]) -> Tensor:
        shape = (len(self.source), 3, size[1], size[0])
        needed, free = math.prod(shape), free_memory(self.device)
        if free is not None and needed > free:
            raise DataError(
                f"cache: device needs {needed // _MIB:,} MiB for {self.source.where}, and {self.device} has "
                f"{free // _MIB:,} MiB free: lower cache_size, or set cache=none"
            )
        return torch.empty(shape, dtype=torch.uint8, device=self.device)


def _square(image: Image.Image, side: int) -> Image.Image:
    return ImageOps.fit(image, (side, side), Image.Resampling.BICUBIC)


def _bytes(image: Image.Image) -> Tensor:
    rows = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return rows.view(image.height, image.width, 3).permute(2, 0, 1)


class DeviceBatches:
    """Training batches of `DevicePixels`: float32 images (B, 3, S, S), normalised, and their targets.

    Unreadable images are left out of their batch.

    Args:
        batches: samples the keys of each batch.
        targets: one row per image, by index; None for the int64 labels (B,).
    """

    def __init__(self, data: DevicePixels, batches: TrainBatches, augment: Augment, targets: Any = None):
        self.data, self.batches, self.augment = data, batches, augment
        self.targets = data.labels if targets is None else targets

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        data = self.data
        for keys in self.batches:
            index = torch.tensor([key.index for key in keys])
            index = index[data.readable[index]].to(data.device)
            images = self.augment(data.pixels[index], index, keys[0].epoch, keys[0].size)
            yield images, self.targets[index]


class Augment:
    """Apply timm's training transform to a whole batch: crop, flips, color jitter, normalisation.

    Crops are interpolated from the cached images; jitter changes brightness, contrast and saturation, in this order.

    Args:
        r: a recipe with `cache: device`.
        images: number of images in the dataset.

    Raises:
        RecipeError: the recipe has a transform that only works on single images (auto_augment, other crops).
    """

    def __init__(self, r: Recipe, images: int, device: torch.device):
        alone = {
            "auto_augment": None if r.no_aug else r.auto_augment,
            "crop_mode": None if r.no_aug or r.crop_mode == "rrc" else r.crop_mode,
            "interpolation": None if r.interpolation in _SAMPLED else r.interpolation,
        }
        if asked := {name: value for name, value in alone.items() if value}:
            raise RecipeError(f"cache: device does not support {asked}: use cache=ram, or remove it")
        self.r, self.images, self.device = r, images, device
        self.mean = 255 * torch.tensor(r.mean, device=device)[:, None, None]
        self.std = 255 * torch.tensor(r.std, device=device)[:, None, None]
        self.epoch = -1

    def __call__(self, pixels: Tensor, index: Tensor, epoch: int, side: int) -> Tensor:
        """Augment uint8 pixels (B, 3, H, W) of the images `index` (B,) into float32 (B, 3, side, side)."""
        if epoch != self.epoch:
            self.epoch, self.draws = epoch, self._draw(epoch)
        draws = self.draws[index]
        boxes = self._boxes(draws[:, : 2 * _TRIES + 2], *pixels.shape[-2:])
        chances = [0.0, 0.0] if self.r.no_aug else [self.r.hflip, self.r.vflip]
        flips = 1 - 2 * (draws[:, -5:-3] < torch.tensor(chances, device=self.device)).float()
        images = sample(pixels.float(), boxes, flips, side, self.r.interpolation)
        if self.r.color_jitter and not self.r.no_aug:
            images = jitter(images, 1 + self.r.color_jitter * (2 * draws[:, -3:] - 1))
        return (images - self.mean) / self.std

    def _draw(self, epoch: int) -> Tensor:
        """Draw random numbers from 0 to 1 for every image: areas and shapes of crops, position, flips, colors."""
        generator = torch.Generator().manual_seed(mix(IMAGE, self.r.seed, epoch))
        return torch.rand(self.images, 2 * _TRIES + 7, generator=generator).to(self.device)

    def _boxes(self, draws: Tensor, height: int, width: int) -> Tensor:
        """Return crops (B, 4): left, top, width, height in pixels."""
        r = self.r
        if r.no_aug:
            side = min(height, width)
            return torch.tensor([(width - side) / 2, (height - side) / 2, side, side], device=self.device).repeat(
                len(draws), 1
            )
        return random_boxes(draws, height, width, r.scale, r.ratio)


def random_boxes(draws: Tensor, height: int, width: int, scale: list[float], ratio: list[float]) -> Tensor:
    """Compute crops (B, 4) like torchvision's RandomResizedCrop: left, top, width, height in pixels.

    Args:
        draws: random numbers from 0 to 1, (B, 2 * tries + 2). If no crop fits, the largest centered crop is used.
        scale, ratio: ranges of the area fraction and of the aspect ratio.
    """
    tries, place = draws[:, :-2].unflatten(1, (_TRIES, 2)), draws[:, -2:]
    low, high = math.log(ratio[0]), math.log(ratio[1])
    area = height * width * (scale[0] + (scale[1] - scale[0]) * tries[..., 0])
    aspect = torch.exp(low + (high - low) * tries[..., 1])
    widths, heights = (area * aspect).sqrt(), (area / aspect).sqrt()
    fits = (widths <= width) & (heights <= height)
    first = fits.int().argmax(1, keepdim=True)
    found = torch.cat([widths.gather(1, first), heights.gather(1, first)], 1)
    shape = min(max(width / height, ratio[0]), ratio[1])
    largest = found.new_tensor([min(width, height * shape), min(height, width / shape)])
    sizes = torch.where(fits.any(1, keepdim=True), found, largest)
    place = torch.where(fits.any(1, keepdim=True), place, 0.5)
    return torch.cat([place * (place.new_tensor([width, height]) - sizes), sizes], 1)


def sample(images: Tensor, boxes: Tensor, flips: Tensor, side: int, interpolation: str) -> Tensor:
    """Crop, flip and resize images (B, 3, H, W) to (B, 3, side, side).

    Args:
        boxes: (B, 4), left, top, width, height.
        flips: (B, 2), 1 or -1 for x and y.
    """
    if not len(images):  # every image is unreadable, and grid_sample rejects an empty batch
        return images.new_empty(0, 3, side, side)
    whole = boxes.new_tensor([images.shape[-1], images.shape[-2]])
    extent = boxes[:, 2:] / whole
    middle = (2 * boxes[:, :2] + boxes[:, 2:]) / whole - 1
    theta = torch.cat([torch.diag_embed(extent * flips), middle[..., None]], 2)
    grid = F.affine_grid(theta, [len(images), 3, side, side], align_corners=False)
    return F.grid_sample(images, grid, interpolation, "border", align_corners=False).clamp(0, 255)


def jitter(images: Tensor, factors: Tensor) -> Tensor:
    """Change brightness, contrast and saturation of images (B, 3, H, W) by factors (B, 3)."""
    brightness, contrast, saturation = (factors[:, i, None, None, None] for i in range(3))
    images = (images * brightness).clamp(0, 255)
    mean = _grey(images).mean((2, 3), keepdim=True)
    images = torch.lerp(mean, images, contrast).clamp(0, 255)
    return torch.lerp(_grey(images), images, saturation).clamp(0, 255)


def _grey(images: Tensor) -> Tensor:
    weights = images.new_tensor([0.299, 0.587, 0.114])  # ITU-R 601, as in Pillow
    return (images * weights[:, None, None]).sum(1, keepdim=True)


class Kept:
    """Keep a loader's batches on the device, as uint8, after reading them once."""

    def __init__(self, loader: PrefetchLoader, device: torch.device):
        self.loader, self.device = loader, device
        self.batches: list[tuple[Tensor, Tensor]] | None = None

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self.batches is None:
            self.batches = [(images.to(self.device), labels.to(self.device)) for images, labels in self.loader.loader]
            stop_workers(self.loader)
        mean, std = (getattr(self.loader, name).to(self.device) for name in ("mean", "std"))
        for images, labels in self.batches:
            yield images.float().sub_(mean).div_(std), labels
