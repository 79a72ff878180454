"""The native kernels: as exact as the naive loop, invisible to everything that observes operators, and optional."""

import copy
import itertools
import os
import pickle
import platform
import shutil
import subprocess
import sys
import threading
import warnings
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from reference import assert_no_worse, naive_dynamic_conv2d
from torch import nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from parameternet import ConvBnAct, DynamicConv, GhostModule, Router, dynamic_conv2d, fuse
from parameternet.layers import native, record_routing_weights
from parameternet.layers.strategies import in_float32

LEVEL = native.level()
FOLDER = Path(native.__file__).parent
KERNELS = ("route", "pointwise", "depthwise", "pointwise_last", "depthwise_last")
needs_library = pytest.mark.skipif(LEVEL == 0, reason="the native kernels are not built, or this CPU lacks AVX2")


@pytest.fixture(params=[1, 2], ids=["avx2", "avx512"])
def kernels(request, monkeypatch):
    """Both instruction sets, one after the other."""
    if request.param > LEVEL:
        pytest.skip(f"needs {native.LEVELS[request.param]} kernels, there are {native.LEVELS[LEVEL]}")
    monkeypatch.setattr(native, "_available", request.param)
    return native


def at_once(threads, compute):
    """Compute with this many threads of torch."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return compute()
    finally:
        torch.set_num_threads(before)


@pytest.fixture
def calls(monkeypatch):
    """Names of the kernels that were called, in order."""
    called = []

    def counted(name):
        kernel = getattr(native, name)

        def call(*args, **kwargs):
            called.append(name)
            return kernel(*args, **kwargs)

        return call

    for name in KERNELS:
        monkeypatch.setattr(native, name, counted(name))
    return called


def without_kernels(compute):
    """Compute the same with torch's operators."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "_available", 0)
        return compute()


def close(got, expected, tolerance=1e-5):
    assert got.shape == expected.shape and got.dtype == expected.dtype
    error, largest = (got - expected).abs().max(), expected.abs().max()
    assert error <= tolerance * largest, f"error {error:.2e}, largest value {largest:.2e}"


def frozen(module):
    return module.eval().requires_grad_(False)


# ---------------------------------------------------------------------------------------------------------------------
# Convolutions
# ---------------------------------------------------------------------------------------------------------------------

POSITIONS = [(1, 5), (7, 1), (3, 5), (4, 4), (1, 17), (3, 11), (6, 8), (7, 7), (5, 10), (8, 8), (5, 13), (14, 14),
             (1, 197), (1, 3137)]  # fmt: skip
CHANNELS = [1, 3, 7, 16, 17, 960]
OUT = [1, 2, 5, 6, 7, 13, 31]
BATCHES = [1, 2, 3, 9]
EXPERTS = [1, 2, 4, 5]
DEPTHWISE = [  # kernel, padding
    ((1, 1), (0, 0)),
    ((1, 1), (1, 1)),
    ((3, 3), (1, 1)),
    ((3, 3), (0, 0)),
    ((3, 3), (5, 5)),
    ((5, 5), (2, 2)),
    ((5, 5), (3, 1)),
    ((7, 7), (3, 3)),
    ((7, 7), (9, 8)),
    ((3, 5), (1, 0)),
    ((3, 5), (4, 1)),
]
MAPS = [(1, 1), (2, 3), (7, 7), (14, 15), (16, 16), (31, 33), (64, 65)]


def operands(batch, channels, out, experts, size, kernel=None, biased=True):
    """Return (x, weight, routing_weights, output_bias); with `kernel` (h, w) for a depthwise convolution."""
    shape = (experts * out, channels, 1, 1) if kernel is None else (experts * out, 1, *kernel)
    x = torch.randn(batch, channels, *size)
    output_bias = torch.randn(out) if biased else None
    return x, torch.randn(shape) / shape[1] ** 0.5, torch.rand(batch, experts), output_bias


def assert_exact(name, results, x, weight, routing_weights, output_bias, **conv):
    """Compare results, such as those of one and of two threads, with the naive loop."""

    def naive(dtype):
        y = naive_dynamic_conv2d(x.to(dtype), weight.to(dtype), routing_weights.to(dtype), **conv)
        return y if output_bias is None else y + output_bias.to(dtype)[:, None, None]

    single, exact = naive(torch.float32), naive(torch.float64)
    for got in results:
        assert got.shape == exact.shape and got.dtype == torch.float32, name
        assert_no_worse(name, got, single, exact)


def with_threads(compute):
    """Compute with one thread and with two."""
    return [at_once(threads, compute) for threads in (1, 2)]


