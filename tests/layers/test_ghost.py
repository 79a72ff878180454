"""Blocks beyond the golden cases: ratios, kernels, activations, stochastic depth."""

import copy
from functools import partial

import pytest
import torch
from reference import assert_no_worse
from torch import nn

from parameternet import ConvBnAct, DynamicConv, GhostBottleneck, GhostModule
from parameternet.layers.static import DepthwiseConv, PooledConv, static_conv2d


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


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(
    ("side", "kernel", "stride"), [(8, 3, 2), (9, 5, 2), (4, 5, 2), (10, 3, 3), (2, 3, 1), (7, 3, 1)]
)
def test_static_depthwise_convolution_is_as_exact_as_torchs_in_half_precision(side, kernel, stride, form):
    torch.manual_seed(0)
    ours = DepthwiseConv(6, 6, kernel, stride=stride, padding=kernel // 2, groups=6, bias=False)
    theirs = nn.Conv2d(6, 6, kernel, stride=stride, padding=kernel // 2, groups=6, bias=False)
    with torch.no_grad():  # values that bfloat16 has, so that arithmetic alone is compared
        ours.weight.copy_(ours.weight.bfloat16())
    theirs.load_state_dict(ours.state_dict())
    exact = copy.deepcopy(theirs).double()
    x = torch.randn(5, 6, side, side).bfloat16().contiguous(memory_format=form)
    slope = torch.randn(5, 6, *exact(x.double()).shape[2:]).bfloat16()
    results = {}
    for name, layer in {"ours": ours, "theirs": theirs, "exact": exact}.items():
        leaf = x.to(layer.weight.dtype).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=layer is not exact):
            y = layer(leaf)
        y.backward(slope.to(y.dtype))
        results[name] = {"out": y, "d_input": leaf.grad, "d_weight": layer.weight.grad}
    assert results["ours"]["out"].dtype == torch.bfloat16
    assert torch.equal(results["ours"]["out"], results["theirs"]["out"])
    for name, got in results["ours"].items():
        naive = results["theirs"][name].to(torch.bfloat16).double()
        assert_no_worse(name, got.double(), naive, results["exact"][name], factor=1)


def test_depthwise_convolutions_are_found_among_static_ones():
    assert type(static_conv2d(6, 6, 3, groups=6)) is DepthwiseConv
    assert type(static_conv2d(6, 12, 3, groups=6)) is nn.Conv2d
    assert type(static_conv2d(6, 6, 3)) is nn.Conv2d


@pytest.mark.parametrize("shape", [(4, 6, 1, 1), (1, 6, 1, 1), (0, 6, 1, 1), (4, 6, 3, 2)], ids=str)
def test_pooled_convolution_trains_as_torchs(shape):
    torch.manual_seed(0)
    ours = PooledConv(6, 5, 1).double()
    theirs = nn.Conv2d(6, 5, 1).double()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(shape, dtype=torch.float64)
    results = []
    for layer in (ours, theirs):
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        y.square().sum().backward()
        results.append((y, leaf.grad, layer.weight.grad, layer.bias.grad))
    for got, expected in zip(*results, strict=True):
        assert got.shape == expected.shape
        assert torch.allclose(got, expected, rtol=1e-12, atol=1e-12)
    for leaves_python in (torch.jit.script(ours), torch.jit.trace(ours, x), torch.fx.symbolic_trace(ours)):
        assert torch.allclose(leaves_python(x), theirs(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("layer", "arguments"),
    [
        (DepthwiseConv, {"kernel_size": 3}),
        (DepthwiseConv, {"kernel_size": 3, "groups": 2}),
        (DepthwiseConv, {"kernel_size": 5, "groups": 4, "padding": "same"}),
        (DepthwiseConv, {"kernel_size": 5, "groups": 4, "padding": 2, "padding_mode": "reflect"}),
        (PooledConv, {"kernel_size": 3}),
        (PooledConv, {"kernel_size": 1, "stride": 2}),
        (PooledConv, {"kernel_size": 1, "padding": 1}),
        (PooledConv, {"kernel_size": 1, "groups": 2}),
    ],
)
def test_static_layers_refuse_what_they_do_not_compute(layer, arguments):
    with pytest.raises(ValueError, match=r"use torch\.nn\.Conv2d"):
        layer(4, 4, **arguments)


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_a_static_block_takes_paddings_by_name(padding):
    block = ConvBnAct(4, 4, 5, pad_type=padding, conv_layer=partial(static_conv2d, groups=4)).train()
    block(torch.randn(2, 4, 8, 8)).sum().backward()
    assert block.conv.weight.grad.isfinite().all()


def test_static_layers_take_positional_arguments_as_conv2d_does():
    # peft builds adapters so: type(layer)(in, out, kernel_size, stride, padding, bias=False)
    assert PooledConv(4, 6, (1, 1), (1, 1), (0, 0), bias=False).bias is None
    assert DepthwiseConv(4, 4, 3, 2, 1, 1, 4).stride == (2, 2)
