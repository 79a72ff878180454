"""Routing weights are recorded, and replaced, whoever computes them."""

import pytest
import timm
import torch
from torch import nn

from parameternet import DynamicConv, Router, fuse, layers
from parameternet.layers.compact import CompactConv
from parameternet.layers.recording import record_routing_weights, replace_routing_weights


class Handed(nn.Module):
    """Routes once for two convolutions: by position, and by keyword."""

    def __init__(self):
        super().__init__()
        self.router = Router(4, 3)
        self.a, self.b = (DynamicConv(4, 5, num_experts=3, routing=None) for _ in range(2))
        self.c = DynamicConv(5, 2, num_experts=2)

    def forward(self, x):
        routing_weights = self.router(x)
        return self.c(self.a(x, routing_weights) + self.b(x, routing_weights=routing_weights))


def test_every_way_to_route_is_recorded():
    model, x = Handed(), torch.randn(6, 4, 5, 5)
    with record_routing_weights(model) as recording:
        y = model(x[:4])
        model(x[4:])
    assert recording.from_caller == {"a", "b"}
    for name in "ab":
        assert torch.allclose(recording.samples(name).float(), model.router(x), atol=1e-6)
        assert [len(call) for call in recording.calls[name]] == [4, 2]
    assert recording.samples("c").shape == (6, 2) and recording.samples("c").dtype == torch.float64
    assert torch.equal(model(x[:4]), y)
    model(x)
    assert len(recording.calls["a"]) == 2, "recording ends with the block"


def test_routing_weights_are_replaced_for_the_length_of_the_block():
    model, x = Handed(), torch.randn(3, 4, 5, 5)
    before, seen = model(x), {}

    def first_expert(name, routing_weights):
        seen[name] = routing_weights
        return torch.zeros_like(routing_weights).index_fill_(1, torch.tensor(0), 1.0)

    with replace_routing_weights(model, first_expert):
        y = model(x)
    conv2d, one = nn.functional.conv2d, slice(0, 5)
    expected = conv2d(conv2d(x, model.a.weight[one]) + conv2d(x, model.b.weight[one]), model.c.weight[:2])
    assert torch.allclose(y, expected, atol=1e-5)
    assert torch.equal(seen["a"], model.router(x)) and seen["c"].shape == (3, 2)
    assert torch.equal(model(x), before)


def test_replacing_by_the_same_weights_changes_nothing():
    model, x = timm.create_model("parameternet_50m", num_classes=5).eval(), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        before = model(x)
        with replace_routing_weights(model, lambda name, routing_weights: routing_weights):
            assert torch.equal(model(x), before)


@pytest.mark.parametrize("context", [record_routing_weights, lambda model: replace_routing_weights(model, max)])
def test_a_static_network_is_an_error(context):
    with (
        pytest.raises(ValueError, match="dynamic convolutions, but this Sequential has none"),
        context(nn.Sequential()),
    ):
        pass


def test_package_exports_it():
    assert layers.record_routing_weights is record_routing_weights


@pytest.mark.parametrize("expert_dtype", ["int8", "bfloat16"])
def test_layers_with_experts_in_fewer_bytes_are_recorded_and_replaced(expert_dtype):
    model = timm.create_model("parameternet_50m", pretrained=True).eval()
    compact, x = fuse(model, expert_dtype=expert_dtype), torch.randn(2, 3, 64, 64)
    assert any(isinstance(module, CompactConv) for module in compact.modules())
    with torch.no_grad(), record_routing_weights(compact) as recording:
        y = compact(x)
    with torch.no_grad(), record_routing_weights(model) as dense:
        model(x)
    assert recording.calls.keys() == dense.calls.keys() and all(recording.calls.values())
    first = "blocks.0.0.ghost1.primary_conv.0"
    assert torch.allclose(recording.samples(first), dense.samples(first), atol=0.01)
    with torch.no_grad(), replace_routing_weights(compact, lambda name, weights: weights.flip(1)):
        assert not torch.allclose(compact(x), y, atol=1e-3)
