"""Counts, to the last digit."""

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

import parameternet
from parameternet.flops import count_flops


def create(name, **kwargs):
    with torch.device("meta"):
        return timm.create_model(name, **kwargs)


@pytest.mark.parametrize(
    ("name", "convolution", "mixing", "routing"),
    [("parameternet_600m", 568_831_528, 19_412_456, 122_612), ("parameternet_300m", 281_536_640, 9_370_888, 75_524)],
)
def test_published_counts(name, convolution, mixing, routing):
    flops = count_flops(create(name))
    assert flops.as_dict() == {
        "convolution": convolution,
        "mixing": mixing,
        "routing": routing,
        "linear": 1_280_000,
        "total": convolution + mixing + routing + 1_280_000,
    }


def test_resolution_scales_the_convolutions_only():
    small, large = (count_flops(create("parameternet_600m"), (3, side, side)) for side in (128, 256))
    assert round((small.convolution + small.linear) / 1e6, 1) == 196.2
    assert round((large.convolution + large.linear) / 1e6, 1) == 740.1
    assert (small.mixing, small.routing) == (large.mixing, large.routing)


def test_a_static_network_agrees_with_torchs_counter():
    model = timm.create_model("parameternet_50m", dynamic=False).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randn(1, 3, 96, 96))
    flops = count_flops(model, (3, 96, 96))
    assert flops.mixing == flops.routing == 0
    assert 2 * flops.total == counter.get_total_flops()


def test_the_model_is_left_as_it_was():
    model = parameternet.DynamicConv(3, 8, 3, padding=1, routing_hidden=5).train()
    model.routing.register_forward_hook(lambda *_: None)
    flops = count_flops(model, (3, 8, 8))
    assert flops.routing == 3 * 5 + 5 * 4 and flops.convolution == 27 * 8 * 64
    assert model.training and model.weight.device.type == "cpu" and len(model.routing._forward_hooks) == 1
