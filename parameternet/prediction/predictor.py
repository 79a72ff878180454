"""Classify images with the transform and class names of the checkpoint's config.

>>> predictor = Predictor()
>>> predictor.predict("cat.jpg")[0].labels[0]
'tabby'
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from torch import Tensor, nn

from parameternet.data import images, sources
from parameternet.data.errors import ImageError
from parameternet.distributed import choose_device
from parameternet.models import loading

__all__ = ["DEFAULT_MODEL", "ImageLike", "Predictor", "Preprocess", "Result", "load"]

DEFAULT_MODEL = "dynamic_efficientnet_lite0.in1k_upcycled"
MAX_DOWNLOAD = 64 << 20  # bytes: more than any photo, but limits an endless response
THUMBNAIL = 480  # pixels of the longer side of images that are kept for drawing
ImageLike = str | Path | Image.Image


@dataclass(frozen=True)
class Result:
    """Classes of an image, most probable first, or the `error` that kept it from being read.

    `path` is the image as given, `indices` are class indices, `probabilities` are between 0 and 1.
    """

    path: str
    labels: list[str] = field(default_factory=list)
    probabilities: list[float] = field(default_factory=list)
    indices: list[int] = field(default_factory=list)
    error: str | None = None
    image: Image.Image | None = field(default=None, repr=False, compare=False)


# ---------------------------------------------------------------------------------------------------------------------
# The network
# ---------------------------------------------------------------------------------------------------------------------


def load(model: str | Path | None = None) -> nn.Module:
    """Load a network with verified weights, in evaluation mode; `pretrained_cfg` has preprocessing and class names.

    Args:
        model: As for `parameternet.models.loading.parse_source`, of this package. None: the default checkpoint.

    Raises:
        WeightsError: no such weights, or not the right ones.
        ValueError: the network is not one of this package.
    """
    return loading.load(model or DEFAULT_MODEL).model


def class_names(cfg: dict[str, Any], num_classes: int) -> list[str]:
    """Return a name for each class: from the config if it has names, otherwise `class 7`.

    Raises:
        ValueError: the number of names differs from the number of classes.
    """
    names = list(cfg.get("label_names") or [])
    if not names:
        return [f"class {index}" for index in range(num_classes)]
    if len(names) != num_classes:
        raise ValueError(f"the config names {len(names)} classes, but the network has {num_classes}: they must agree")
    words = cfg.get("label_descriptions") or {}
    return [words.get(name, name) for name in names]


class Preprocess:
    """Turn an image into the network's input (C, H, W); holds no network, so that workers can copy it."""

    def __init__(self, data_config: dict[str, Any]) -> None:
        self.gray = data_config["input_size"][0] == 1
        self.transform = timm.data.create_transform(**data_config, is_training=False)

    def __call__(self, image: Image.Image) -> Tensor:
        return self.transform(image.convert("L") if self.gray else image)


