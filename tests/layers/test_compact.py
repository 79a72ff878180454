"""Experts in 16 and 8 bits: nearly the same outputs from fewer bytes, and no silent misuse."""

import copy

import pytest
import timm
import torch
from torch import nn

import parameternet
from parameternet import DynamicConv
from parameternet.export import export
from parameternet.layers.compact import EXPERT_DTYPES, SHORTEST_ROW, CompactConv
from parameternet.surgery import fuse

# Largest error of a mixed kernel relative to its rows' largest value: a step of the dtype for an expert, and in 16 bits
# one more for the routing weight and for the sum.
STEPS = {"float16": 3 * 2**-11, "bfloat16": 3 * 2**-8, "int8": 1 / 255}
CONVS = [
    ((16, 24), {}),
    ((16, 24), {"stride": 2, "num_experts": 1}),
    ((16, 24), {"bias": True, "num_experts": 3}),
    ((16, 24, 3), {"stride": 2, "groups": 4}),
    ((16, 16, 5), {"groups": 16, "padding": "same", "stride": 2}),
    ((16, 8, (1, 3)), {"dilation": (1, 2), "padding": 0}),
]


def made(args, kwargs):
    torch.manual_seed(0)
    conv = DynamicConv(*args, **kwargs).eval()
    conv.output_bias = nn.Parameter(torch.randn(conv.out_channels))
    return conv


@pytest.mark.parametrize(("args", "kwargs"), CONVS)
@pytest.mark.parametrize("expert_dtype", EXPERT_DTYPES)
@torch.no_grad()
def test_kernels_are_mixed_from_rounded_experts(args, kwargs, expert_dtype):
    conv = made(args, kwargs)
    compact = CompactConv(conv, expert_dtype)
    routing_weights = torch.rand(3, conv.num_experts)
    experts = conv.weight.view(conv.num_experts, -1)
    expected = (routing_weights @ experts).view(3, conv.out_channels, -1)
    # The error of each expert is multiplied by its routing weight.
    sizes = conv.weight.flatten(1).amax(1) - conv.weight.flatten(1).amin(1).clamp(max=0)
    bound = STEPS[expert_dtype] * (routing_weights @ sizes.view(conv.num_experts, -1))
    got = compact.kernels(routing_weights).float().flatten(2)
    assert ((got - expected).abs() <= bound[:, :, None] + 1e-6).all()
    assert not torch.equal(got, expected)


@pytest.mark.parametrize(("args", "kwargs"), CONVS)
@pytest.mark.parametrize("expert_dtype", EXPERT_DTYPES)
@pytest.mark.parametrize("batch", [0, 1, 3, 9])
@torch.no_grad()
def test_outputs_are_those_of_the_rounded_experts(args, kwargs, expert_dtype, batch):
    """With any routing weights, the router's or the caller's, the layer is a DynamicConv of the experts it stores."""
    conv = made(args, kwargs)
    compact = CompactConv(conv, expert_dtype)
    rounded = copy.deepcopy(conv)
    rounded.weight.copy_(compact.experts())
    x = torch.randn(batch, 16, 9, 8)
    tolerance = {"float16": 2e-3, "bfloat16": 2e-2, "int8": 1e-5}[expert_dtype]  # 16 bits round sums, too
    for given in ((x,), (x, torch.rand(batch, conv.num_experts))):
        expected, got = rounded(*given), compact(*given)
        assert got.shape == expected.shape
        assert got.numel() == 0 or (got - expected).abs().max() <= tolerance * expected.abs().max()


@torch.no_grad()
def test_large_kernels_are_mixed_in_parts():
    conv = made((256, 2048), {"num_experts": 2})  # 2 MiB a kernel: 8 samples at once
    compact = CompactConv(conv, "int8")
    x = torch.randn(11, 256, 3, 3)
    whole = compact(x)
    assert torch.allclose(whole, torch.cat([compact(image) for image in x.split(1)]), atol=1e-5)


