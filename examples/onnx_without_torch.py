"""Classify an image with onnxruntime, numpy and Pillow; torch is needed only for the export.

    pip install "parameternet[export]" && parameternet export parameternet_50m.tin200 --format onnx --output net.onnx
    python examples/onnx_without_torch.py net.onnx tests/photos/coffee.jpg

Prints the five most likely classes, here espresso first with 87.2 %, as `parameternet predict` does. The file contains
its preprocessing and class names.
"""

import argparse
import json
import math

import numpy as np
import onnxruntime
from PIL import Image


def preprocess(image, facts):
    """Resize the shorter side, crop the center and normalise, as timm does: -> (1, 3, H, W)."""
    _, height, width = facts["input_size"]
    assert facts["crop_mode"] == "center" and height == width, f"cannot preprocess for {facts}"
    factor = math.floor(height / facts["crop_pct"]) / min(image.size)
    size = [max(math.floor(height / facts["crop_pct"]), int(side * factor)) for side in image.size]
    image = image.resize(size, Image.Resampling[facts["interpolation"].upper()])
    left, top = round((size[0] - width) / 2), round((size[1] - height) / 2)
    pixels = np.asarray(image.crop((left, top, left + width, top + height)), dtype=np.float32) / 255
    pixels = (pixels - np.float32(facts["mean"])) / np.float32(facts["std"])
    return pixels.transpose(2, 0, 1)[None]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file")
    parser.add_argument("images", nargs="+")
    options = parser.parse_args()

    session = onnxruntime.InferenceSession(options.file, providers=["CPUExecutionProvider"])
    facts = {key: json.loads(text) for key, text in session.get_modelmeta().custom_metadata_map.items()}
    for path in options.images:
        with Image.open(path) as image:
            x = preprocess(image.convert("RGB"), facts)
        [logits] = session.run(None, {session.get_inputs()[0].name: x})
        probabilities = np.exp(logits[0] - logits[0].max())
        probabilities /= probabilities.sum()
        print(path)
        for index in probabilities.argsort()[::-1][:5]:
            print(f"  {100 * probabilities[index]:5.1f}%  {facts['class_names'][index]}")


if __name__ == "__main__":
    main()
