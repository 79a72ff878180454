"""Draw predictions: each image next to its classes."""

import os
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from parameternet.prediction.predictor import THUMBNAIL, Result
from parameternet.text import printable

__all__ = ["draw"]

PAPER, INK, FAINT, TRACK = "#ffffff", "#1b1f24", "#6b7280", "#eef1f5"
FIRST_BAR, BAR, FAULT = "#2563eb", "#a5bff7", "#b42318"
SCALE = 2  # pixels per point, for dense screens
PHOTO = THUMBNAIL // SCALE
MARGIN, TEXT, BARS, ROW = 28, 200, 240, 28


def draw(results: Sequence[Result], title: str = "", limit: int = 30) -> Image.Image:
    """Draw each image with its classes as bars.

    Args:
        results: From `Predictor.predict` with `keep_images=True`.
        title: A line above, such as the model's name.
        limit: Draw at most this many; a last line counts the rest.
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
    bars = ROW * (1 + max(1, len(result.labels)))
    return max(_photo_size(result)[1], bars)


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
    """A canvas with coordinates in points at normal size."""

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
