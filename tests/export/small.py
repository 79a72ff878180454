"""A small network that holds all that a DynamicConv can be."""

import pytest
import torch
from torch import nn

from parameternet.export import FIXED, FORMATS, FORMS, LOOPED
from parameternet.layers import DynamicConv, GhostModule

PACKAGES = {"onnx": ("onnx", "onnxruntime", "onnxscript"), "openvino": ("onnx", "onnxscript", "openvino")}
SIZE = (3, 40, 56)
FREE = [format for format in FORMATS if format not in FIXED]
PAIRS = [(format, form) for format in FREE for form in FORMS if form != "looped" or format in LOOPED]


def network():
    """Stem, Ghost module, and the rest of what a DynamicConv can be."""
    torch.manual_seed(0)
    made = nn.Sequential(
        DynamicConv(3, 8, 3, stride=2, padding=1),
        nn.BatchNorm2d(8),
        nn.Hardswish(),
        GhostModule(8, 24),
        DynamicConv(24, 14, 3, padding="same", stride=2, groups=2, bias=True, routing="softmax", routing_hidden=5),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(14, 7),
    )
    with torch.no_grad():
        for module in made.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(), module.running_var.uniform_(0.5, 2)
            if isinstance(module, DynamicConv):  # pictures are routed differently
                module.routing.weight.normal_(std=2)
    made.num_classes = 7
    made.pretrained_cfg = {
        "architecture": "small",
        "tag": "test",
        "input_size": SIZE,
        "mean": (0.1, 0.2, 0.3),
        "std": (0.4, 0.5, 0.6),
        "crop_pct": 0.8,
        "interpolation": "bilinear",
        "label_names": [f"n{i}" for i in range(7)],
        "label_descriptions": {"n0": 'a "rose", rouge <é>'},
    }
    return made.eval()


def needs(format):
    for package in PACKAGES.get(format, ()):
        pytest.importorskip(package)
