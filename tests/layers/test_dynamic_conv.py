"""The layer: its routers, its attributes, and everything that torch does to modules."""

import copy
import itertools
import math
import pickle
import warnings

import pytest
import torch
from reference import assert_no_worse, naive_dynamic_conv2d
from torch import nn

from parameternet import DynamicConv, Router, set_temperature
from parameternet.layers import STRATEGIES
from parameternet.layers.dynamic_conv import pad_same, same_padding

KINDS = {
    "pointwise": {"in_channels": 8, "out_channels": 12},
    "stem": {"in_channels": 8, "out_channels": 6, "kernel_size": 3, "stride": 2, "padding": 1, "bias": True},
    "depthwise": {"in_channels": 8, "out_channels": 8, "kernel_size": 3, "groups": 8},
    "softmax-mlp": {"in_channels": 8, "out_channels": 6, "routing": "softmax", "routing_hidden": 5, "temperature": 3.0},
    "same": {"in_channels": 8, "out_channels": 6, "kernel_size": (3, 5), "stride": 2, "padding": "same"},
}


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def layer(request):
    torch.manual_seed(0)
    return DynamicConv(**request.param)


def naive(layer, x, routing_weights):
    if layer.pad_same:
        x = pad_same(x, layer.kernel_size, layer.stride, layer.dilation)
    conv = {name: getattr(layer, name) for name in ("stride", "padding", "dilation", "groups")}
    return naive_dynamic_conv2d(x, layer.weight, routing_weights, layer.bias, **conv)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_every_dtype_in_training_and_evaluation(layer, dtype, training):
    layer = layer.to(dtype).train(training)
    x = torch.randn(3, 8, 7, 9).to(dtype).requires_grad_()
    y = layer(x)
    y.float().square().sum().backward()
    assert y.dtype == dtype and x.grad.isfinite().all()
    assert all(p.grad.dtype == dtype and p.grad.isfinite().all() for p in layer.parameters())
    routing_weights = layer.routing(x)
    assert routing_weights.dtype == torch.float32
    exact = naive(copy.deepcopy(layer).double(), x.detach().double(), routing_weights.double())
    assert_no_worse("output", y.detach(), naive(layer, x, routing_weights.to(dtype)).detach(), exact.detach())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_routes_in_float32(layer, dtype):
    x = torch.randn(3, 8, 7, 9)
    plain = layer.routing(x)
    with torch.autocast("cpu", dtype=dtype):
        routed = layer.routing(x)
        y = layer(x)
    assert routed.dtype == torch.float32 and torch.equal(routed, plain)
    assert y.dtype == dtype
    assert (y.float() - layer(x)).abs().max() <= 0.05 * layer(x).abs().max()
    y.float().sum().backward()
    assert layer.weight.grad.dtype == torch.float32


def test_attributes_of_conv2d(layer):
    static = nn.Conv2d(layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, groups=layer.groups)
    for name in ("in_channels", "out_channels", "kernel_size", "stride", "dilation", "groups", "padding_mode",
                 "transposed", "output_padding"):  # fmt: skip
        assert getattr(layer, name) == getattr(static, name), name
    assert layer.weight.shape == (layer.num_experts * layer.out_channels, *static.weight.shape[1:])


@pytest.mark.parametrize(
    ("padding", "kernel", "stride", "size"),
    [("", 3, 1, 9), ("", 3, 2, 9), ("", 2, 2, 8), ("", 1, 2, 9), ("same", 3, 2, 9), ("same", 4, 1, 9),
     ("same", 5, 3, 10), ("valid", 3, 1, 9), (2, 3, 1, 9), ((2, 1), 3, 1, 9)],
)  # fmt: skip
def test_padding_is_timms(padding, kernel, stride, size):
    from timm.layers import create_conv2d

    ours = DynamicConv(3, 4, kernel, stride, padding, num_experts=1)
    theirs = create_conv2d(3, 4, kernel, stride=stride, padding=padding)
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():
        theirs.weight.copy_(ours.weight)
        expected = theirs(x) * ours.routing(x)[:, :, None, None]
        assert torch.allclose(ours(x), expected, atol=1e-5)


