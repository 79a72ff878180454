"""Photo -> timm's transform -> network -> class names, all by one config: the checkpoint's own.

>>> predictor = Predictor()
>>> predictor.predict("cat.jpg")[0].labels[0]
'tabby'
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import nn

from parameternet.data import images, sources
from parameternet.data.errors import ImageError
from parameternet.models import loading
from parameternet.text import printable

__all__ = ["DEFAULT_MODEL", "Predictor", "Result", "draw", "load"]

DEFAULT_MODEL = "dynamic_efficientnet_lite0.in1k_upcycled"
MAX_DOWNLOAD = 64 << 20  # bytes; a photo is smaller, an endless answer is not
ImageLike = str | Path | Image.Image


@dataclass(frozen=True)
class Result:
    """What a network says about one image, most probable first; or why it says nothing.

    `path` is the image as it was given, `indices` the classes' numbers, `probabilities` are between 0 and 1.
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
    """A network with verified weights, in evaluation mode; its `pretrained_cfg` holds preprocessing and class names.

    Args:
        model: As for `parameternet.models.loading.parse_source`, of this package. None: the default checkpoint.

    Raises:
        WeightsError: no such weights, or not the right ones.
        ValueError: weights of a network that is not of this package.
    """
    return loading.load(model or DEFAULT_MODEL).model


def class_names(cfg: dict[str, Any], num_classes: int) -> list[str]:
    """One name a class, in words where the config has them; `class 7` where it has none.

    Raises:
        ValueError: there are names, but not one for each class.
    """
    names = list(cfg.get("label_names") or [])
    if not names:
        return [f"class {index}" for index in range(num_classes)]
    if len(names) != num_classes:
        raise ValueError(f"the config names {len(names)} classes, but the network has {num_classes}: they must agree")
    words = cfg.get("label_descriptions") or {}
    return [words.get(name, name) for name in names]


