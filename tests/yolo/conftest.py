"""Ultralytics without a network, with a configuration of its own, and small data to live on."""

import os
import tempfile

# Read when ultralytics is imported, so before anything here does that.
os.environ |= {
    "YOLO_OFFLINE": "true",
    "YOLO_AUTOINSTALL": "false",
    "YOLO_VERBOSE": "false",
    "YOLO_CONFIG_DIR": os.environ.get("YOLO_CONFIG_DIR") or tempfile.mkdtemp(),
}

import pytest

pytest.importorskip("ultralytics")

import numpy as np
import torch
from PIL import Image

import parameternet.yolo  # noqa: F401


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Six pictures with a bright square each, as Ultralytics reads them."""
    root = tmp_path_factory.mktemp("squares")
    generator = np.random.default_rng(0)
    for part in ("train", "val"):
        (root / "images" / part).mkdir(parents=True)
        (root / "labels" / part).mkdir(parents=True)
        for index in range(6):
            picture = generator.integers(0, 100, (64, 64, 3), dtype=np.uint8)
            top, left = generator.integers(0, 32, 2)
            picture[top : top + 24, left : left + 24, index % 2] = 255
            Image.fromarray(picture).save(root / "images" / part / f"{index}.png")
            box = f"{index % 2} {(left + 12) / 64} {(top + 12) / 64} {24 / 64} {24 / 64}\n"
            (root / "labels" / part / f"{index}.txt").write_text(box)
    (root / "data.yaml").write_text(f"path: {root}\ntrain: images/train\nval: images/val\nnames: [red, green]\n")
    return root / "data.yaml"
