"""Segment circles and squares with a U-Net of segmentation-models-pytorch on `parameternet_50m`.

    pip install "parameternet[clients]"
    python examples/segmentation_smp.py --steps 40

Prints the loss, and the mean IoU of the three classes on unseen images: 0.936.
"""

import argparse

import numpy as np
import segmentation_models_pytorch as smp
import torch
from PIL import Image, ImageDraw
from torch import nn

import parameternet  # registers the networks with timm, where smp finds them as tu-NAME

COLOURS = np.array([[0.0, 0.0, 0.0], [1.0, 0.2, 0.0], [0.0, 0.2, 1.0]])


def draw(count, side, seed):
    """Draw a circle and a square per image (B, 3, H, W), and masks (B, H, W): 0 background, 1 circle, 2 square."""
    generator, images, masks = np.random.default_rng(seed), [], []
    for _ in range(count):
        mask = Image.new("L", (side, side))
        for label, shape in ((1, "ellipse"), (2, "rectangle")):
            x, y, size = (int(v) for v in generator.integers((0, 0, side // 4), (side // 2, side // 2, side // 2)))
            getattr(ImageDraw.Draw(mask), shape)((x, y, x + size, y + size), fill=label)
        masks.append(np.asarray(mask, dtype=np.int64))
        images.append((COLOURS[masks[-1]] + generator.normal(0, 0.5, (side, side, 3))).transpose(2, 0, 1))
    return torch.tensor(np.array(images), dtype=torch.float32), torch.tensor(np.array(masks))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--encoder", default="tu-parameternet_50m", help="tu- and any timm name")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--side", type=int, default=64)
    options = parser.parse_args()

    torch.manual_seed(0)
    model = smp.Unet(options.encoder, encoder_weights=True, classes=3)
    optimizer = torch.optim.AdamW(parameternet.param_groups(model, 3e-3, weight_decay=0.05))
    for step in range(options.steps):
        images, masks = draw(8, options.side, seed=step + 1)
        loss = nn.functional.cross_entropy(model(images), masks)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0:
            print(f"step {step}: loss {loss:.3f}", flush=True)

    images, masks = draw(32, options.side, seed=0)
    with torch.no_grad():
        found = model.eval()(images).argmax(1)
    counts = smp.metrics.get_stats(found, masks, mode="multiclass", num_classes=3)
    print(f"mean IoU {smp.metrics.iou_score(*counts, reduction='macro'):.3f}")


if __name__ == "__main__":
    main()
