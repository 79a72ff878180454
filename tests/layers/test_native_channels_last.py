"""Native kernels for channels last: outputs and gradients of the naive loop, and networks that stay channels last."""

import pytest
import timm
import torch
from reference import naive_dynamic_conv2d
from test_native import assert_exact, calls, close, kernels, needs_library, operands, with_threads, without_kernels  # noqa: F401
from test_native_training import assert_exact_gradients, assert_same, gradient_calls, gradients, squares  # noqa: F401

from parameternet import DynamicConv

pytestmark = needs_library

SIZES = [(1, 5), (3, 3), (7, 7), (8, 8), (9, 13), (24, 25)]
CHANNELS = [2, 3, 16, 17, 40, 130]
OUT = [1, 2, 7, 16, 33, 70]
BATCHES = [1, 2, 5]
EXPERTS = [1, 2, 4, 5]
DEPTHWISE = [  # kernel, stride, padding, dilation
    ((1, 1), (1, 1), (0, 0), (1, 1)),
    ((3, 3), (1, 1), (1, 1), (1, 1)),
    ((3, 3), (2, 2), (1, 1), (1, 1)),
    ((3, 3), (2, 2), (0, 0), (1, 1)),
    ((3, 3), (1, 1), (5, 5), (1, 1)),
    ((3, 3), (3, 3), (1, 1), (2, 2)),
    ((5, 5), (1, 1), (2, 2), (1, 1)),
    ((5, 5), (2, 2), (2, 2), (1, 1)),
    ((3, 5), (2, 1), (0, 4), (1, 2)),
    ((7, 7), (1, 1), (3, 3), (1, 1)),
    ((2, 4), (2, 3), (1, 0), (3, 1)),
]


def last(x):
    return x.contiguous(memory_format=torch.channels_last)