class Predictor:
    """Names what is on images.

    Args:
        model: As for `load`, or a network that has a `pretrained_cfg`.
        device: Where to compute; None: the first CUDA device if there is one, else the CPU.

    Raises:
        WeightsError: no such weights, or not the right ones.
    """

    def __init__(self, model: str | Path | nn.Module | None = None, device: str | torch.device | None = None) -> None:
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        network = model if isinstance(model, nn.Module) else load(model)
        self.model = network.eval().to(self.device)
        cfg = self.model.pretrained_cfg
        self.name = ".".join(filter(None, (cfg.get("architecture"), cfg.get("tag"))))
        self.labels = class_names(cfg, self.model.num_classes)
        self.data_config = timm.data.resolve_data_config(pretrained_cfg=cfg, use_test_size=True)
        self.transform = timm.data.create_transform(**self.data_config, is_training=False)

    def predict(
        self, images: ImageLike | Iterable[ImageLike], topk: int = 5, batch_size: int = 16, keep_images: bool = False
    ) -> list[Result]:
        """The `topk` most probable classes of each image; an image that cannot be read gets a result with an error.

        Args:
            images: Files, folders (searched to the bottom), http(s) addresses, PIL images; one or several.
            topk: Classes to name; all if there are fewer.
            batch_size: Images that go through the network at once.
            keep_images: Keep a small copy of each image on its result, for `draw`.
        """
        if topk < 1:
            raise ValueError(f"topk must be at least 1, got {topk}")
        given = [images] if isinstance(images, ImageLike) else list(images)
        results: list[Result] = []
        sources = [source for item in given for source in expand(item)]
        for start in range(0, len(sources), batch_size):
            results += self._batch(sources[start : start + batch_size], topk, keep_images)
        return results

    def _batch(self, sources: Sequence[ImageLike], topk: int, keep_images: bool) -> list[Result]:
        read = [_try_to_read(source) for source in sources]
        pictures = [image for image, _ in read if image is not None]
        answers = iter(self._classify(pictures, topk) if pictures else [])
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
    def _classify(self, pictures: Sequence[Image.Image], topk: int) -> list[tuple[list[float], list[int]]]:
        gray = self.data_config["input_size"][0] == 1
        batch = torch.stack([self.transform(image.convert("L") if gray else image) for image in pictures])
        probabilities = self.model(batch.to(self.device)).float().softmax(-1)
        top = probabilities.topk(min(topk, probabilities.shape[1]))
        return list(zip(top.values.tolist(), top.indices.tolist(), strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Images
# ---------------------------------------------------------------------------------------------------------------------


def expand(item: ImageLike) -> list[ImageLike]:
    """The images that `item` stands for: those of a folder, sorted; itself if it is anything else."""
    if isinstance(item, Image.Image) or not Path(item).is_dir():
        return [item]
    names = sources.Folder(Path(item)).names
    return sorted(Path(item, name) for name in names if images.is_image_name(name)) or [item]


def read_image(source: ImageLike) -> Image.Image:
    """Read an image as `parameternet.data.images` does: upright, transparency on white, RGB.

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
    copy.thumbnail((SCALE * PHOTO, SCALE * PHOTO))
    return copy


def _describe(source: ImageLike) -> str:
    if isinstance(source, Image.Image):
        return getattr(source, "filename", "") or f"image of {source.width} x {source.height}"
    return str(source)


# ---------------------------------------------------------------------------------------------------------------------
# The picture of a result
# ---------------------------------------------------------------------------------------------------------------------

PAPER, INK, FAINT, TRACK = "#ffffff", "#1b1f24", "#6b7280", "#eef1f5"
FIRST_BAR, BAR, FAULT = "#2563eb", "#a5bff7", "#b42318"
SCALE = 2  # drawn at twice the size that it is meant to be seen at, as screens are dense
MARGIN, PHOTO, TEXT, BARS, ROW = 28, 240, 200, 240, 28


def draw(results: Sequence[Result], title: str = "", limit: int = 30) -> Image.Image:
    """A picture of `results`: each image with its classes as bars. Needs results made with `keep_images=True`.

    Args:
        results: As `Predictor.predict` gives them.
        title: A line above, such as the network's name.
        limit: Images shown; the last line says how many were left out.
    """
    shown, rest = results[:limit], len(results) - limit
    top = MARGIN + (ROW + 8 if title else 0)
    heights = [_card_height(result) for result in shown]
    height = top + sum(heights) + MARGIN * len(heights) + (ROW if rest > 0 else 0)
    page = _Page(3 * MARGIN + PHOTO + TEXT + BARS + 64, height)
    if title:
        page.text(MARGIN, MARGIN - 6, title, FAINT, 15)
    for result, card in zip(shown, heights, strict=True):
        _draw_card(page, result, top)
        top += card + MARGIN
    if rest > 0:
        page.text(MARGIN, top - 8, f"... and {rest} more", FAINT, 15)
    return page.image


def _card_height(result: Result) -> int:
    beside = ROW * (1 + max(1, len(result.labels)))
    return max(_photo_size(result)[1], beside)


def _photo_size(result: Result) -> tuple[int, int]:
    if result.image is None:
        return PHOTO, 2 * ROW
    width, height = result.image.size
    ratio = min(PHOTO / width, PHOTO / height)
    return max(1, round(width * ratio)), max(1, round(height * ratio))


def _draw_card(page: "_Page", result: Result, top: int) -> None:
    width, height = _photo_size(result)
    left = 2 * MARGIN + PHOTO
    if result.image is None:
        page.box(MARGIN, top, width, height, TRACK)
    else:
        page.photo(result.image, MARGIN + (PHOTO - width) // 2, top, width, height)
    page.text(left, top, _short_path(result.path), FAINT, 13, width=TEXT + BARS + 64)
    if result.error:
        page.text(left, top + ROW, result.error, FAULT, 15, width=TEXT + BARS + 64)
    for line, (label, probability) in enumerate(zip(result.labels, result.probabilities, strict=True), start=1):
        y = top + line * ROW
        page.text(left, y, label, INK, 15, width=TEXT - 14)
        page.box(left + TEXT, y + 3, BARS, 14, TRACK)
        page.box(left + TEXT, y + 3, max(2, round(BARS * probability)), 14, FIRST_BAR if line == 1 else BAR)
        page.text(left + TEXT + BARS + 12, y, f"{probability:.1%}", INK if line == 1 else FAINT, 15)


def _short_path(path: str) -> str:
    return path if "://" in path else "/".join(part for part in Path(path).parts[-2:] if part != os.sep)


class _Page:
    """Paper that is measured in points of the finished picture."""

    def __init__(self, width: int, height: int) -> None:
        self.image = Image.new("RGB", (width * SCALE, height * SCALE), PAPER)
        self.pen = ImageDraw.Draw(self.image)

    def text(self, x: int, y: int, words: str, colour: str, size: int, width: int | None = None) -> None:
        words, font = printable(words), ImageFont.load_default(size * SCALE)
        if width and font.getlength(words) > width * SCALE:
            while words and font.getlength(words + "...") > width * SCALE:
                words = words[:-1]
            words = words.rstrip() + "..."
        self.pen.text((x * SCALE, (y + 10) * SCALE), words, colour, font, anchor="lm")

    def box(self, x: int, y: int, width: int, height: int, colour: str) -> None:
        corners = [x * SCALE, y * SCALE, (x + width) * SCALE - 1, (y + height) * SCALE - 1]
        self.pen.rounded_rectangle(corners, radius=min(3 * SCALE, width * SCALE // 2), fill=colour)

    def photo(self, image: Image.Image, x: int, y: int, width: int, height: int) -> None:
        size = (width * SCALE, height * SCALE)
        mask = Image.new("L", size, 0)
        ImageDraw.Draw(mask).rounded_rectangle([0, 0, size[0] - 1, size[1] - 1], radius=6 * SCALE, fill=255)
        self.image.paste(image.resize(size, Image.Resampling.LANCZOS), (x * SCALE, y * SCALE), mask)