def test_experts_start_as_static_convolutions_do():
    torch.manual_seed(0)
    layer, static = DynamicConv(64, 96, 3, bias=True, num_experts=3), nn.Conv2d(64, 96, 3)
    spreads = [kernel.std() for kernel in layer.expert_kernels()]
    assert all(abs(s / static.weight.std() - 1) < 0.05 for s in spreads)
    assert layer.bias.abs().max() <= static.bias.abs().max() * 1.2
    first, second = layer.expert_kernels()[:2]
    assert not torch.equal(first, second)


def test_softmax_sums_to_one_and_anneals():
    layer = nn.Sequential(DynamicConv(8, 8, routing="softmax", temperature=30.0), DynamicConv(8, 8, routing="sigmoid"))
    x = torch.randn(5, 8, 4, 4) * 10
    hot = layer[0].routing(x)
    assert torch.allclose(hot.sum(1), torch.ones(5))
    assert set_temperature(layer, 0.1) == 1
    assert layer[0].routing(x).amax(1).mean() > hot.amax(1).mean() + 0.1
    assert "0.routing.temperature" in layer.state_dict() and "1.routing.temperature" not in layer.state_dict()
    with pytest.raises(ValueError, match="above 0, got 0"):
        set_temperature(layer, 0)


def test_a_shared_router_routes_several_convolutions():
    router = Router(8, 4)
    first, second = DynamicConv(8, 6, routing=router), DynamicConv(8, 8, 3, groups=8, routing=router)
    x = torch.randn(2, 8, 5, 5)
    assert first.routing is second.routing is router
    routing_weights = router(x)
    assert torch.equal(first(x, routing_weights), first(x)) and torch.equal(second(x, routing_weights), second(x))
    (first(x).sum() + second(x).sum()).backward()
    assert router.weight.grad.abs().sum() > 0
    with pytest.raises(ValueError, match=r"reads 8 channels and weighs 4 experts.*in_channels=6 and num_experts=4"):
        DynamicConv(6, 6, routing=router)


def test_a_batch_of_one_trains_and_an_empty_one_passes(layer):
    layer.train()(torch.randn(1, 8, 7, 9)).sum().backward()
    assert layer.routing.weight.grad is not None
    empty = layer(torch.randn(0, 8, 7, 9))
    assert empty.shape == (0, *layer(torch.randn(1, 8, 7, 9)).shape[1:])


@pytest.mark.parametrize("form", ["script", "trace", "fx", "deepcopy", "pickle", "state_dict"])
def test_copies_and_graphs_compute_the_same(layer, form):
    layer.eval()
    x, other = torch.randn(3, 8, 7, 9), torch.randn(5, 8, 7, 9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        copied = {
            "script": lambda: torch.jit.script(layer),
            "trace": lambda: torch.jit.trace(layer, x),
            "fx": lambda: trace_as_leaf(layer),
            "deepcopy": lambda: copy.deepcopy(layer),
            "pickle": lambda: pickle.loads(pickle.dumps(layer)),
            "state_dict": lambda: through_state_dict(layer),
        }[form]()
    for batch in (x, other):
        assert torch.allclose(copied(batch), layer(batch), atol=1e-5)


def trace_as_leaf(layer):
    class Leaf(torch.fx.Tracer):
        def is_leaf_module(self, module, name):
            return isinstance(module, DynamicConv) or super().is_leaf_module(module, name)

    model = nn.Sequential(layer, nn.ReLU())
    graph = torch.fx.GraphModule(model, Leaf().trace(model))
    assert [node.op for node in graph.graph.nodes].count("call_module") == 2
    return lambda x: graph(x) + torch.clamp(layer(x), max=0)


def through_state_dict(layer):
    fresh = copy.deepcopy(layer)
    for p in fresh.parameters():
        nn.init.zeros_(p)
    fresh.load_state_dict(layer.state_dict(), strict=True)
    return fresh


def test_one_compiled_graph_serves_changing_batches(layer):
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="eager")
    for batch in (2, 3, 7, 16, 5):
        x = torch.randn(batch, 8, 7, 9)
        assert torch.allclose(compiled(x), layer(x), atol=1e-5)