@pytest.mark.parametrize("size", POSITIONS, ids=lambda size: f"{size[0] * size[1]}-positions")
def test_pointwise_is_as_exact_as_the_naive_loop(kernels, size):
    torch.manual_seed(0)
    turn = POSITIONS.index(size)
    # Each number of positions has other combinations, all of them together most.
    for i, channels in enumerate(CHANNELS):
        out, batch = OUT[(i + turn) % len(OUT)], BATCHES[(i + turn // 2) % len(BATCHES)]
        experts, biased = EXPERTS[(i + turn // 3) % len(EXPERTS)], (i + turn) % 2 == 0
        if channels * size[0] * size[1] > 1 << 20:
            batch = 1
        given = operands(batch, channels, out, experts, size, biased=biased)
        name = f"batch {batch}, {channels} -> {out} channels, {experts} experts, output bias {biased}"
        assert_exact(name, with_threads(lambda: kernels.pointwise(*given)), *given)  # noqa: B023


@pytest.mark.parametrize(("channels", "out"), [(960, 160), (24, 96), (96, 24)])
@pytest.mark.parametrize("batch", [1, 5])
def test_pointwise_of_many_rows_is_split_among_threads(kernels, channels, out, batch):
    torch.manual_seed(0)
    given = operands(batch, channels, out, 4, (7, 7) if channels > 100 else (28, 27))
    assert_exact("output", with_threads(lambda: kernels.pointwise(*given)), *given)


@pytest.mark.parametrize(("kernel", "padding"), DEPTHWISE, ids=str)
def test_depthwise_is_as_exact_as_the_naive_loop(kernels, kernel, padding):
    torch.manual_seed(0)
    turn = DEPTHWISE.index((kernel, padding))
    for i, size in enumerate(MAPS):
        if any(side + 2 * p < k for side, p, k in zip(size, padding, kernel, strict=True)):
            continue
        channels, batch = CHANNELS[(i + turn) % 5], BATCHES[(i + turn // 2) % len(BATCHES)]
        experts, biased = EXPERTS[(i + turn // 3) % len(EXPERTS)], (i + turn) % 2 == 0
        given = operands(batch, channels, channels, experts, size, kernel, biased)
        name = f"{size}, batch {batch}, {channels} channels, {experts} experts, output bias {biased}"
        results = with_threads(lambda: kernels.depthwise(*given, padding))  # noqa: B023
        assert_exact(name, results, *given, padding=padding, groups=channels)


def test_depthwise_of_many_channels(kernels):
    torch.manual_seed(0)
    given = operands(2, 960, 960, 4, (7, 7), (3, 3))
    results = with_threads(lambda: kernels.depthwise(*given, (1, 1)))
    assert_exact("output", results, *given, padding=(1, 1), groups=960)


def inputs(batch, channels, size):
    """Inputs whose samples are contiguous, but not the batch."""
    wide = torch.randn(batch, channels + 5, *size)
    length = channels * size[0] * size[1]
    strides = (size[0] * size[1], size[1], 1)
    return {
        "first channels": wide[:, :channels],
        "middle channels": wide[:, 2 : 2 + channels],
        "every second sample": torch.randn(2 * batch, channels, *size)[::2],
        "one sample for all": torch.randn(1, channels, *size).expand(batch, -1, -1, -1),
        "overlapping samples": torch.randn(length + 7 * batch).as_strided((batch, channels, *size), (7, *strides)),
        "one sample, odd stride": torch.randn(length + 3)[3:].as_strided((1, channels, *size), (13, *strides)),
    }


@pytest.mark.parametrize("kind", inputs(1, 1, (1, 1)))
@pytest.mark.parametrize("size", [(5, 7), (19, 21)], ids=str)
def test_inputs_may_be_slices_and_expanded(kernels, calls, kind, size):
    torch.manual_seed(0)
    x = inputs(3, 6, size)[kind]
    copied_input = x.clone(memory_format=torch.contiguous_format)
    _, weight, routing_weights, output_bias = operands(len(x), 6, 8, 3, size)
    with torch.no_grad():
        got, copied = (dynamic_conv2d(a, weight, routing_weights, output_bias=output_bias) for a in (x, copied_input))
        assert torch.equal(got, copied)
        assert_exact("pointwise", [got], x, weight, routing_weights, output_bias)
        weight, routing_weights, output_bias = operands(len(x), 6, 6, 3, size, (3, 3))[1:]
        conv = {"padding": (1, 1), "groups": 6}
        got, copied = (
            dynamic_conv2d(a, weight, routing_weights, output_bias=output_bias, **conv) for a in (x, copied_input)
        )
        assert torch.equal(got, copied)
        assert_exact("depthwise", [got], x, weight, routing_weights, output_bias, **conv)
    assert calls == ["pointwise", "pointwise", "depthwise", "depthwise"]


@pytest.mark.parametrize("size", [(1, 5), (5, 10), (7, 7), (5, 13), (33, 34)], ids=str)
@pytest.mark.parametrize("activation", native.ACTIVATIONS)
@pytest.mark.parametrize("threads", [1, 2])
def test_nothing_but_the_output_is_written(kernels, size, activation, threads):
    torch.manual_seed(0)
    for kind, out in {"pointwise": 7, "depthwise": 5}.items():
        given = operands(3, 5, out, 2, size, None if kind == "pointwise" else (3, 3))
        padding = () if kind == "pointwise" else ((1, 1),)
        run = getattr(kernels, kind)
        whole = torch.full((3, out + 3, *size), 123.0)
        slot = whole[:, 2 : 2 + out]
        assert at_once(threads, lambda: run(*given, *padding, activation, slot)) is slot  # noqa: B023
        assert torch.equal(slot, run(*given, *padding, activation))
        slot.fill_(123.0)
        assert (whole == 123).all()


@pytest.mark.parametrize("activation", ["relu", "hard_swish"])
def test_activations_are_torchs(kernels, activation):
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), -1e30, -4, -3, -2.9, -1e-30, -0.0, 0, 1e-30, 2.9, 3, 4,
                      1e30]).reshape(1, 1, 3, 5)  # fmt: skip
    expected = {"relu": F.relu, "hard_swish": F.hardswish}[activation](x)
    one = torch.ones(1, 1, 1, 1)
    for got in (
        kernels.pointwise(x, one, one[0, 0], None, activation),
        kernels.depthwise(x, one, one[0, 0], None, (0, 0), activation),
    ):
        assert torch.allclose(got, expected, rtol=1e-6, atol=0, equal_nan=True)


@pytest.mark.parametrize("activation", ["relu", "hard_swish"])
def test_activations_follow_the_convolution(kernels, activation):
    torch.manual_seed(0)
    torchs = {"relu": F.relu, "hard_swish": F.hardswish}[activation]
    given = operands(2, 6, 13, 3, (7, 7))
    close(kernels.pointwise(*given, activation), torchs(kernels.pointwise(*given)), 1e-6)
    given = operands(2, 6, 6, 3, (19, 20), (5, 5))
    close(kernels.depthwise(*given, (2, 2), activation), torchs(kernels.depthwise(*given, (2, 2))), 1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("size", [(7, 7), (19, 20)], ids=str)
def test_nan_and_infinity_reach_the_same_outputs_as_in_torch(kernels, size, value):
    torch.manual_seed(0)
    for kernel, conv in ((None, {}), ((3, 3), {"padding": (1, 1), "groups": 6})):
        x, weight, routing_weights, output_bias = operands(3, 6, 6, 2, size, kernel)
        x[1, 2, 3, 6], x[1, 4, 0, 0], x[2, 5, 6, 3] = value, value, value
        with torch.no_grad():
            got = dynamic_conv2d(x, weight, routing_weights, output_bias=output_bias, **conv)
        expected = naive_dynamic_conv2d(x, weight, routing_weights, **conv) + output_bias[:, None, None]
        assert not got.isfinite().all()
        assert torch.allclose(got, expected, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_a_nan_pixel_spoils_its_own_sample_only(kernels):
    torch.manual_seed(0)
    model = frozen(nn.Sequential(DynamicConv(6, 8), DynamicConv(8, 8, 3, groups=8), GhostModule(8, 12)))
    x = torch.randn(3, 6, 7, 7)
    expected = model(x)
    x[1, 3, 2, 2] = float("nan")
    got = model(x)
    assert got[1].isnan().all()
    assert torch.equal(got[[0, 2]], expected[[0, 2]])


# ---------------------------------------------------------------------------------------------------------------------
# Routers
# ---------------------------------------------------------------------------------------------------------------------


def made_router(channels, experts, norm="layer", activation="sigmoid", temperature=1.0, scale=1.0):
    torch.manual_seed(0)
    router = frozen(Router(channels, experts, activation, temperature=temperature, norm=norm))
    nn.init.normal_(router.weight, std=scale)
    nn.init.normal_(router.bias, std=scale)
    return router


ROUTERS = [("sigmoid", 1.0), ("softmax", 1.0), ("softmax", 0.3), ("softmax", 30.0)]


@pytest.mark.parametrize("norm", ["layer", "none"])
@pytest.mark.parametrize(("activation", "temperature"), ROUTERS)
@pytest.mark.parametrize("experts", range(1, 9))
def test_routers_are_as_exact_as_with_torch(kernels, calls, norm, activation, temperature, experts):
    for channels, shape in itertools.product((1, 3, 17, 960), ((1, 1, 1), (3, 1, 5), (2, 7, 7))):
        router = made_router(channels, experts, norm, activation, temperature)
        x = torch.randn(shape[0], channels, *shape[1:]) + 0.5
        got = router(x)
        naive = without_kernels(lambda: router(x))  # noqa: B023
        assert got.shape == (shape[0], experts) and got.dtype == torch.float32
        exact = copy.deepcopy(router).double()(x.double())
        # An error of the logits grows with their size and falls with the temperature.
        rounding = 1e-6 * channels**0.5 / min(temperature, 1)
        assert_no_worse(f"{channels} channels", got, naive + rounding, exact)
    assert calls == ["route"] * 12


@pytest.mark.parametrize("size", [(56, 56), (224, 225)], ids=str)
def test_averages_of_large_maps(kernels, size):
    torch.manual_seed(0)
    x = torch.rand(2, 5, *size) + 3
    for got in with_threads(lambda: kernels.route(x, torch.eye(5) / 4, torch.zeros(5), False, False, 1.0)):
        assert torch.allclose(4 * got.double().logit(), x.double().mean((2, 3)), rtol=5e-6, atol=0)


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
@pytest.mark.parametrize("norm", ["layer", "none"])
def test_large_logits_saturate(kernels, activation, norm):
    router = made_router(16, 5, norm, activation, scale=1e4)
    x = torch.randn(4, 16, 5, 5)
    got = router(x)
    assert got.isfinite().all() and got.min() < 1e-6 and got.max() > 1 - 1e-6
    assert torch.allclose(got, without_kernels(lambda: router(x)), atol=1e-6)


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
@pytest.mark.parametrize("norm", ["layer", "none"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_routing_weights_of_unusual_inputs_are_torchs(kernels, activation, norm, value):
    router = made_router(16, 5, norm, activation)
    x = torch.randn(3, 16, 5, 5)
    x[1, 3, 2, 2] = value
    got, expected = router(x), without_kernels(lambda: router(x))
    assert torch.allclose(got, expected, atol=1e-5, equal_nan=True)
    assert got[[0, 2]].isfinite().all()


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
@pytest.mark.parametrize("norm", ["layer", "none"])
@pytest.mark.parametrize("channels", [7, 100, 960])
@pytest.mark.parametrize("value", [0.0, 0.1, 17.3, 1000.7])
def test_equal_averages_are_routed_as_in_float64(kernels, activation, norm, channels, value):
    router = made_router(channels, 4, norm, activation)
    x = torch.full((2, channels, 7, 7), value)
    exact = copy.deepcopy(router).double()(x.double())
    tolerance = 1e-5 if norm == "layer" else 1e-6 * (10 + value * channels)
    assert torch.allclose(router(x).double(), exact, rtol=0, atol=tolerance)


def test_a_router_refuses_other_channels_as_without_kernels(kernels):
    router, x = made_router(8, 4), torch.randn(2, 7, 5, 5)
    for run in (lambda: router(x), lambda: without_kernels(lambda: router(x))):
        with pytest.raises(RuntimeError, match="2x7 and 8x4"):
            run()


# ---------------------------------------------------------------------------------------------------------------------
# What must not be bypassed
# ---------------------------------------------------------------------------------------------------------------------


def fused_ghost(in_chs=8, out_chs=12, act_layer=nn.ReLU, **arguments):
    ghost = GhostModule(in_chs, out_chs, act_layer=act_layer, **arguments)
    for module in ghost.modules():
        if isinstance(module, nn.BatchNorm2d):
            for values in (module.weight, module.bias, module.running_mean, module.running_var):
                nn.init.uniform_(values, 0.5, 1.5)
    ghost.eval().reparameterize()
    return ghost


LAYERS = {
    "pointwise": lambda: DynamicConv(8, 12, bias=True).eval(),
    "depthwise": lambda: DynamicConv(8, 8, 3, groups=8, routing="softmax").eval(),
    "ghost": fused_ghost,
}
X = (3, 8, 7, 9)


@pytest.fixture(params=LAYERS.values(), ids=LAYERS)
def layer(request):
    torch.manual_seed(0)
    return request.param()


@pytest.fixture
def x(layer):
    return torch.randn(X)


@pytest.fixture
def unused(calls):
    """Fail if a kernel was called."""
    yield
    assert not calls


@needs_library
def test_inference_uses_the_kernels(layer, x, calls):
    with torch.no_grad():
        got = layer(x)
    assert calls and {"route"} < set(calls)
    close(got, without_kernels(lambda: layer(x)))
    before = len(calls)
    with torch.inference_mode():
        assert torch.equal(layer(x), got)
    assert len(calls) == 2 * before
    assert torch.equal(frozen(layer)(x), got)
    assert len(calls) == 3 * before


@pytest.mark.parametrize("leaf", ["x", "weight", "routing.weight", "routing.bias"])
def test_gradients_are_those_without_kernels(layer, x, leaf):
    frozen(layer)
    if leaf == "x":
        leaves = [x.requires_grad_()]
    else:
        leaves = [p.requires_grad_() for name, p in layer.named_parameters() if name.endswith(leaf)]

    def run():
        return torch.autograd.grad(layer(x).square().sum(), leaves)

    for got, expected in zip(run(), without_kernels(run), strict=True):
        close(got, expected)


def test_gradients_of_large_kernels():
    torch.manual_seed(0)
    layer, x = DynamicConv(512, 512, num_experts=2), torch.randn(40, 512, 3, 3)  # mixed again in backward

    def run():
        return torch.autograd.grad(layer(x).square().sum(), list(layer.parameters()))

    for got, expected in zip(run(), without_kernels(run), strict=True):
        close(got, expected)


def functional(layer, x, transform):
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def call(parameters, x):
        return torch.func.functional_call(layer, parameters, x)

    images = torch.stack([x, 2 * x])
    stacked = {name: torch.stack([p, 3 * p]) for name, p in parameters.items()}
    return {
        "vmap": lambda: torch.func.vmap(call, (None, 0))(parameters, images),
        "ensemble": lambda: torch.func.vmap(call, (0, None))(stacked, x),
        "jvp": lambda: torch.func.jvp(lambda x: call(parameters, x), (x,), (2 * x,))[1],
        "grad": lambda: torch.func.grad(lambda x: call(parameters, x).square().sum())(x),
        "grad-of-weight": lambda: torch.func.grad(lambda p: call(p, x).square().sum())(parameters)[
            "weight" if "weight" in parameters else "primary_conv.0.weight"
        ],
        "jacrev": lambda: torch.func.jacrev(lambda x: call(parameters, x).sum((1, 2, 3)))(x),
    }[transform]()


@pytest.mark.parametrize("transform", ["vmap", "ensemble", "jvp", "grad", "grad-of-weight", "jacrev"])
@pytest.mark.parametrize("grad", [True, False])
def test_transforms_of_torch_func(layer, x, unused, transform, grad):
    with torch.set_grad_enabled(grad):
        close(functional(layer, x, transform), without_kernels(lambda: functional(layer, x, transform)), 1e-6)


@torch.no_grad()
def test_functional_call_uses_the_given_parameters(layer, x):
    parameters = {name: p * 1.5 for name, p in layer.named_parameters()}
    changed = copy.deepcopy(layer)
    changed.load_state_dict({**layer.state_dict(), **parameters})
    got = torch.func.functional_call(layer, parameters, x)
    assert torch.equal(got, changed(x))
    assert not torch.allclose(got, layer(x))


@torch.no_grad()
def test_forward_mode_of_autograd(layer, x, unused):
    def directional():
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(layer(forward_ad.make_dual(x, 2 * x))).tangent

    got = directional()
    assert got.abs().max() > 0
    close(got, without_kernels(directional), 1e-6)


@torch.no_grad()
def test_flops_are_counted(layer, x, unused):
    def count():
        with FlopCounterMode(display=False) as counter:
            layer(x)
        return counter.get_total_flops()

    assert count() == without_kernels(count) > 0


@torch.no_grad()
def test_function_modes_see_every_operator(layer, x, unused):
    class Seen(TorchFunctionMode):
        def __init__(self):
            super().__init__()
            self.names = []

        def __torch_function__(self, function, types, args=(), kwargs=None):
            self.names.append(getattr(function, "__name__", ""))
            return function(*args, **(kwargs or {}))

    def names():
        with Seen() as seen:
            layer(x)
        return seen.names

    assert "sum" in names() and set(names()) >= set(without_kernels(names))


@torch.no_grad()
def test_fake_tensors_give_shapes(layer, x, unused):
    from torch._subclasses import FakeTensor, FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        y = layer(mode.from_tensor(x))
    assert isinstance(y, FakeTensor) and y.shape == layer.to("meta")(x.to("meta")).shape


def leaf_graph(layer):
    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, module, name):
            return isinstance(module, DynamicConv) or super().is_leaf_module(module, name)

    model = nn.Sequential(layer)
    return torch.fx.GraphModule(model, Tracer().trace(model))


GRAPHS = {
    "trace": lambda layer, x: torch.jit.trace(layer, x),
    "script": lambda layer, x: torch.jit.script(layer),
    "export": lambda layer, x: torch.export.export(layer, (x,)).module(),
    "compile-eager": lambda layer, x: torch.compile(layer, backend="eager", fullgraph=True),
    "compile-aot_eager": lambda layer, x: torch.compile(layer, backend="aot_eager", fullgraph=True),
    "fx": lambda layer, x: leaf_graph(layer),
    "make_fx": lambda layer, x: make_fx(layer)(x),
    "make_fx-pre-dispatch": lambda layer, x: make_fx(layer, pre_dispatch=True)(x),
}


@pytest.mark.parametrize("form", GRAPHS)
def test_graphs_compute_the_same(layer, x, form):
    torch._dynamo.reset()
    frozen(layer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = GRAPHS[form](layer, x)
        for images in (x, torch.randn(X)):
            close(graph(images), without_kernels(lambda: layer(images)))  # noqa: B023


@pytest.mark.parametrize("form", ["trace", "export", "make_fx", "make_fx-pre-dispatch"])
@torch.no_grad()
def test_graphs_record_the_same_operators(layer, x, form):
    def operators():
        graph = GRAPHS[form](layer, x).graph
        if form == "trace":
            return sorted(node.kind() for node in graph.nodes())
        return [str(node.target) for node in graph.nodes if node.op == "call_function"]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert operators() == without_kernels(operators)


@torch.no_grad()
def test_autocast_decides_the_dtype(layer, x):
    def run():
        with torch.autocast("cpu", torch.bfloat16):
            return layer(x)

    got = run()
    assert got.dtype == torch.bfloat16
    close(got.float(), without_kernels(run).float(), 0.02)


@torch.no_grad()
def test_float64_uses_torch(layer, x, unused):
    layer, x = layer.double(), x.double()
    assert layer(x).dtype == torch.float64
    assert torch.equal(layer(x), without_kernels(lambda: layer(x)))


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float16, 2**-8), (torch.bfloat16, 2**-5)], ids=str)
@torch.no_grad()
def test_layers_in_half_precision(layer, x, calls, dtype, rounding):
    layer, x = layer.to(dtype), x.to(dtype)
    got = layer(x)
    depthwise = any(getattr(module, "groups", 1) > 1 for module in layer.modules())
    assert set(calls) == ({"depthwise"} if LEVEL and depthwise else set())
    close(got, without_kernels(lambda: layer(x)), rounding)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("batch", [1, 3])
@torch.no_grad()
def test_depthwise_convolutions_in_half_precision_are_rounded_once(calls, dtype, form, batch):
    x, weight, routing_weights, _ = (t.to(dtype) for t in operands(batch, 7, 7, 4, (9, 8), (5, 3)))
    bias = torch.randn(7, dtype=dtype)
    conv = {"padding": (2, 1), "groups": 7}
    x = x.contiguous(memory_format=form)
    got = dynamic_conv2d(x, weight, routing_weights, output_bias=bias, **conv)
    exact = dynamic_conv2d(x.double(), weight.double(), routing_weights.double(), output_bias=bias.double(), **conv)
    assert calls == ["depthwise" if form is torch.contiguous_format else "depthwise_last"]
    assert got.is_contiguous(memory_format=form)
    close(got.double(), exact.to(dtype).double(), torch.finfo(dtype).eps)  # where float32 rounds to the other side


@needs_library
@pytest.mark.parametrize(
    ("dtype", "device", "converted"),
    [(torch.bfloat16, "cpu", True), (torch.float16, "cpu", True), (torch.float64, "cpu", False),
     (torch.bfloat16, "meta", False), (torch.float16, "meta", False)],
    ids=str,
)  # fmt: skip
def test_only_half_precision_on_cpus_is_converted(dtype, device, converted):
    x = torch.ones(2, dtype=dtype, device=device)
    wide, none = in_float32(x, None)
    assert none is None and (wide.dtype == torch.float32) is converted and (wide is x) is not converted
    assert without_kernels(lambda: in_float32(x))[0] is x
    mixed = x, torch.ones(2)
    assert in_float32(*mixed)[0] is x  # torch reports the mixed dtypes


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@torch.no_grad()
def test_the_default_dtype_has_no_effect(layer, x, dtype):
    expected = layer(x)
    torch.set_default_dtype(dtype)
    try:
        got = layer(x)
    finally:
        torch.set_default_dtype(torch.float32)
    close(got, expected)


@torch.no_grad()
def test_the_default_device_has_no_effect(layer, x):
    expected = layer(x)
    with torch.device("meta"):
        got = layer(x)
    assert got.device.type == "cpu"
    close(got, expected)


STRIDED = {
    "channels_last": lambda: torch.randn(X).contiguous(memory_format=torch.channels_last),
    "transposed": lambda: torch.randn(3, 8, 9, 7).transpose(2, 3),
    "columns": lambda: torch.randn(3, 8, 7, 12)[..., 2:11],
    "every second row": lambda: torch.randn(3, 8, 14, 9)[:, :, ::2],
    "every second channel": lambda: torch.randn(3, 16, 7, 9)[:, ::2],
    "one channel for all": lambda: torch.randn(3, 1, 7, 9).expand(-1, 8, -1, -1),
    "negated": lambda: torch.randn(*X, dtype=torch.complex64).conj().imag,
    "zeros": lambda: torch._efficientzerotensor(X),
}


@pytest.mark.parametrize("kind", STRIDED)
@torch.no_grad()
def test_inputs_of_other_strides(layer, x, kind):
    x = STRIDED[kind]()
    expected = without_kernels(lambda: layer(x.resolve_neg().clone(memory_format=torch.contiguous_format)))
    close(layer(x), expected)


@torch.no_grad()
def test_weights_in_channels_last(layer, x):
    expected = layer(x)
    close(layer.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last)), expected)


class Counting(torch.Tensor):
    used = 0

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.used += getattr(function, "__name__", "") in ("mm", "reshape", "conv2d", "bmm")
        return super().__torch_function__(function, types, args, kwargs or {})


@torch.no_grad()
def test_subclasses_of_tensor_see_the_arithmetic(layer, x, calls):
    expected = without_kernels(lambda: layer(x))
    for module in layer.modules():
        if isinstance(module, DynamicConv):
            module.weight = nn.Parameter(module.weight.detach().as_subclass(Counting), requires_grad=False)
    Counting.used = 0
    close(layer(x).as_subclass(torch.Tensor), expected)
    assert Counting.used and not {"pointwise", "depthwise"} & set(calls)


@torch.no_grad()
def test_the_meta_device_gives_shapes(layer, x, unused):
    shape = without_kernels(lambda: layer(x)).shape
    assert layer.to("meta")(x.to("meta")).shape == shape


@torch.no_grad()
def test_an_empty_batch_gives_an_empty_output(layer, x, unused):
    assert layer(x[:0]).shape == (0, *without_kernels(lambda: layer(x)).shape[1:])


def message(run):
    with pytest.raises(Exception) as error:
        run()
    return type(error.value), str(error.value)


@pytest.mark.parametrize("shape", [(3, 8, 0, 9), (3, 7, 7, 9), (8, 7, 9), (3, 8, 63)], ids=str)
@torch.no_grad()
def test_wrong_inputs_give_the_same_error_without_kernels(layer, shape):
    x = torch.randn(shape)
    if shape == (3, 8, 0, 9):  # no positions: torch's pointwise product takes them, its convolution does not
        try:
            expected = without_kernels(lambda: layer(x))
        except Exception:
            pass
        else:
            assert layer(x).shape == expected.shape
            return
    assert message(lambda: layer(x)) == message(lambda: without_kernels(lambda: layer(x)))


@pytest.mark.parametrize("size", [(2, 2), (1, 9), (9, 2), (3, 3)], ids=str)
@torch.no_grad()
def test_a_kernel_larger_than_the_map_is_refused(kernels, size):
    x, weight, routing_weights, _ = operands(2, 4, 4, 3, size, (4, 4))
    with pytest.raises(RuntimeError, match="Kernel size can't be greater than actual input size"):
        dynamic_conv2d(x, weight, routing_weights, groups=4)


# ---------------------------------------------------------------------------------------------------------------------
# Ghost modules
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def ghost():
    torch.manual_seed(0)
    return frozen(fused_ghost())


@pytest.mark.parametrize("act_layer", [nn.ReLU, nn.Hardswish, timm.layers.HardSwish, nn.GELU, None])
@pytest.mark.parametrize("dw_size", [3, 5])
@pytest.mark.parametrize("ratio", [1, 2, 3])
@pytest.mark.parametrize("out_chs", [12, 13])
def test_a_fused_ghost_module_computes_its_layers(kernels, act_layer, dw_size, ratio, out_chs):
    torch.manual_seed(0)
    ghost = frozen(fused_ghost(8, out_chs, act_layer, dw_size=dw_size, ratio=ratio))
    for shape in ((2, 8, 7, 9), (1, 8, 17, 19), (3, 8, 2, 2), (1, 8, 1, 1)):
        x = torch.randn(shape)
        close(ghost(x), without_kernels(lambda: ghost(x)))  # noqa: B023


@pytest.mark.parametrize("arguments", [{"kernel_size": 3}, {"stride": 2}, {"conv_layer": nn.Conv2d}], ids=str)
def test_other_ghost_modules_compute_their_layers(arguments):
    torch.manual_seed(0)
    ghost, x = frozen(fused_ghost(**arguments)), torch.randn(X)
    close(ghost(x), without_kernels(lambda: ghost(x)))


@needs_library
@pytest.mark.parametrize("act_layer", [nn.ReLU, nn.Hardswish, None])
def test_a_fused_ghost_module_is_two_convolutions_into_one_tensor(calls, act_layer):
    torch.manual_seed(0)
    ghost = frozen(fused_ghost(act_layer=act_layer))
    y = ghost(torch.randn(X))
    assert calls == ["route", "pointwise", "route", "depthwise"]
    assert y.is_contiguous() and y.shape == (3, 12, 7, 9)


def test_a_ghost_module_with_batch_norm_computes_its_layers():
    torch.manual_seed(0)
    ghost, x = frozen(GhostModule(8, 12)), torch.randn(X)
    first = ghost.primary_conv(x)
    close(ghost(x), torch.cat([first, ghost.cheap_operation(first)], 1), 1e-6)
    close(ghost(x), without_kernels(lambda: ghost(x)))
    ghost.train()
    close(ghost(x), without_kernels(lambda: ghost(x)))


PARTS = ["primary_conv", "primary_conv.0", "primary_conv.0.routing", "primary_conv.1", "primary_conv.2",
         "cheap_operation", "cheap_operation.0", "cheap_operation.0.routing", "cheap_operation.2"]  # fmt: skip


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("kind", ["hook", "pre-hook", "forward"])
def test_hooks_and_replaced_methods_inside_a_ghost_module_work(ghost, name, kind):
    x, part, seen = torch.randn(X), ghost.get_submodule(name), []
    before = ghost(x)

    def hook(module, args, output):
        seen.append(args[0].clone())
        return 0.5 * output

    def pre_hook(module, args):
        seen.append(args[0].clone())
        return (0.5 * args[0] + 1,)

    if kind == "hook":
        part.register_forward_hook(hook)
    elif kind == "pre-hook":
        part.register_forward_pre_hook(pre_hook)
    else:
        forward = part.forward
        part.forward = lambda x: hook(part, (x,), forward(x))
    got = ghost(x)
    assert len(seen) == 1 and not torch.allclose(got, before)
    close(got, without_kernels(lambda: ghost(x)))
    assert torch.allclose(seen[0], seen[1], atol=1e-5)


@pytest.mark.parametrize("change", [lambda r: r.double(), lambda r: r.mean(0, keepdim=True).expand_as(r)])
@pytest.mark.parametrize("part", ["primary_conv", "cheap_operation"])
def test_a_hook_may_change_routing_weights_to_any_tensor(ghost, part, change):
    x = torch.randn(X)
    ghost.get_submodule(part)[0].routing.register_forward_hook(lambda module, args, output: change(output))
    close(ghost(x), without_kernels(lambda: ghost(x)))
    conv, images = ghost.get_submodule(part)[0], torch.randn(3, ghost.get_submodule(part)[0].in_channels, 7, 9)
    close(conv(images), without_kernels(lambda: conv(images)))


def test_routing_weights_of_another_batch_are_refused(layer, x):
    frozen(layer)
    for module in layer.modules():
        if isinstance(module, Router):
            module.register_forward_hook(lambda module, args, output: output[:1].clone())
    for run in (lambda: layer(x), lambda: without_kernels(lambda: layer(x))):
        with pytest.raises((RuntimeError, ValueError)):
            run()


class Halved(nn.Sequential):
    def forward(self, x):
        return 0.5 * super().forward(x)


class Wrapper(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layers = layers

    def forward(self, x):
        return 0.5 * self.layers(x)


@pytest.mark.parametrize("part", ["primary_conv", "cheap_operation"])
@pytest.mark.parametrize("change", [lambda layers: Halved(*layers), Wrapper])
def test_a_part_of_a_ghost_module_may_be_replaced(ghost, part, change):
    x = torch.randn(X)
    before = ghost(x)
    setattr(ghost, part, change(ghost.get_submodule(part)))
    got = ghost(x)
    close(got, without_kernels(lambda: ghost(x)))
    assert not torch.allclose(got, before)


def test_a_subclass_of_the_convolution_is_called(ghost):
    class Doubled(DynamicConv):
        def forward(self, x, routing_weights=None):
            return 2 * super().forward(x, routing_weights)

    x = torch.randn(X)
    before = ghost(x)
    ghost.primary_conv[0].__class__ = Doubled
    got = ghost(x)
    close(got, without_kernels(lambda: ghost(x)))
    assert not torch.allclose(got, before)


def test_a_parametrization_is_applied(ghost):
    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    x = torch.randn(X)
    before = ghost(x)
    nn.utils.parametrize.register_parametrization(ghost.cheap_operation[0], "weight", Doubled())
    got = ghost(x)
    close(got, without_kernels(lambda: ghost(x)))
    assert not torch.allclose(got, before)


def test_global_hooks_see_every_layer(ghost):
    x, seen = torch.randn(X), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        ghost(x)
    finally:
        handle.remove()
    assert set(seen) == set(ghost.modules())


def test_recorded_routing_weights_are_those_of_the_network(ghost):
    model, x = nn.Sequential(ghost), torch.randn(X)

    def record():
        with record_routing_weights(model) as recording:
            y = model(x)
        return y, recording.calls

    (got, calls), (expected, expected_calls) = record(), without_kernels(record)
    close(got, expected)
    close(model(x), expected)
    assert calls.keys() == expected_calls.keys() == {"0.primary_conv.0", "0.cheap_operation.0"}
    for name, values in calls.items():
        assert len(values) == 1 and torch.allclose(values[0], expected_calls[name][0], atol=1e-6), name


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda ghost: pickle.loads(pickle.dumps(ghost))])
def test_copies_compute_the_same(ghost, copied):
    x = torch.randn(X)
    assert torch.equal(copied(ghost)(x), ghost(x))


def test_weights_changed_in_place_take_effect(ghost):
    x = torch.randn(X)
    before = ghost(x)
    ghost.primary_conv[0].weight.mul_(2)
    got = ghost(x)
    close(got, without_kernels(lambda: ghost(x)))
    assert not torch.allclose(got, before)


def test_the_output_may_be_changed_in_place(ghost):
    x = torch.randn(X)
    expected, before = ghost(x), x.clone()
    ghost(x).zero_()
    assert torch.equal(x, before) and torch.equal(ghost(x), expected)


# ---------------------------------------------------------------------------------------------------------------------
# Networks
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    model = timm.create_model("parameternet_50m", num_classes=7)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # residual branches start at zero, and would hide errors
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return frozen(model)


@pytest.fixture(scope="module")
def fused(network):
    return frozen(fuse(network))


@pytest.fixture(params=["fused", "network"])
def model(request):
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("size", [64, 97])
@pytest.mark.parametrize("batch", [1, 3])
def test_networks_compute_the_same(model, kernels, size, batch):
    torch.manual_seed(0)
    x = torch.randn(batch, 3, size, size)
    close(model(x), without_kernels(lambda: model(x)))


def test_networks_fuse_alike(network, fused):
    other = without_kernels(lambda: fuse(network))
    assert fused.fusing == other.fusing and fused.fusing.folded and not fused.fusing.left


def test_networks_do_not_depend_on_the_number_of_threads(model, kernels):
    x = torch.randn(2, 3, 97, 97)
    one, two = with_threads(lambda: model(x))
    close(two, one)


def test_samples_do_not_depend_on_their_batch(fused, kernels):
    x = torch.randn(5, 3, 64, 64)
    close(torch.cat([fused(image) for image in x.split(1)]), fused(x))


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_of_python_infer_at_the_same_time(fused, kernels, threads):
    torch.manual_seed(0)
    images = [torch.randn(batch, 3, size, size) for batch, size in ((1, 64), (2, 97), (3, 64), (1, 97))]
    expected, wrong = [fused(x) for x in images], []

    def infer(x, y):
        torch.set_num_threads(threads)  # a setting of each thread
        for _ in range(3):
            if not torch.allclose(fused(x), y, rtol=1e-5, atol=1e-5 * float(y.abs().max())):
                wrong.append(x.shape)

    workers = [threading.Thread(target=infer, args=pair) for pair in zip(images, expected, strict=True)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_a_block_with_residual_trains_after_inference():
    torch.manual_seed(0)
    block, x = ConvBnAct(8, 8, 3, skip=True).eval(), torch.randn(X)
    with torch.no_grad():
        block(x)
    block(x).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in block.parameters())


# ---------------------------------------------------------------------------------------------------------------------
# The library
# ---------------------------------------------------------------------------------------------------------------------


def loaded_from(folder):
    """A fresh copy of the module, as it is after an import."""
    spec = spec_from_file_location("native_again", folder / "__init__.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_kernels_are_built_where_they_can_be(monkeypatch):
    if not (
        sys.platform == "linux" and platform.machine() == "x86_64" and (shutil.which("c++") or shutil.which("g++"))
    ):
        pytest.skip("needs Linux on x86-64 and a C++ compiler")
    flags = Path("/proc/cpuinfo").read_text().split()
    if not {"avx2", "fma", "f16c"} <= set(flags):
        pytest.skip("needs a CPU with AVX2")
    monkeypatch.delenv("PARAMETERNET_NATIVE", raising=False)
    wide = {"avx512f", "avx512dq", "avx512bw", "avx512vl"} <= set(flags)
    assert loaded_from(FOLDER).level() == (2 if wide else 1), "install the package again: pip install -e ."


@pytest.mark.parametrize(("value", "most"), [("0", 0), ("avx2", 1), ("AVX2", 1), ("", 2), (None, 2)])
def test_the_environment_limits_the_kernels(monkeypatch, value, most):
    monkeypatch.delenv("PARAMETERNET_NATIVE", raising=False)
    built = loaded_from(FOLDER).level()
    if value is not None:
        monkeypatch.setenv("PARAMETERNET_NATIVE", value)
    assert loaded_from(FOLDER).level() == min(built, most)


def test_a_program_follows_the_environment():
    code = (
        "import importlib, os, torch; from parameternet import DynamicConv; from parameternet.layers import native;"
        "y = DynamicConv(8, 8).requires_grad_(False)(torch.randn(2, 8, 7, 7)); print(native.level(), *y.shape);"
        "os.environ['PARAMETERNET_NATIVE'] = 'avx2'; print(importlib.reload(native).level())"
    )
    environment = {**os.environ, "PARAMETERNET_NATIVE": "0", "PYTHONPATH": str(FOLDER.parents[2])}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    first, second = run.stdout.splitlines()
    assert first == "0 2 8 7 7"
    assert int(second) <= 1 and (LEVEL == 0 or second == "1")


@pytest.mark.parametrize("library", ["absent", "broken", "another"])
def test_a_package_without_a_usable_library_works(tmp_path, monkeypatch, library):
    monkeypatch.delenv("PARAMETERNET_NATIVE", raising=False)
    shutil.copy(FOLDER / "__init__.py", tmp_path)
    if library == "broken":
        (tmp_path / "_kernels.so").write_bytes(b"not a library")
    elif library == "another":
        found = next(iter(Path(torch.__file__).parent.glob("lib/libc10.so")), None)
        if found is None:
            pytest.skip("this torch has no shared library to stand in")
        (tmp_path / "_kernels.so").symlink_to(found)
    module = loaded_from(tmp_path)
    assert module.level() == 0 and not module.ready(torch.randn(1, 1, 1, 1))


def test_layers_work_without_kernels(layer, x):
    with torch.no_grad():
        y = without_kernels(lambda: layer(x))
    assert y.isfinite().all()
