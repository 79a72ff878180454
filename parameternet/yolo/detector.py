# SPDX-License-Identifier: AGPL-3.0-or-later
"""Detect objects in an image with a YOLO checkpoint."""

from pathlib import Path
from typing import NamedTuple

from PIL import Image

from . import YOLO

__all__ = ["Detector", "Found"]


class Found(NamedTuple):
    """A detected object: class, confidence, and box in pixels (left, top, right, bottom)."""

    label: str
    confidence: float
    box: tuple[int, int, int, int]


class Detector:
    """Detect the objects in an image, the most confident first.

    Args:
        path: A .pt file of Ultralytics; reading one can run code.

    Raises:
        ValueError: It is not a detector.
    """

    def __init__(self, path: str | Path) -> None:
        self.model = YOLO(str(path))
        if self.model.task != "detect":
            raise ValueError(f"{path} is a network to {self.model.task}; give one to detect")

    def __call__(self, image: Image.Image) -> list[Found]:
        (result,) = self.model.predict(image, verbose=False)
        boxes = result.boxes
        rows = zip(boxes.cls.tolist(), boxes.conf.tolist(), boxes.xyxy.round().int().tolist(), strict=True)
        return [Found(result.names[int(kind)], confidence, tuple(box)) for kind, confidence, box in rows]