def test_channels_last_gives_the_same(layer):
    x = torch.randn(3, 8, 7, 9)
    expected = layer(x)
    layer = layer.to(memory_format=torch.channels_last)
    assert torch.allclose(layer(x.to(memory_format=torch.channels_last)), expected, atol=1e-5)


def test_device_and_dtype_reach_every_parameter():
    layer = DynamicConv(4, 4, bias=True, routing_hidden=3, device="meta", dtype=torch.float16)
    assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.float16)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_experts": 0}, "num_experts must be at least 1, got 0"),
        ({"groups": 3}, "in_channels=8 and out_channels=6 must be positive and divisible by groups=3"),
        ({"groups": 0}, "groups=0"),
        ({"kernel_size": 0}, "kernel_size must be at least 1, got 0"),
        ({"stride": (1, 0)}, r"stride must be at least 1, got \(1, 0\)"),
        ({"padding": "full"}, "padding must be .* got 'full'"),
        ({"padding": -1}, "padding must not be negative, got -1"),
        ({"routing": "tanh"}, "routing must be one of sigmoid, softmax, got 'tanh'"),
        ({"routing_hidden": 0}, "routing_hidden must be None or at least 1, got 0"),
        ({"temperature": 0.0}, "temperature must be above 0, got 0.0"),
    ],
)
def test_wrong_arguments_are_shown(arguments, message):
    with pytest.raises(ValueError, match=message):
        DynamicConv(8, 6, **arguments)


# Shapes that some strategy does not take: (arguments, strategies that take it).
STRATEGY_SHAPES = {
    "pointwise": ({}, {"grouped", "batched_matmul", "gated_inputs", "gated_outputs", "wide"}),
    "pointwise-padded": ({"padding": 1}, {"grouped", "wide"}),
    "pointwise-groups": ({"groups": 2}, {"grouped", "wide"}),
    "row": ({"kernel_size": (1, 3)}, {"grouped", "wide"}),
    "dense": ({"kernel_size": 3}, {"grouped", "wide"}),
    "depthwise": ({"out_channels": 8, "kernel_size": 3, "groups": 8}, {"grouped", "shifted", "wide"}),
    "depthwise-1": ({"out_channels": 8, "groups": 8}, {"grouped", "shifted", "wide"}),
    "multiplier": ({"out_channels": 16, "kernel_size": 3, "groups": 8}, {"grouped", "wide"}),
}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("arguments", "taken"), STRATEGY_SHAPES.values(), ids=STRATEGY_SHAPES)
def test_a_strategy_computes_the_convolution_or_is_refused(arguments, taken, strategy):
    arguments = {"in_channels": 8, "out_channels": 12, "num_experts": 3, **arguments}
    x = torch.randn(2, 8, 6, 6)
    torch.manual_seed(0)
    layer = DynamicConv(**arguments)
    if strategy in taken:
        expected = layer(x)
        layer.strategy = strategy
        assert torch.allclose(layer(x), expected, atol=1e-5)
        assert DynamicConv(**arguments, strategy=strategy)(x).shape == expected.shape
        return
    with pytest.raises(ValueError, match=f"strategy '{strategy}' takes only"):
        DynamicConv(**arguments, strategy=strategy)
    layer.strategy = strategy  # after the layer was built
    for training in (True, False):
        with torch.set_grad_enabled(training), pytest.raises(ValueError, match=f"strategy '{strategy}' takes only"):
            layer.train(training)(x)
    with pytest.raises(Exception, match=f"strategy '{strategy}' takes only"):
        torch.jit.script(layer)(x)
    with pytest.raises(ValueError, match=f"strategy '{strategy}' takes only"):
        torch.jit.trace(layer, x)
    with pytest.raises(Exception, match=f"strategy '{strategy}' takes only"):
        torch.compile(layer, backend="eager")(x)