def is_last(x):
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_pointwise_is_as_exact_as_the_naive_loop(kernels, size):  # noqa: F811
    torch.manual_seed(0)
    turn = SIZES.index(size)
    for i, out in enumerate(OUT):
        channels, batch = CHANNELS[(i + turn) % len(CHANNELS)], BATCHES[(i + turn // 2) % len(BATCHES)]
        experts = EXPERTS[(i + turn // 3) % len(EXPERTS)]
        name = f"batch {batch}, {channels} -> {out} channels, {experts} experts"
        x, *others = operands(batch, channels, out, experts, size)
        assert_exact(name, with_threads(lambda: kernels.pointwise_last(last(x), *others)), x, *others)  # noqa: B023

        tensors = x, *others[:2], torch.randn(batch, out, *size)
        seen = last(x), *others[:2], last(tensors[3])
        results = with_threads(lambda: kernels.pointwise_gradients(*seen, True, True))  # noqa: B023
        assert all(is_last(grads[0]) for grads in results), name
        assert_exact_gradients(name, results, *tensors)


@pytest.mark.parametrize(("channels", "out"), [(300, 310), (700, 33), (33, 700)])
@pytest.mark.parametrize("batch", [1, 3])
def test_pointwise_of_many_channels_is_split(kernels, channels, out, batch):  # noqa: F811
    torch.manual_seed(0)
    x, weight, routing_weights, bias = operands(batch, channels, out, 3, (5, 7))
    results = with_threads(lambda: kernels.pointwise_last(last(x), weight, routing_weights, bias))
    assert_exact("many channels", results, x, weight, routing_weights, bias)
    grad = torch.randn(batch, out, 5, 7)
    results = with_threads(
        lambda: kernels.pointwise_gradients(last(x), weight, routing_weights, last(grad), True, True)
    )
    assert_exact_gradients("many channels", results, x, weight, routing_weights, grad)


@pytest.mark.parametrize("conv", DEPTHWISE, ids=str)
def test_depthwise_is_as_exact_as_the_naive_loop(kernels, conv):  # noqa: F811
    torch.manual_seed(0)
    kernel, *axes = conv
    stride, padding, dilation = axes
    named = dict(stride=stride, padding=padding, dilation=dilation)
    turn = DEPTHWISE.index(conv)
    for i, size in enumerate([*SIZES, (40, 41)]):
        if any(s + 2 * p <= d * (k - 1) for s, p, d, k in zip(size, padding, dilation, kernel, strict=True)):
            continue
        channels, batch = CHANNELS[(i + turn) % len(CHANNELS)], BATCHES[(i + turn // 2) % len(BATCHES)]
        experts = EXPERTS[(i + turn // 3) % len(EXPERTS)]
        name = f"{size}, batch {batch}, {channels} channels, {experts} experts"
        x, weight, routing_weights, bias = operands(batch, channels, channels, experts, size, kernel)
        given = last(x), weight, routing_weights
        results = with_threads(lambda: kernels.depthwise_last(*given, bias, *axes))  # noqa: B023
        assert_exact(name, results, x, weight, routing_weights, bias, **named, groups=channels)

        grad = torch.randn(results[0].shape)
        results = with_threads(
            lambda: kernels.depthwise_last_gradients(*given, last(grad), *axes, True, True)  # noqa: B023
        )
        assert_exact_gradients(name, results, x, weight, routing_weights, grad, **named, groups=channels)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_sample_that_is_not_finite_spoils_the_same_numbers_as_in_torch(kernels, value):  # noqa: F811
    torch.manual_seed(0)
    x, weight, routing_weights, _ = operands(2, 20, 20, 2, (9, 9), (3, 3))
    x[1, 17, 4, 4] = value
    got = kernels.depthwise_last(last(x), weight, routing_weights, None, (2, 2), (1, 1), (1, 1))
    expected = naive_dynamic_conv2d(x, weight, routing_weights, stride=(2, 2), padding=(1, 1), groups=20)
    assert torch.equal(got.isfinite(), expected.isfinite())
    grad = last(torch.ones_like(got))
    grad_x = kernels.depthwise_last_gradients(
        last(x), weight, routing_weights, grad, (2, 2), (1, 1), (1, 1), of_x=True, of_weight=False
    )[0]
    assert grad_x.isfinite().all()


LAYERS = {  # the layer, and the kernels of its forward and backward pass
    "pointwise": (lambda: DynamicConv(8, 12, num_experts=3), "pointwise_last", "pointwise_gradients"),
    "pointwise-biases": (lambda: DynamicConv(8, 5, bias=True, num_experts=2), "pointwise_last", "pointwise_gradients"),
    "depthwise": (lambda: DynamicConv(8, 8, 3, groups=8, padding=1), "depthwise_last", "depthwise_last_gradients"),
    "strided": (lambda: DynamicConv(8, 8, 5, 2, 2, groups=8, bias=True), "depthwise_last", "depthwise_last_gradients"),
    "dilated": (lambda: DynamicConv(8, 8, 3, dilation=2, groups=8), "depthwise_last", "depthwise_last_gradients"),
}


@pytest.mark.parametrize(("make", "forward", "backward"), LAYERS.values(), ids=LAYERS)
def test_layers_run_in_the_kernels_and_stay_channels_last(calls, gradient_calls, make, forward, backward):  # noqa: F811
    torch.manual_seed(0)
    layer = make()
    x = last(torch.randn(3, 8, 7, 9))
    with torch.inference_mode():
        y = layer(x)
        assert forward in calls and is_last(y)
        close(y, without_kernels(lambda: layer(x)))
    x.requires_grad_()
    got = gradients(layer, x, squares)
    assert gradient_calls == [backward] and is_last(got["x"])
    assert_same(got, without_kernels(lambda: gradients(layer, x, squares)))


@pytest.mark.parametrize(("make", "forward", "backward"), LAYERS.values(), ids=LAYERS)
def test_gradients_of_gradients_are_torchs(make, forward, backward):
    torch.manual_seed(0)
    layer, x = make(), last(torch.randn(3, 8, 7, 9)).requires_grad_()

    def second():
        (grad,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), [x, *layer.parameters()], allow_unused=True)

    for got, expected in zip(second(), without_kernels(second), strict=True):
        assert (got is None) == (expected is None)
        if got is not None:
            close(got, expected, 1e-4)


def test_other_layouts_are_left_to_torch(calls):  # noqa: F811
    torch.manual_seed(0)
    depthwise = DynamicConv(8, 8, 3, groups=8).eval()
    x, turned = last(torch.randn(4, 8, 7, 9)), torch.randn(4, 8, 9, 7).transpose(2, 3)
    for given in (x[:, :, 1:], turned, x.double()):
        layer = depthwise.to(given.dtype)
        with torch.inference_mode():
            close(layer(given), without_kernels(lambda: layer(given)))  # noqa: B023
    assert not {"pointwise_last", "depthwise_last", "pointwise"} & set(calls)


@pytest.mark.parametrize(
    ("batch", "stride", "kernel"),
    [(1, 1, "pointwise"), (3, 1, "pointwise"), (3, 2, "pointwise"), (4, 1, "pointwise_last"), (4, 2, "pointwise_last")],
)
def test_pointwise_layers_of_few_images_and_with_strides(calls, batch, stride, kernel):  # noqa: F811
    torch.manual_seed(0)
    layer, x = DynamicConv(8, 12, stride=stride).eval(), last(torch.randn(batch, 8, 7, 9))
    with torch.inference_mode():
        got = layer(x)
        assert kernel in calls and is_last(got)
        close(got, without_kernels(lambda: layer(x)))


def test_a_network_in_channels_last_exports_with_gradients_enabled():
    layer, x = DynamicConv(8, 16).eval(), last(torch.randn(6, 8, 7, 9))
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2, max=64)},))
    for batch in (2, 9):
        given = last(torch.randn(batch, 8, 7, 9))
        close(program.module()(given), layer(given).detach())


def test_wrong_weights_are_refused(kernels):  # noqa: F811
    x, weight, routing_weights, _ = operands(2, 8, 8, 2, (7, 7), (3, 3))
    with pytest.raises(ValueError, match="8 kernels for each expert"):
        kernels.depthwise_last(last(x), weight[:8], routing_weights, None, (1, 1), (1, 1), (1, 1))
    with pytest.raises(ValueError, match="routing_weights of shape"):
        kernels.pointwise_last(last(x), weight[:, :, :1, :1], routing_weights, None)


@pytest.mark.parametrize("name", ["dynamic_efficientnet_lite0", "parameternet_50m"])
def test_networks_in_channels_last_train_as_without_kernels(calls, gradient_calls, name):  # noqa: F811
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, drop_rate=0.0).train().to(memory_format=torch.channels_last)
    x = last(torch.randn(4, 3, 64, 64))

    def grads(dtype=torch.float32):
        copy = model.to(dtype)
        copy.zero_grad()
        copy(x.to(dtype)).square().sum().backward()
        return {n: p.grad.clone() for n, p in copy.named_parameters() if p.grad is not None}

    state = {k: v.clone() for k, v in model.state_dict().items()}
    got = grads()
    assert {"pointwise_last", "depthwise_last"} <= set(calls) and "depthwise_last_gradients" in gradient_calls
    model.load_state_dict(state)
    single = without_kernels(grads)
    model.load_state_dict(state)
    exact = without_kernels(lambda: grads(torch.float64))
    assert got.keys() == exact.keys()
    # Through fifty layers with batch norm, rounding grows: whole gradients are compared.
    distance = [
        torch.stack([(g[n].double() - exact[n]).square().sum() for n in exact]).sum().sqrt() for g in (got, single)
    ]
    assert distance[0] <= 3 * distance[1] + 1e-12, f"{distance[0]:.3g} with kernels, {distance[1]:.3g} without"
