"""Every strategy against the naive loop: outputs and all gradients."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from reference import assert_no_worse, naive_dynamic_conv2d
from torch._subclasses.fake_tensor import FakeTensorMode

from parameternet.layers import STRATEGIES, dynamic_conv2d, strategies
from parameternet.layers.dispatch import check_strategy, choose_strategy

# Batch, experts, channels and sides all differ, so that a swapped axis cannot hide.
CASES = {
    "pointwise": {"batch": 3, "cin": 8, "cout": 12, "kernel": (1, 1)},
    "pointwise-one-sample": {"batch": 1, "cin": 8, "cout": 12, "kernel": (1, 1)},
    "pointwise-strided": {"batch": 3, "cin": 8, "cout": 10, "kernel": (1, 1), "stride": (2, 3)},
    "pointwise-few-positions": {"batch": 5, "cin": 8, "cout": 6, "kernel": (1, 1), "size": (1, 3)},
    "pointwise-bias": {"batch": 3, "cin": 8, "cout": 12, "kernel": (1, 1), "bias": True},
    "pointwise-groups": {"batch": 3, "cin": 8, "cout": 12, "kernel": (1, 1), "groups": 4},
    "pointwise-padded": {"batch": 2, "cin": 4, "cout": 6, "kernel": (1, 1), "padding": (1, 0)},
    "neighbour-mixup": {"batch": 3, "cin": 8, "cout": 12, "kernel": (3, 3), "stride": (2, 2), "padding": (1, 1)},
    "group-order": {"batch": 2, "cin": 12, "cout": 8, "kernel": (5, 5), "groups": 2, "stride": (2, 2)},
    "rectangular": {"batch": 2, "cin": 6, "cout": 4, "kernel": (1, 5), "padding": (0, 2)},
    "dilated": {"batch": 2, "cin": 6, "cout": 4, "kernel": (3, 3), "dilation": (2, 1), "padding": (2, 1)},
    "stem-bias": {"batch": 5, "cin": 3, "cout": 8, "kernel": (3, 3), "stride": (2, 2), "padding": (1, 1), "bias": True},
    "depthwise": {"batch": 3, "cin": 8, "cout": 8, "kernel": (3, 3), "groups": 8, "padding": (1, 1)},
    "depthwise-strided": {
        "batch": 2,
        "cin": 6,
        "cout": 6,
        "kernel": (5, 5),
        "groups": 6,
        "stride": (2, 2),
        "padding": (2, 2),
    },
    "depthwise-dilated": {
        "batch": 2,
        "cin": 6,
        "cout": 6,
        "kernel": (3, 5),
        "groups": 6,
        "dilation": (2, 1),
        "stride": (1, 2),
        "padding": (1, 2),
    },
    "depthwise-map-below-kernel": {
        "batch": 3,
        "cin": 6,
        "cout": 6,
        "kernel": (5, 5),
        "groups": 6,
        "padding": (2, 2),
        "size": (2, 3),
    },
    "depthwise-one-position": {
        "batch": 3,
        "cin": 6,
        "cout": 6,
        "kernel": (3, 3),
        "groups": 6,
        "padding": (1, 1),
        "size": (1, 1),
    },
    "depthwise-multiplier": {"batch": 2, "cin": 6, "cout": 12, "kernel": (3, 3), "groups": 6, "padding": (1, 1)},
}
# Float64 is the reference's own type; gradcheck covers it below.
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def conv_args(case):
    return {name: case[name] for name in ("stride", "padding", "dilation", "groups") if name in case}


def inputs(case, experts, dtype):
    generator = torch.Generator().manual_seed(0)
    cin, cout, groups = case["cin"], case["cout"], case.get("groups", 1)
    shapes = {
        "x": (case["batch"], cin, *case.get("size", (13, 9))),
        "weight": (experts * cout, cin // groups, *case["kernel"]),
        "routing_weights": (case["batch"], experts),
    }
    if case.get("bias"):
        shapes["bias"] = (experts * cout,)
    # Rounded once to the dtype under test, so that only the arithmetic is compared.
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def outputs_and_gradients(function, case, values, dtype):
    leaves = {name: value.detach().clone().to(dtype).requires_grad_() for name, value in values.items()}
    y = function(**leaves, **conv_args(case))
    target = torch.linspace(-1, 1, y.numel()).reshape(y.shape).to(y.dtype)
    (y * target).sum().backward()
    return {"output": y.detach(), **{f"d_{name}": leaf.grad for name, leaf in leaves.items()}}


def takes(strategy, case):
    pointwise = case["kernel"] == (1, 1) and case.get("groups", 1) == 1 and case.get("padding", (0, 0)) == (0, 0)
    depthwise = case.get("groups", 1) == case["cin"] == case["cout"]
    return {
        "batched_matmul": pointwise,
        "gated_inputs": pointwise,
        "gated_outputs": pointwise,
        "shifted": depthwise,
    }.get(strategy, True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("strategy", [None, *STRATEGIES])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_as_accurate_as_the_naive_loop(case, strategy, dtype):
    for experts in (1, 4):
        values = inputs(case, experts, dtype)
        run = partial(dynamic_conv2d, strategy=strategy)
        if not takes(strategy, case):
            with pytest.raises(ValueError, match=f"strategy '{strategy}' takes only"):
                run(**values, **conv_args(case))
            continue
        got = outputs_and_gradients(run, case, values, dtype)
        naive = outputs_and_gradients(naive_dynamic_conv2d, case, values, dtype)
        exact = outputs_and_gradients(naive_dynamic_conv2d, case, values, torch.float64)
        for name in exact:
            assert got[name].dtype == dtype
            assert_no_worse(name, got[name], naive[name], exact[name])


@pytest.mark.parametrize("name", ["pointwise-few-positions", "stem-bias", "depthwise-strided", "group-order"])
def test_gradients_by_finite_differences(name):
    case = {**CASES[name], "batch": 2}
    case.setdefault("size", (5, 4) if case["kernel"] != (5, 5) else (6, 5))
    values = inputs(case, 2, torch.float64)
    leaves = [value.requires_grad_() for value in values.values()]
    run = partial(dynamic_conv2d, **conv_args(case))
    assert torch.autograd.gradcheck(lambda *tensors: run(**dict(zip(values, tensors, strict=True))), leaves)


@pytest.mark.parametrize("name", ["pointwise-strided", "group-order", "depthwise"])
@pytest.mark.parametrize("large", [False, True])
def test_second_derivatives(name, large, request):
    if large:
        request.getfixturevalue("few_at_a_time")
    case = {**CASES[name], "batch": 2, "size": (4, 3) if name != "group-order" else (5, 6)}
    case |= {"cin": 2, "cout": 2, "groups": min(CASES[name].get("groups", 1), 2)}
    leaves = [value.requires_grad_() for value in inputs(case, 2, torch.float64).values()]
    function = partial(dynamic_conv2d, **conv_args(case))
    assert torch.autograd.gradgradcheck(lambda x, weight, routing_weights: function(x, weight, routing_weights), leaves)


@pytest.fixture
def few_at_a_time(monkeypatch):
    """Two samples a part, whatever the machine."""
    monkeypatch.setattr(strategies, "CACHED_BYTES", 0)
    monkeypatch.setattr(strategies, "HEAP_BYTES", 0)
    monkeypatch.setattr(strategies, "FEWEST_SAMPLES", 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["pointwise", "pointwise-strided", "stem-bias", "group-order", "depthwise"])
def test_parts_of_a_batch_add_up(name, dtype, few_at_a_time):
    case = {**CASES[name], "batch": 5}
    values = inputs(case, 3, dtype)
    assert strategies.samples_at_a_time(values["weight"], values["routing_weights"]) == 2
    got = outputs_and_gradients(dynamic_conv2d, case, values, dtype)
    naive = outputs_and_gradients(naive_dynamic_conv2d, case, values, dtype)
    exact = outputs_and_gradients(naive_dynamic_conv2d, case, values, torch.float64)
    for quantity in exact:
        assert_no_worse(quantity, got[quantity], naive[quantity], exact[quantity])
    output_bias = torch.randn(case["cout"]).to(dtype)
    with torch.no_grad():
        shifted = dynamic_conv2d(**values, **conv_args(case), output_bias=output_bias)
    assert_no_worse(
        "shifted",
        shifted,
        naive["output"] + output_bias[:, None, None],
        exact["output"] + output_bias.double()[:, None, None],
    )


@pytest.mark.parametrize("strategy", [None, *STRATEGIES])
@pytest.mark.parametrize("name", ["pointwise", "pointwise-one-sample", "stem-bias", "depthwise-strided"])
def test_a_shift_is_not_mixed(name, strategy):
    case = CASES[name]
    if not takes(strategy, case):
        return
    values = {n: v.requires_grad_() for n, v in inputs(case, 3, torch.float64).items()}
    output_bias = torch.randn(case["cout"], dtype=torch.float64, requires_grad=True)
    y = dynamic_conv2d(**values, **conv_args(case), strategy=strategy, output_bias=output_bias)
    expected = naive_dynamic_conv2d(**values, **conv_args(case)) + output_bias[:, None, None]
    assert torch.allclose(y, expected, rtol=1e-12, atol=1e-12)
    leaves = [*values.values(), output_bias]
    for got, want in zip(
        torch.autograd.grad(y.square().sum(), leaves),
        torch.autograd.grad(expected.square().sum(), leaves),
        strict=True,
    ):
        assert torch.allclose(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_one_image_without_gradients(case, dtype, shifted):
    case = case | {"batch": 1}
    values, shift = inputs(case, 3, dtype), torch.randn(case["cout"]).to(dtype) if shifted else None
    with torch.no_grad():
        naive = naive_dynamic_conv2d(**values, **conv_args(case))
        exact = naive_dynamic_conv2d(**{n: v.double() for n, v in values.items()}, **conv_args(case))
        values["routing_weights"] = values["routing_weights"].float()  # routers answer in float32
        found = dynamic_conv2d(**values, **conv_args(case), output_bias=shift)
    if shift is not None:
        naive, exact = naive + shift[:, None, None], exact + shift[:, None, None].double()
    assert found.dtype == dtype
    assert_no_worse("output", found, naive, exact)


@pytest.mark.parametrize("name", ["pointwise", "neighbour-mixup", "depthwise"])
def test_large_kernels_are_not_kept_for_backward(name, few_at_a_time):
    leaves = {n: v.requires_grad_() for n, v in inputs({**CASES[name], "batch": 3}, 4, torch.float32).items()}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        dynamic_conv2d(**leaves, **conv_args(CASES[name]))
    assert set(kept) == {leaf.data_ptr() for leaf in leaves.values()}


@pytest.mark.parametrize("strategy", [None, "grouped", "batched_matmul"])
def test_only_the_gradients_asked_for(strategy):
    values = inputs(CASES["pointwise"], 2, torch.float32)
    for name in values:
        leaves = {n: v.clone().requires_grad_(n == name) for n, v in values.items()}
        dynamic_conv2d(**leaves, strategy=strategy).sum().backward()
        assert [n for n, leaf in leaves.items() if leaf.grad is not None] == [name]


@pytest.mark.parametrize("name", ["pointwise", "pointwise-strided", "neighbour-mixup", "depthwise"])
def test_channels_last_inputs(name):
    values = inputs(CASES[name], 4, torch.float32)
    expected = dynamic_conv2d(**values, **conv_args(CASES[name]))
    values["x"] = values["x"].to(memory_format=torch.channels_last)
    assert torch.allclose(dynamic_conv2d(**values, **conv_args(CASES[name])), expected, rtol=1e-5, atol=1e-5)


def test_small_maps_gate_inputs_or_outputs_but_not_in_graphs():
    routing = torch.rand(2, 4)
    pointwise, depthwise, dense = torch.rand(32, 6, 1, 1), torch.rand(24, 1, 3, 3), torch.rand(32, 6, 3, 3)
    small, large = torch.rand(2, 6, 2, 2), torch.rand(2, 6, 7, 7)
    assert choose_strategy(small, pointwise, routing) == "gated_inputs"
    assert choose_strategy(small, torch.rand(4 * 5, 6, 1, 1), routing) == "gated_outputs"
    assert choose_strategy(large, pointwise, routing) == "batched_matmul"
    assert choose_strategy(large, pointwise, routing, stride=(4, 4)) == "gated_inputs"
    assert choose_strategy(small, pointwise, routing, recorded=True) == "batched_matmul"
    assert choose_strategy(large, depthwise, routing, groups=6) == "grouped"
    # Recorded for one batch size; graphs with a free batch are tested where they are recorded.
    assert choose_strategy(large, depthwise, routing, groups=6, recorded=True) == "grouped"
    assert choose_strategy(large, dense, routing, recorded=True) == "grouped"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("batch", "side", "strategy"),
    [(2, 3, "gated_inputs"), (2, 4, "batched_matmul"), (128, 4, "gated_inputs"), (128, 5, "batched_matmul")],
)
def test_in_half_precision_more_positions_are_few(dtype, batch, side, strategy):
    """And yet more if the kernels of the batch are large."""
    with FakeTensorMode():
        x, weight = torch.empty(batch, 232, side, side, dtype=dtype), torch.empty(4 * 696, 232, 1, 1, dtype=dtype)
        routing = torch.empty(batch, 4, dtype=dtype)
        assert choose_strategy(x, weight, routing) == strategy
        assert choose_strategy(x, weight, routing, recorded=True) == "batched_matmul"
        assert choose_strategy(x.float(), weight.float(), routing.float()) == "batched_matmul"


@pytest.mark.parametrize(
    ("experts", "cin", "cout", "side", "strategy"),
    [
        (4, 152, 190, 4, "batched_matmul"),
        (4, 212, 638, 4, "gated_inputs"),
        (4, 1276, 106, 4, "wide"),
        (4, 80, 240, 14, "batched_matmul"),
        (1, 80, 240, 14, "wide"),
    ],
)
def test_on_cuda_few_positions_gate_the_smaller_side(experts, cin, cout, side, strategy):
    with FakeTensorMode():
        x = torch.empty(8, cin, side, side, device="cuda")
        weight = torch.empty(experts * cout, cin, 1, 1, device="cuda")
        assert choose_strategy(x, weight, torch.empty(8, experts, device="cuda")) == strategy


def test_one_expert_is_a_static_convolution_whose_output_is_scaled():
    routing, x = torch.rand(2, 1), torch.rand(2, 6, 7, 7)
    pointwise, depthwise, dense = torch.rand(8, 6, 1, 1), torch.rand(6, 1, 3, 3), torch.rand(8, 6, 3, 3)
    for weight, groups in ((pointwise, 1), (dense, 1), (depthwise, 6)):
        assert choose_strategy(x, weight, routing, groups=groups, recorded=True) == "wide"
    assert choose_strategy(x, pointwise, routing) == choose_strategy(x, dense, routing) == "wide"
    assert choose_strategy(x, depthwise, routing, groups=6) == "grouped"  # which trains faster


def test_an_empty_batch_gives_an_empty_output_and_gradients():
    weight = torch.rand(8, 3, 3, 3, requires_grad=True)
    y = dynamic_conv2d(torch.rand(0, 3, 8, 8), weight, torch.rand(0, 2), stride=2)
    assert y.shape == F.conv2d(torch.rand(0, 3, 8, 8), torch.rand(4, 3, 3, 3), stride=2).shape
    y.sum().backward()
    assert weight.grad.abs().sum() == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.rand(3, 8, 8)}, r"x must be \(batch, channels, height, width\), got shape \(3, 8, 8\)"),
        ({"weight": torch.rand(4, 8, 6)}, r"weight must be .* got shape \(4, 8, 6\)"),
        ({"routing_weights": torch.rand(2, 4)}, r"batch = 3, got shape \(2, 4\)"),
        ({"routing_weights": torch.rand(3, 5)}, "24 kernels, which 5 experts cannot share"),
        ({"groups": 4}, "8 channels .* 6 kernels of 8 channels, which groups=4 does not fit"),
        ({"groups": 0}, "groups=0"),
        ({"bias": torch.rand(6)}, r"\(24,\), got \(6,\)"),
        ({"output_bias": torch.rand(24)}, r"output_bias must be \(out,\) = \(6,\), got \(24,\)"),
        ({"strategy": "fast"}, "unknown strategy 'fast'; there are grouped"),
    ],
)
def test_errors_show_the_values(change, message):
    good = {"x": torch.rand(3, 8, 5, 5), "weight": torch.rand(24, 8, 1, 1), "routing_weights": torch.rand(3, 4)}
    with pytest.raises(ValueError, match=message):
        dynamic_conv2d(**{**good, **change})


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_table_says_what_the_check_refuses(case, name):
    values = inputs(case, 2, torch.float32)
    padding, groups = case.get("padding", (0, 0)), case.get("groups", 1)
    kinds = {
        "all": True,
        "pointwise": strategies.is_pointwise(values["weight"], padding, groups),
        "depthwise": strategies.is_depthwise(values["weight"], groups, 2),
    }
    try:
        check_strategy(name, values["weight"], padding, groups, 2)
    except ValueError:
        assert not kinds[STRATEGIES[name].takes]
    else:
        assert kinds[STRATEGIES[name].takes]
