"""Routing that hardly varies is folded back; routing that does is measured and left."""

import math

import pytest
import timm
import torch
from torch import nn
from trained import trained

from parameternet import fuse
from parameternet.layers import DynamicConv
from parameternet.layers.compact import CompactConv
from parameternet.surgery import collapse, measure_routing, upcycle


class Two(nn.Module):
    """Routers of which the second hears only noise of the given size."""

    def __init__(self, size):
        super().__init__()
        torch.manual_seed(0)
        self.a = DynamicConv(3, 4, 3, bias=True)
        self.b = DynamicConv(4, 5, 3, stride=2, padding="same")
        with torch.no_grad():
            self.b.routing.weight.mul_(size)

    def forward(self, x):
        return self.b(self.a(x).relu())


def batches():
    generator = torch.Generator().manual_seed(1)
    return [(5 * torch.randn(4, 3, 9, 9, generator=generator), torch.zeros(4)) for _ in range(3)]


def test_the_error_is_the_largest_change_of_a_kernel():
    model = Two(1.0)
    (a, _), x = measure_routing(model, batches()), torch.cat([batch for batch, _ in batches()])
    experts = model.a.weight.detach().unflatten(0, (4, -1))
    kernels = torch.einsum("be,eoihw->boihw", model.a.routing(x).detach(), experts)
    mean = kernels.mean(0)
    expected = (kernels - mean).flatten(1).norm(dim=1).max() / mean.norm()
    assert a.name == "a" and a.samples == 12
    assert a.error == pytest.approx(float(expected), rel=1e-4)
    assert torch.allclose(a.routing_weights.float(), model.a.routing(x).mean(0), atol=1e-6)


def test_layers_are_folded_within_the_error():
    model = Two(1e-5).train()
    folded, variations = collapse(model, batches(), tolerance=1e-4)
    assert [v.error <= 1e-4 for v in variations] == [False, True]
    assert isinstance(folded.a, DynamicConv) and not isinstance(folded.b, DynamicConv)
    assert isinstance(model.b, DynamicConv) and model.training and folded.b.training
    x = batches()[0][0]
    assert torch.allclose(folded(x), model(x), atol=1e-4 * float(model(x).abs().max()))
    folded, _ = collapse(model, batches(), tolerance=10.0, inplace=True)
    assert folded is model and not [m for m in model.modules() if isinstance(m, DynamicConv)]


@pytest.mark.parametrize("fused", [False, True])
def test_an_upcycled_network_goes_back_to_the_dense_one(fused):
    dense = trained("mobilenetv3_small_050")
    dynamic = upcycle(dense)
    if fused:
        dense, dynamic = fuse(dense), fuse(dynamic)
    x = torch.randn(2, 3, 64, 64)
    back, variations = collapse(dynamic, [x], tolerance=0.0)
    assert {v.error for v in variations} == {0.0}
    assert not [m for m in back.modules() if isinstance(m, DynamicConv)]
    assert sum(p.numel() for p in back.parameters()) == sum(p.numel() for p in dense.parameters())
    with torch.no_grad():
        assert torch.allclose(back(x), dense(x), atol=1e-5 * float(dense(x).abs().max()))


def test_nothing_to_measure_is_an_error():
    with pytest.raises(ValueError, match="this ResNet has none"):
        collapse(timm.create_model("resnet18"), [torch.randn(1, 3, 32, 32)])
    with pytest.raises(ValueError, match="no image reached a, b: data must contain at least one batch"):
        collapse(Two(1.0), [])


def test_experts_in_fewer_bytes_are_measured_and_left():
    model = fuse(timm.create_model("parameternet_50m", pretrained=True).eval(), expert_dtype="int8")
    x = torch.randn(4, 3, 64, 64)
    _, variations = collapse(model, [x], tolerance=10.0)
    left = {v.name for v in variations if v.left and "int8" in v.left}
    assert left == {name for name, module in model.named_modules() if isinstance(module, CompactConv)}
    assert len(variations) == 76 and all(math.isfinite(v.error) for v in variations)