@pytest.mark.parametrize("expert_dtype", EXPERT_DTYPES)
def test_a_network_is_smaller_and_nearly_the_same(expert_dtype):
    torch.manual_seed(0)
    model = timm.create_model("parameternet_50m", num_classes=10).eval()
    fused, compact = fuse(model), fuse(model, expert_dtype=expert_dtype)
    large = [
        name
        for name, module in fused.named_modules()
        if isinstance(module, DynamicConv) and module.weight[0].numel() >= SHORTEST_ROW
    ]
    assert large == [name for name, module in compact.named_modules() if isinstance(module, CompactConv)]
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected, got = fused(x), compact(x)
    assert (got - expected).abs().max() <= 0.02 * expected.abs().max()
    sizes = [sum(net.get_submodule(name).weight.nbytes for name in large) for net in (fused, compact)]
    assert sizes[1] <= (0.32 if expert_dtype == "int8" else 0.5) * sizes[0]
    assert parameternet.count_flops(compact).total == parameternet.count_flops(fused).total


@pytest.mark.parametrize("expert_dtype", EXPERT_DTYPES)
def test_a_state_dict_comes_back(expert_dtype):
    nets = [
        fuse(timm.create_model("parameternet_50m", num_classes=10).eval(), expert_dtype=expert_dtype) for _ in range(2)
    ]
    nets[1].load_state_dict(nets[0].state_dict())
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(nets[0](x), nets[1](x))


@pytest.mark.parametrize("expert_dtype", EXPERT_DTYPES)
@torch.no_grad()
def test_other_dtypes_autocast_and_compile(expert_dtype):
    conv = made((16, 24, 3), {})
    compact = CompactConv(conv, expert_dtype)
    x = torch.randn(2, 16, 9, 8)
    expected = compact(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = compact(x)
    assert y.dtype == torch.bfloat16 and torch.allclose(y.float(), expected, atol=0.1)
    y = copy.deepcopy(compact).double()(x.double())
    assert y.dtype == torch.float64 and torch.allclose(y.float(), expected, atol=0.1)
    y = copy.deepcopy(compact).bfloat16()(x.bfloat16())
    assert y.dtype == torch.bfloat16 and torch.allclose(y.float(), expected, atol=0.1)
    y = torch.compile(compact, backend="eager", fullgraph=True)(x)
    assert torch.allclose(y, expected, atol=0.1)


@pytest.mark.parametrize(("args", "kwargs"), CONVS)
@torch.no_grad()
def test_a_trace_takes_other_batches_and_sizes(args, kwargs):
    compact = CompactConv(made(args, kwargs), "int8")
    traced = torch.jit.trace(compact, torch.randn(2, 16, 9, 8))
    for shape in ((1, 16, 9, 8), (3, 16, 7, 9)):
        x = torch.randn(shape)
        assert torch.allclose(traced(x), compact(x), atol=1e-5)


def test_gradients_are_refused():
    compact = CompactConv(made((4, 4), {}), "int8")
    x = torch.randn(1, 4, 5, 5)
    with pytest.raises(RuntimeError, match="no gradients"):
        compact(x.requires_grad_())
    with pytest.raises(RuntimeError, match="no gradients"):
        compact(x.detach())  # of the router, which is not frozen
    with torch.inference_mode():
        compact(x)


def test_what_does_not_fit_is_refused():
    model = nn.Sequential(made((32, 4), {})).eval()
    with pytest.raises(ValueError, match="int4"):
        fuse(model, expert_dtype="int4")
    for value, expert_dtype in ((1e6, "float16"), (float("nan"), "bfloat16"), (float("inf"), "int8")):
        broken = copy.deepcopy(model)
        with torch.no_grad():
            broken[0].weight[0] = value
        with pytest.raises(ValueError, match=f"fit {expert_dtype}"):
            fuse(broken, expert_dtype=expert_dtype)
    hooked = copy.deepcopy(model)
    hooked[0].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="hooks"):
        fuse(hooked, expert_dtype="int8")


def test_exports_say_what_to_do():
    model = fuse(nn.Sequential(made((3, 4, 5), {})).eval(), expert_dtype="int8")
    with pytest.raises(ValueError, match="without `fuse"):
        export(model, "network.onnx", size=8)
