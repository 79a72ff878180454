"""Detectors keep the routers of their weights: sigmoid checkpoints of older releases, softmax ones, and classifiers."""

import pytest
import timm
import torch
from lively import lively
from ultralytics import YOLO
from ultralytics.nn.tasks import DetectionModel

import parameternet.yolo  # noqa: F401  adds the layers
from parameternet.layers import Router

SMALL = {"imgsz": 64, "batch": 4, "workers": 0, "plots": False, "epochs": 1, "verbose": False, "device": "cpu"}
KINDS = ["sigmoid", "softmax"]


def routers(model):
    return {m.activation for m in model.modules() if isinstance(m, Router)}


def switch(model):
    """Make every router a sigmoid one, as models have them that an older release built."""
    for module in model.modules():
        if isinstance(module, Router):
            module.match({name: value for name, value in module.state_dict().items() if name != "temperature"})


def detector(rows, channels=3):
    head = [[[-1], 1, "Detect", ["nc"]]]
    return DetectionModel({"nc": 2, "backbone": rows, "head": head}, ch=channels, verbose=False)


def rows(options, width=16):
    return [[-1, 1, "DynamicConv", [width, 3, 2, options]], [-1, 1, "C2f_DynamicConv", [16, True]]]


@pytest.mark.filterwarnings("ignore:a router's state dict has no temperature")
@pytest.mark.parametrize("theirs", KINDS)
def test_a_detector_built_from_its_yaml_keeps_the_function_of_its_weights(theirs):
    """As Ultralytics' trainer does: the YAML says nothing of routing, the checkpoint's modules do."""
    source = lively(detector(rows({})))
    if theirs == "sigmoid":
        switch(source)
    model = detector(rows({})).eval()
    model.load(source, verbose=False)
    x = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        for (name, mine), (_, other) in zip(model.named_modules(), source.named_modules(), strict=True):
            if isinstance(mine, Router):
                assert mine.activation == other.activation, name
        assert torch.allclose(model(x)[0], source.eval()(x)[0], atol=1e-5)


def test_weights_that_do_not_fit_change_no_router():
    model = detector(rows({}))
    model.load(detector(rows({"routing": "sigmoid", "num_experts": 3})), verbose=False)
    assert model.model[0].routing.activation == "softmax"


@pytest.mark.filterwarnings("ignore:.*has no digest")  # the file is of another program
@pytest.mark.parametrize("theirs", KINDS)
@pytest.mark.parametrize("mine", KINDS)
def test_a_classifier_brings_its_routers(tmp_path, mine, theirs):
    from safetensors.torch import save_file

    classifier = lively(timm.create_model("parameternet_50m", num_classes=3, routing=theirs)).eval()
    save_file({n: value.contiguous() for n, value in classifier.state_dict().items()}, tmp_path / "best.safetensors")
    model = detector([[-1, 1, "TimmBackbone", ["parameternet_50m", {"routing": mine}]], [0, 1, "TimmStage", [16]]])
    found = YOLO("yolov8n-parameternet_50m.yaml")
    found.model = model
    found.load(tmp_path / "best.safetensors")
    net, x = found.model.model[0].net.eval(), torch.rand(1, 3, 64, 64)
    assert routers(net) == {theirs}
    with torch.no_grad():
        expected = classifier.forward_intermediates(x, intermediates_only=True)
        for ours in net(x):
            assert any(ours.shape == other.shape and torch.allclose(ours, other, atol=1e-5) for other in expected)


def test_training_goes_on_from_a_sigmoid_checkpoint(data, tmp_path):
    YOLO("yolov8n-dynamicconv.yaml").train(data=str(data), project=str(tmp_path), name="run", **SMALL)
    checkpoint = torch.load(tmp_path / "run" / "weights" / "last.pt", weights_only=False)
    switch(checkpoint["model"])
    torch.save(checkpoint, tmp_path / "old.pt")
    again = YOLO(tmp_path / "old.pt")
    assert routers(again.model) == {"sigmoid"}
    again.train(data=str(data), project=str(tmp_path), name="more", **SMALL)
    assert routers(YOLO(tmp_path / "more" / "weights" / "last.pt").model) == {"sigmoid"}