class Predictor:
    """Classify images.

    Args:
        model: As for `load`, or a network that has a `pretrained_cfg`.
        device: auto, cpu, cuda, cuda:1 or mps. None is auto: the first accelerator, or the CPU.

    Raises:
        ValueError: there is no such device.
        WeightsError: no such weights, or not the right ones.
    """

    def __init__(self, model: str | Path | nn.Module | None = None, device: str | torch.device | None = None) -> None:
        self.device = choose_device(device)
        network = model if isinstance(model, nn.Module) else load(model)
        self.model = network.eval().to(self.device)
        cfg = self.model.pretrained_cfg
        self.name = ".".join(filter(None, (cfg.get("architecture"), cfg.get("tag"))))
        # A network in memory may have a new classifier and still the config of the old one.
        renewed = isinstance(model, nn.Module) and len(cfg.get("label_names") or []) != self.model.num_classes
        self.labels = class_names({} if renewed else cfg, self.model.num_classes)
        self.data_config = timm.data.resolve_data_config(pretrained_cfg=cfg, use_test_size=True)
        self.preprocess = Preprocess(self.data_config)
        self.transform = self.preprocess.transform

    def predict(
        self,
        images: ImageLike | Iterable[ImageLike],
        topk: int = 5,
        batch_size: int = 16,
        keep_images: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Result]:
        """Return the `topk` most probable classes of each image. An unreadable image gets a result with an `error`.

        Args:
            images: Files, folders (searched recursively), http(s) URLs, PIL images; one or several.
            topk: Number of classes; all if there are fewer.
            batch_size: Images per forward pass.
            keep_images: Keep a small copy of each image in its result, for `draw`.
            progress: Called with (images done, images) after each forward pass.
        """
        if topk < 1:
            raise ValueError(f"topk must be at least 1, got {topk}")
        given = [images] if isinstance(images, ImageLike) else list(images)
        results: list[Result] = []
        sources = [source for item in given for source in expand(item)]
        for start in range(0, len(sources), batch_size):
            results += self._batch(sources[start : start + batch_size], topk, keep_images)
            if progress:
                progress(len(results), len(sources))
        return results

    def _batch(self, sources: Sequence[ImageLike], topk: int, keep_images: bool) -> list[Result]:
        read = [_try_to_read(source) for source in sources]
        readable = [image for image, _ in read if image is not None]
        answers = iter(self.classify(torch.stack([*map(self.preprocess, readable)]), topk) if readable else [])
        results = []
        for source, (image, error) in zip(sources, read, strict=True):
            words = _describe(source)
            if image is None:
                results.append(Result(words, error=error))
                continue
            probabilities, indices = next(answers)
            labels = [self.labels[index] for index in indices]
            results.append(Result(words, labels, probabilities, indices, image=_small(image) if keep_images else None))
        return results

    @torch.inference_mode()
    def classify(self, batch: Tensor, topk: int = 5) -> list[tuple[list[float], list[int]]]:
        """Return probabilities and indices of the `topk` most probable classes of each preprocessed image (C, H, W)."""
        probabilities = self.model(batch.to(self.device, non_blocking=True)).float().softmax(-1)
        top = probabilities.topk(min(topk, probabilities.shape[1]))
        return list(zip(top.values.tolist(), top.indices.tolist(), strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Images
# ---------------------------------------------------------------------------------------------------------------------


def expand(item: ImageLike) -> list[ImageLike]:
    """Return the images of a folder, sorted, or `item` itself if it is not a folder."""
    if isinstance(item, Image.Image) or not Path(item).is_dir():
        return [item]
    names = sources.Folder(Path(item)).names
    return sorted(Path(item, name) for name in names if images.is_image_name(name)) or [item]


def read_image(source: ImageLike) -> Image.Image:
    """Read an image like `parameternet.data.images`: upright, transparency on white, RGB.

    Raises:
        ImageError: it cannot be fetched, opened or decoded.
    """
    if isinstance(source, Image.Image):
        return images.as_seen(source, _describe(source))
    name = str(source)
    scheme, separator, _ = name.partition("://")
    if separator and not Path(source).exists():
        if scheme.lower() not in ("http", "https"):
            raise ImageError(name, f"only http and https addresses are fetched, not {scheme}")
        return images.decode(_fetch(name), name)
    if Path(source).is_dir():
        raise ImageError(name, f"no images in this folder ({' '.join(images.COMMON)} ...)")
    return images.read(Path(source).expanduser(), name)


def _try_to_read(source: ImageLike) -> tuple[Image.Image | None, str | None]:
    try:
        return read_image(source), None
    except ImageError as error:
        return None, error.reason


def _fetch(address: str) -> bytes:
    import urllib.error
    import urllib.request

    request = urllib.request.Request(address, headers={"User-Agent": "parameternet"})
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            data = answer.read(MAX_DOWNLOAD + 1)
    except urllib.error.HTTPError as error:
        raise ImageError(address, f"the server answered {error.code} {error.reason}") from error
    except OSError as error:  # no network, no such host, too slow
        reason = getattr(error, "reason", error)
        raise ImageError(address, f"no answer from there ({reason}); download it yourself and give the file") from error
    if len(data) > MAX_DOWNLOAD:
        raise ImageError(address, f"larger than {MAX_DOWNLOAD >> 20} MiB")
    return data


def _small(image: Image.Image) -> Image.Image:
    copy = image.copy()
    copy.thumbnail((THUMBNAIL, THUMBNAIL))
    return copy


def _describe(source: ImageLike) -> str:
    if isinstance(source, Image.Image):
        return getattr(source, "filename", "") or f"image of {source.width} x {source.height}"
    return str(source)
