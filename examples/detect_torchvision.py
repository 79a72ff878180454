"""Train torchvision's RetinaNet with a timm backbone on data in YOLO format, and print COCO mAP after each epoch.

    pip install "parameternet[detection,demo]"
    python examples/detect_torchvision.py bccd.yaml --backbone dynamic_efficientnet_lite0 --pretrained --epochs 40

The YAML has `train` and `val` (folders in images/, with labels in labels/) and the class `names`. On BCCD (205
training images of blood cells), 40 epochs at 256 px and seed 0, the command prints mAP50 87.9 and mAP50-95 53.1 after
the last epoch; with `--backbone parameternet_50m --pretrained` 87.6 and 51.7.
"""

import argparse
import math
from pathlib import Path

import timm
import torch
import yaml
from PIL import Image
from torch import nn
from torchmetrics.detection import MeanAveragePrecision
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork, box_convert
from torchvision.transforms.functional import pil_to_tensor

import parameternet
from parameternet.files import write_text


class Pyramid(nn.Module):
    """A feature pyramid on timm's features at strides 8, 16 and 32."""

    def __init__(self, name, pretrained, out_channels=64):
        super().__init__()
        self.body = timm.create_model(name, pretrained=pretrained, features_only=True, out_indices=(2, 3, 4))
        self.fpn = FeaturePyramidNetwork(self.body.feature_info.channels(), out_channels)
        self.out_channels = out_channels

    def forward(self, x):
        return self.fpn(dict(zip(("8", "16", "32"), self.body(x), strict=True)))


class YoloFolder(torch.utils.data.Dataset):
    """Images and boxes of one split, with random flips in training; class 0 is torchvision's background."""

    def __init__(self, root, split, size):
        self.files = sorted(path for path in (root / split).iterdir() if path.suffix in (".jpg", ".jpeg", ".png"))
        self.flips, self.size = split.endswith("train"), size

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        path = self.files[index]
        with Image.open(path) as image:
            image.thumbnail((self.size, self.size))
            pixels = pil_to_tensor(image.convert("RGB")) / 255
        text = (path.parents[2] / "labels" / path.parent.name / f"{path.stem}.txt").read_text()
        rows = torch.tensor([[float(word) for word in line.split()] for line in text.splitlines()]).reshape(-1, 5)
        labels, boxes = rows[:, 0].long() + 1, rows[:, 1:]
        for axis in (0, 1) if self.flips else ():
            if torch.rand(()) < 0.5:
                pixels, boxes[:, axis] = pixels.flip(2 - axis), 1 - boxes[:, axis]
        height, width = pixels.shape[1:]
        boxes = box_convert(boxes * torch.tensor([width, height, width, height]), "cxcywh", "xyxy")
        return pixels, {"boxes": boxes, "labels": labels}


@torch.no_grad()
def evaluate(model, loader):
    metric = MeanAveragePrecision(backend="pycocotools")
    for images, targets in loader:
        metric.update(model.eval()(images), targets)
    result = metric.compute()
    return [f"{100 * result[key]:.1f}" for key in ("map_50", "map")]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--backbone", default="dynamic_efficientnet_lite0")
    parser.add_argument("--pretrained", action="store_true")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--size", type=int, default=256, help="longer side of the images in pixels")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--output", type=Path, help="CSV to write after each run")
    options, rows = parser.parse_args(), []
    for seed in options.seeds:
        for epoch, scores in enumerate(train(options, seed), start=1):
            print(f"seed {seed}, epoch {epoch}: mAP50 {scores[0]}, mAP50-95 {scores[1]}", flush=True)
            rows.append([options.backbone, options.pretrained, options.size, options.epochs, seed, epoch, *scores])
        if options.output:
            header = ["backbone", "pretrained", "size", "epochs", "seed", "epoch", "mAP50", "mAP50-95"]
            write_text(options.output, "".join(",".join(map(str, row)) + "\n" for row in [header, *rows]))


def train(options, seed):
    """Train a detector, and yield its mAP after each epoch."""
    torch.manual_seed(seed)
    description = yaml.safe_load(options.data.read_text())
    root = options.data.parent / description.get("path", "")
    train, val = (
        torch.utils.data.DataLoader(
            YoloFolder(root, description[split], options.size), options.batch, shuffle=split == "train",
            collate_fn=lambda batch: tuple(zip(*batch, strict=True)),
        )
        for split in ("train", "val")
    )  # fmt: skip
    backbone = Pyramid(options.backbone, options.pretrained)
    config = timm.data.resolve_model_data_config(backbone.body)
    scales = [tuple(round(4 * stride * 2 ** (octave / 3)) for octave in range(3)) for stride in (4, 8, 16)]
    model = RetinaNet(
        backbone, len(description["names"]) + 1, min_size=options.size, max_size=options.size,
        image_mean=config["mean"], image_std=config["std"], detections_per_img=100,
        anchor_generator=AnchorGenerator(scales, ((0.5, 1.0, 2.0),) * 3),
    )  # fmt: skip
    optimizer = torch.optim.AdamW(parameternet.param_groups(model, options.lr, weight_decay=0.05))
    steps = options.epochs * len(train)
    warmup = min(100, steps // 5) + 1
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * i / steps))
    )
    for _ in range(options.epochs):
        model.train()
        for images, targets in train:
            loss = sum(model(images, targets).values())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            schedule.step()
        yield evaluate(model, val)


if __name__ == "__main__":
    main()
