"""Blocks beyond the golden cases: ratios, kernels, activations, stochastic depth."""

import pytest
import torch
from torch import nn

from parameternet import ConvBnAct, DynamicConv, GhostBottleneck, GhostModule
from parameternet.layers.static import DepthwiseConv


@pytest.mark.parametrize("ratio", [1, 2, 3, 5])
@pytest.mark.parametrize("act_layer", [nn.GELU, nn.SiLU, None])
def test_ghost_module_gives_the_channels_asked_for(ratio, act_layer):
    module = GhostModule(6, 13, ratio=ratio, act_layer=act_layer)
    assert module(torch.randn(2, 6, 5, 7)).shape == (2, 13, 5, 7)
    assert sum(isinstance(m, DynamicConv) for m in module.modules()) == (1 if ratio == 1 else 2)


@pytest.mark.parametrize("arguments", [{"dw_size": 4}, {"kernel_size": 2}])
def test_even_kernels_are_refused(arguments):
    with pytest.raises(ValueError, match="must be odd"):
        GhostModule(6, 12, **arguments)
    with pytest.raises(ValueError, match="dw_kernel_size must be odd, got 4"):
        GhostBottleneck(6, 12, dw_kernel_size=4)
    with pytest.raises(ValueError, match="ratio must be at least 1, got 0"):
        GhostModule(6, 12, ratio=0)


def test_static_blocks_hold_no_dynamic_layer():
    block = GhostBottleneck(8, 12, stride=2, se_ratio=0.25, conv_layer=nn.Conv2d)
    assert not any(isinstance(m, DynamicConv) for m in block.modules())
    assert block(torch.randn(2, 8, 8, 8)).shape == (2, 12, 4, 4)


def test_drop_path_drops_whole_samples_in_training_only():
    torch.manual_seed(0)
    block = GhostBottleneck(8, 8, drop_path=0.5)
    block.train()
    x = torch.randn(64, 8, 4, 4)
    kept = (block(x) - x).flatten(1).abs().amax(1) > 0
    assert 10 < kept.sum() < 54
    block.eval()
    assert ((block(x) - x).flatten(1).abs().amax(1) > 0).all()


def test_conv_bn_act_with_skip_and_drop_path_trains():
    block = ConvBnAct(6, 6, 3, skip=True, drop_path_rate=0.3)
    block(torch.randn(4, 6, 5, 5)).sum().backward()
    assert block.conv.weight.grad is not None


@pytest.mark.parametrize(("side", "kernel", "stride"), [(8, 3, 2), (4, 5, 2), (2, 5, 1), (1, 3, 1)])
def test_static_depthwise_convolution_trains_as_torchs(side, kernel, stride):
    torch.manual_seed(0)
    ours = DepthwiseConv(6, 6, kernel, stride=stride, padding=kernel // 2, groups=6, bias=False).double()
    theirs = nn.Conv2d(6, 6, kernel, stride=stride, padding=kernel // 2, groups=6, bias=False).double()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(3, 6, side, side, dtype=torch.float64)
    results = []
    for layer in (ours, theirs):
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        y.square().sum().backward()
        results.append((y, leaf.grad, layer.weight.grad))
    for got, expected in zip(*results, strict=True):
        assert torch.allclose(got, expected, rtol=1e-12, atol=1e-12)
    ours.eval()
    assert torch.equal(ours(x), theirs(x))
