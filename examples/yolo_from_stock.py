# SPDX-License-Identifier: AGPL-3.0-or-later
"""Add dynamic convolutions to a stock YOLO, keep its weights, and continue training.

    pip install "parameternet[yolo]"
    python examples/yolo_from_stock.py --weights yolov8n.pt --data coco8.yaml --imgsz 640

Prints the largest difference of the outputs right after loading, and mAP after training. Without --weights, it starts
from a randomly initialised yolov8n (difference 1.5e-05); without --data, it trains on a few images with bright squares
(mAP 0 after one epoch). Ultralytics and `parameternet.yolo` are under AGPL-3.0, and so is software that builds on them.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image
from ultralytics import YOLO

import parameternet.yolo  # noqa: F401  registers our layers with Ultralytics


def write_squares(root, count=8, side=64):
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        images, labels = root / "images" / split, root / "labels" / split
        images.mkdir(parents=True)
        labels.mkdir(parents=True)
        for index in range(count):
            pixels = generator.integers(0, 100, (side, side, 3), dtype=np.uint8)
            left, top = generator.integers(0, side // 2, 2)
            pixels[top : top + 24, left : left + 24, index % 2] = 255
            Image.fromarray(pixels).save(images / f"{index}.png")
            box = ((left + 12) / side, (top + 12) / side, 24 / side, 24 / side)
            (labels / f"{index}.txt").write_text(" ".join(map(str, (index % 2, *box))))
    (root / "squares.yaml").write_text(f"path: {root}\ntrain: images/train\nval: images/val\nnames: [red, green]\n")
    return root / "squares.yaml"


def write_network(path):
    """Build a YAML of yolov8n with two dynamic convolutions; options follow the usual arguments of a row."""
    network = YOLO("yolov8n.yaml").model.yaml
    for index in (3, 5):
        from_, repeats, _, arguments = network["backbone"][index]
        network["backbone"][index] = [from_, repeats, "DynamicConvBnAct", [*arguments, {"num_experts": 4}]]
    path.write_text(yaml.safe_dump({key: network[key] for key in ("nc", "scales", "backbone", "head")}))
    return path


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", help="of a stock yolov8n")
    parser.add_argument("--data", help="YAML of a data set")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--imgsz", type=int, default=64)
    parser.add_argument("--project", type=Path, default=Path("runs"), help="folder for the run")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        stock = YOLO(options.weights or "yolov8n.yaml")
        if not options.weights:
            stock.save(scratch / "stock.pt")
        model = YOLO(write_network(scratch / "yolov8n-mine.yaml")).load(options.weights or scratch / "stock.pt")
        x = torch.rand(1, 3, 128, 128)
        with torch.no_grad():
            expected, found = (network.model.float().eval()(x)[0] for network in (stock, model))
        print(f"largest difference from stock: {(found - expected).abs().max():.1e}")
        data = options.data or write_squares(scratch / "squares")
        metrics = model.train(
            data=data, epochs=options.epochs, imgsz=options.imgsz, batch=4, workers=0, plots=False,
            project=options.project.resolve(), name="yolo_from_stock",  # Ultralytics would choose its own folder
        )  # fmt: skip
        print(f"mAP50-95 {100 * metrics.box.map:.1f} %")


if __name__ == "__main__":
    main()
