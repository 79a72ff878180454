"""What the page shows of an image, computed without a page."""

import re
import threading
from pathlib import Path

import checkpoints
import pytest
import timm
import torch
from PIL import Image

from parameternet import count_flops
from parameternet.app import Explainer, draw
from parameternet.layers import DynamicConv
from parameternet.layers.recording import record_routing_weights

PHOTOS = Path(__file__).parent.parent / "photos"


@pytest.fixture(scope="module")
def network():
    """A small network whose routing depends on the image."""
    torch.manual_seed(0)
    model = checkpoints.network()
    for module in model.modules():
        if isinstance(module, DynamicConv):
            torch.nn.init.normal_(module.routing.weight, std=3.0)
    model.pretrained_cfg = checkpoints.config()["pretrained_cfg"] | {"label_names": [*"abcde"]}
    return model


@pytest.fixture(scope="module")
def explainer(network):
    return Explainer(network, "cpu")


def photo(name):
    return Image.open(PHOTOS / f"{name}.jpg").convert("RGB")


def test_classes_and_routing_are_those_of_the_network(explainer, network):
    found = explainer(photo("cat"), topk=3)
    (expected,) = explainer.predictor.predict(photo("cat"), topk=3)
    assert list(found.classes) == expected.labels
    assert list(found.classes.values()) == pytest.approx(expected.probabilities, abs=1e-6)
    with record_routing_weights(network) as recording, torch.no_grad():
        network(explainer.predictor.preprocess(photo("cat"))[None])
    assert found.routing.keys() == recording.calls.keys()
    for name, weights in found.routing.items():
        assert torch.allclose(weights, recording.samples(name)[0]), name


def test_the_static_baseline_has_no_dynamic_layer_and_fewer_multiply_adds(explainer, network):
    static = explainer.static.model
    assert not any(isinstance(module, DynamicConv) for module in static.modules())
    found = explainer(photo("cat"))
    assert found.static_cost.macs == count_flops(static, (3, 64, 64)).total < found.cost.macs
    assert found.cost.macs == count_flops(network, (3, 64, 64)).total
    assert found.static_cost.parameters == sum(p.numel() for p in static.parameters()) < found.cost.parameters
    assert found.cost.milliseconds > 0 and found.static_cost.milliseconds > 0


def test_constant_routing_matches_the_static_baseline():
    torch.manual_seed(0)
    dense = timm.create_model("tf_efficientnet_lite0", num_classes=6)
    from parameternet import upcycle

    model = upcycle(dense.eval(), num_experts=2)
    model.pretrained_cfg = {**dense.pretrained_cfg, "num_classes": 6, "label_names": [*"abcdef"]}
    found = Explainer(model, "cpu")(photo("cat"))
    assert found.static_classes == pytest.approx(found.classes, abs=1e-4)


def test_requests_at_once_do_not_mix_their_routing(explainer):
    images = {name: photo(name) for name in ("cat", "coffee", "rocket")}
    alone = {name: explainer.routing(image) for name, image in images.items()}
    wrong = []

    def ask(name):
        for _ in range(5):
            found = explainer.routing(images[name])
            wrong.extend(layer for layer, weights in found.items() if not torch.allclose(weights, alone[name][layer]))

    threads = [threading.Thread(target=ask, args=(name,)) for name in images]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(100)
    assert not wrong


def test_a_network_without_dynamic_layers_is_refused():
    with pytest.raises(ValueError, match="expected a network with dynamic convolutions"):
        Explainer(timm.create_model("resnet10t", num_classes=5))


# The heat map --------------------------------------------------------------------------------------------------------


def test_a_cell_for_each_expert_coloured_by_its_share():
    shown = draw({"a": torch.tensor([0.25, 0.25, 0.25, 0.25]), "b": torch.tensor([1.0, 0.0])}, "cat")
    cells = re.findall(r'<rect x="(\d+)" y="(\d+)".*? fill="(#\w+)"><title>(.*?)</title>', shown)
    assert len(cells) == 6
    colours = [colour for *_, colour, _ in cells]
    assert len(set(colours[:4])) == 1 and len(set(colours)) == 3
    assert cells[4][3] == "b: expert 0, routing weight 1.000, share 100.0%"
    assert cells[0][:2] == ("0", "0") and cells[4][0] == cells[5][0] != "0"


def test_sigmoid_weights_are_compared_by_their_shares():
    twice = {"a": torch.tensor([0.2, 0.8])}, {"a": torch.tensor([0.1, 0.4])}
    colours = [re.findall(r'fill="(#\w+)"', draw(routing, "")) for routing in twice]
    assert colours[0] == colours[1]
    assert "share 50.0%" in draw({"a": torch.zeros(2)}, "")


def test_names_are_escaped():
    shown = draw({"<script>\x1b": torch.ones(1)}, '"><b>')
    assert "<script>" not in shown and "\x1b" not in shown and "<b>" not in shown
