"""Small coloured pictures: three classes that a network learns in seconds."""

from __future__ import annotations

import tarfile

import numpy as np
from PIL import Image

COLOURS = {"blue": (40, 60, 200), "green": (40, 190, 60), "red": (200, 50, 40)}


def draw(folder, per_class: int, seed: int, classes=tuple(COLOURS)) -> None:
    rng = np.random.default_rng(seed)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for i in range(per_class):
            pixels = np.clip(np.array(COLOURS[name]) + rng.normal(0, 40, (28, 36, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{name}_{i}.png")


def pack(folder, tar) -> None:
    with tarfile.open(tar, "w") as file:
        for path in sorted(folder.rglob("*.png")):
            file.add(path, path.relative_to(folder).as_posix())
