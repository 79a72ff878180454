"""timm's CondConv networks compute the same on our layer."""

import pytest
import timm
import torch
from timm.layers import CondConv2d
from trained import trained

from parameternet import DynamicConv, convert_condconv, count_flops, fuse


@pytest.mark.parametrize("name", ["tf_efficientnet_cc_b0_4e", "efficientnet_cc_b0_4e"])
def test_the_same_outputs_and_gradients(name):
    theirs = trained(name, num_classes=10)
    ours = convert_condconv(theirs)
    assert not [m for m in ours.modules() if isinstance(m, CondConv2d)]
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    x = torch.randn(3, 3, 96, 96)
    a, b = theirs(x), ours(x)
    assert float((a - b).abs().max() / a.abs().max()) <= 1e-5
    a.square().sum().backward()
    b.square().sum().backward()
    for name, parameter in ours.named_parameters():
        expected = theirs.get_parameter(name).grad.reshape(parameter.shape)
        assert torch.allclose(parameter.grad, expected, atol=1e-4 * float(expected.abs().max())), name
    assert torch.allclose(fuse(ours)(x), a, atol=1e-5 * float(a.abs().max()))
    assert count_flops(ours).mixing == count_flops(theirs).mixing > 0


def test_state_dicts_of_both_and_the_biased_layer():
    from torch import nn

    block = nn.ModuleList([CondConv2d(4, 6, 3, stride=2, padding="same", bias=True, num_experts=3)])
    converted = convert_condconv(block)[0]
    x, r = torch.randn(2, 4, 7, 8), torch.rand(2, 3)
    assert torch.allclose(converted(x, r), block[0](x, r), atol=1e-5)


def test_a_layer_without_a_router_asks_for_routing_weights():
    with pytest.raises(ValueError, match="pass routing_weights"):
        DynamicConv(3, 4, routing=None)(torch.randn(1, 3, 4, 4))
    with pytest.raises(ValueError, match="this ResNet has no CondConv2d"):
        convert_condconv(timm.create_model("resnet18"))
