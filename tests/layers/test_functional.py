"""Every strategy against the naive loop: outputs and all gradients."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from reference import assert_no_worse, naive_dynamic_conv2d

from parameternet.layers import STRATEGIES, dynamic_conv2d
from parameternet.layers.functional import choose_strategy

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
    return {"batched_matmul": pointwise, "gated_inputs": pointwise, "shifted": depthwise}.get(strategy, True)


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


def test_second_derivatives_of_a_depthwise_layer():
    values = inputs(
        {**CASES["depthwise"], "batch": 2, "size": (4, 3), "cin": 2, "cout": 2, "groups": 2}, 2, torch.float64
    )
    leaves = [value.requires_grad_() for value in values.values()]
    assert torch.autograd.gradgradcheck(
        lambda x, weight, routing: dynamic_conv2d(x, weight, routing, padding=(1, 1), groups=2), leaves
    )


def test_small_maps_gate_the_inputs_and_graphs_keep_the_batch_free():
    routing = torch.rand(2, 4)
    pointwise, depthwise, dense = torch.rand(32, 6, 1, 1), torch.rand(24, 1, 3, 3), torch.rand(32, 6, 3, 3)
    small, large = torch.rand(2, 6, 2, 2), torch.rand(2, 6, 7, 7)
    assert choose_strategy(small, pointwise, routing) == "gated_inputs"
    assert choose_strategy(large, pointwise, routing) == "batched_matmul"
    assert choose_strategy(large, pointwise, routing, stride=(4, 4)) == "gated_inputs"
    assert choose_strategy(small, pointwise, routing, free_batch=True) == "batched_matmul"
    assert choose_strategy(large, depthwise, routing, groups=6) == "grouped"
    assert choose_strategy(large, depthwise, routing, groups=6, free_batch=True) == "shifted"
    assert choose_strategy(large, dense, routing, free_batch=True) == "wide"


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
        ({"strategy": "fast"}, "unknown strategy 'fast'; there are grouped"),
    ],
)
def test_errors_show_the_values(change, message):
    good = {"x": torch.rand(3, 8, 5, 5), "weight": torch.rand(24, 8, 1, 1), "routing_weights": torch.rand(3, 4)}
    with pytest.raises(ValueError, match=message):
        dynamic_conv2d(**{**good, **change})
