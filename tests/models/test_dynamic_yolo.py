"""YOLO backbones without Ultralytics."""

import subprocess
import sys

import pytest
import timm
import torch

from parameternet.layers import DynamicConv, GhostModule
from parameternet.models.dynamic_yolo import SCALES, VARIANTS

NAMES = [f"yolov8{scale}_{variant}" for scale in SCALES for variant in VARIANTS]


def test_the_names_are_registered_and_need_no_ultralytics():
    assert set(NAMES) <= set(timm.list_models("yolov8*"))
    code = (
        "import sys, timm, parameternet; timm.create_model('yolov8n_dynamicconv'); print('ultralytics' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("name", NAMES)
def test_what_is_dynamic_and_what_features_there_are(name):
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=3)
        features = timm.create_model(name, features_only=True)
    x = torch.empty(2, 3, 64, 96, device="meta")
    assert model(x).shape == (2, 3)
    shapes = [tuple(f.shape) for f in features(x)]
    strides = features.feature_info.reduction()
    assert strides == [2, 4, 8, 16, 32]
    channels = features.feature_info.channels()
    assert shapes == [(2, c, 64 // s, 96 // s) for c, s in zip(channels, strides, strict=True)]
    bare = [m for m in model.model if isinstance(m, DynamicConv)]
    assert len(bare) == (4 if name.endswith("_dynamicconv") and "c2f" not in name else 0)
    assert any(isinstance(m, GhostModule) for m in model.modules()) == ("ghost" in name)
    assert any(isinstance(m, DynamicConv) for m in model.modules())


def test_arguments():
    model = timm.create_model("yolov8n_c2f_dynamicconv", num_experts=2, routing="softmax", in_chans=1, num_classes=0)
    convs = [m for m in model.modules() if isinstance(m, DynamicConv)]
    assert {(c.num_experts, c.routing.softmax) for c in convs} == {(2, True)}
    assert model(torch.randn(1, 1, 64, 64)).shape == (1, 256)
    static = timm.create_model("yolov8n_c2f_dynamicconv", dynamic=False)
    assert not [m for m in static.modules() if isinstance(m, DynamicConv)]
    with pytest.raises(ValueError, match="output_stride must be 32"):
        timm.create_model("yolov8n_dynamicconv", output_stride=16)