def test_an_unknown_strategy_is_refused_when_built_and_when_called():
    with pytest.raises(ValueError, match="unknown strategy 'fast'; there are grouped, "):
        DynamicConv(8, 8, strategy="fast")
    layer = DynamicConv(8, 8)
    layer.strategy = "fast"
    with pytest.raises(ValueError, match="unknown strategy 'fast'"):
        layer(torch.randn(1, 8, 2, 2))


@pytest.mark.parametrize("shape", [(2, 2), (3, 4), (1, 4), (2, 4, 1), (2, 8), (8,)])
def test_routing_weights_of_another_shape_are_refused(shape):
    layer = DynamicConv(8, 6, num_experts=4)
    with pytest.raises(ValueError, match=r"expected routing_weights of shape \(batch, num_experts\) = \(2, 4\), got"):
        layer(torch.randn(2, 8, 5, 5), torch.rand(shape))


def test_routers_have_no_linear_layers_and_only_softmax_has_a_buffer(layer):
    assert not [m for m in layer.modules() if isinstance(m, nn.Linear)]
    assert [name for name, _ in layer.named_buffers()] == (["routing.temperature"] if layer.routing.softmax else [])
    hidden = ["routing.hidden.weight", "routing.hidden.bias"] if layer.routing.hidden is not None else []
    names = ["routing.weight", "routing.bias", *hidden]
    assert [name for name, _ in layer.named_parameters() if name.startswith("routing.")] == names


def test_routers_without_normalisation_start_as_linear_layers_do():
    torch.manual_seed(0)
    router = Router(24, 4, hidden=5, norm="none")
    torch.manual_seed(0)
    last, first = nn.Linear(5, 4), nn.Linear(24, 5)
    for ours, theirs in ((router, last), (router.hidden, first)):
        assert torch.equal(ours.weight, theirs.weight) and torch.equal(ours.bias, theirs.bias)
        assert (ours.in_features, ours.out_features) == (theirs.in_features, theirs.out_features)


@pytest.mark.parametrize("routing", ["sigmoid", "softmax"])
@pytest.mark.parametrize("hidden", [None, 5])
def test_routers_pickled_by_0_1_0_load(routing, hidden):
    router = Router(8, 4, routing, hidden, temperature=3.0).eval()
    x = torch.randn(2, 8, 5, 5)
    expected = router(x)
    state = router.__getstate__()
    # As 0.1.0 had it: a temperature in every router, and a torch.nn.Linear for the hidden layer.
    state["_buffers"] = {"temperature": torch.tensor(3.0)}
    state["_non_persistent_buffers_set"] = set() if routing == "softmax" else {"temperature"}
    if hidden:
        linear = nn.Linear(8, hidden).eval()
        linear.load_state_dict(router.hidden.state_dict())
        state["_modules"] = {"hidden": linear}
    old = Router.__new__(Router)
    old.__setstate__(copy.deepcopy(state))
    assert torch.equal(old(x), expected)
    assert old.state_dict().keys() == router.state_dict().keys()
    assert not any(isinstance(m, nn.Linear) for m in old.modules()) and not any(m.training for m in old.modules())
    assert torch.equal(pickle.loads(pickle.dumps(old))(x), expected)
    assert torch.allclose(torch.jit.script(old)(x), expected, rtol=1e-6)


def test_wrong_input_is_shown():
    with pytest.raises(ValueError, match=r"expected x of shape \(batch, 8, height, width\), got \(2, 7, 5, 5\)"):
        DynamicConv(8, 6)(torch.randn(2, 7, 5, 5))


@pytest.mark.parametrize("scripted", [False, True])
def test_same_padding_is_tensorflows(scripted):
    compute = torch.jit.script(same_padding) if scripted else same_padding
    for size, kernel, stride, dilation in itertools.product(range(1, 30), (1, 2, 3, 5), (1, 2, 3, 5), (1, 3)):
        span = (kernel - 1) * dilation + 1
        expected = max((math.ceil(size / stride) - 1) * stride + span - size, 0)
        assert compute(size, kernel, stride, dilation) == expected, (size, kernel, stride, dilation)
