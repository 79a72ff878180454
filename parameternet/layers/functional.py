"""`dynamic_conv2d`: one kernel a sample, mixed from several experts; the same sum computed in several orders.

For sample b, with routing weights alpha and expert kernels W_e: W_b = sum_e alpha_be W_e and y_b = W_b * x_b. The
experts are one 4-D tensor, expert-major: `weight[e * out : (e + 1) * out]` is the kernel of expert e.

A strategy is a plain function `(x, weight, routing_weights, geometry) -> y`. `STRATEGIES` names them all,
`choose_strategy` says which one runs where.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["STRATEGIES", "choose_strategy", "depthwise_conv2d", "dynamic_conv2d", "pair"]


class Geometry(NamedTuple):
    """What a convolution is besides its kernel; pairs are (h, w)."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int


def pair(value: int | tuple[int, int]) -> tuple[int, int]:
    """(h, w) from a number, which stands for both, or from two numbers."""
    if isinstance(value, int):
        return value, value
    h, w = value
    return int(h), int(w)


def _mix(weight: Tensor, routing_weights: Tensor) -> Tensor:
    """Experts (E * out, in / groups, kh, kw) and routing (B, E) -> kernels (B, out * in / groups * kh * kw)."""
    return routing_weights @ weight.reshape(routing_weights.shape[1], -1)


def _grouped(x: Tensor, weight: Tensor, routing_weights: Tensor, geometry: Geometry) -> Tensor:
    """Mix B kernels, fold the batch into the channels, convolve once with B * groups groups. Takes every shape."""
    batch, experts = routing_weights.shape
    shape = [batch, weight.shape[0] // experts, weight.shape[1], weight.shape[2], weight.shape[3]]
    return _convolve_samples(x, _mix(weight, routing_weights).reshape(shape), geometry)


def _batched_matmul(x: Tensor, weight: Tensor, routing_weights: Tensor, geometry: Geometry) -> Tensor:
    """Mix B kernels and apply each to its sample by a batched matrix product. Pointwise; the batch stays free."""
    x = _subsample(x, geometry.stride)
    batch, channels, height, width = x.shape
    out = weight.shape[0] // routing_weights.shape[1]
    kernels = _mix(weight, routing_weights).reshape(batch, out, channels)
    return torch.bmm(kernels, x.reshape(batch, channels, height * width)).reshape(batch, out, height, width)


def _gated_inputs(x: Tensor, weight: Tensor, routing_weights: Tensor, geometry: Geometry) -> Tensor:
    """[W_1 ... W_E] [alpha_1 x; ...; alpha_E x] as one product: no kernel a sample, E times the products. Pointwise."""
    x = _subsample(x, geometry.stride)
    batch, channels, height, width = x.shape
    experts = routing_weights.shape[1]
    out = weight.shape[0] // experts
    rows = x.permute(0, 2, 3, 1).reshape(batch, height * width, 1, channels)
    gated = (rows * routing_weights.reshape(batch, 1, experts, 1)).reshape(-1, experts * channels)
    stacked = weight.reshape(experts, out, channels).transpose(0, 1).reshape(out, experts * channels)
    return F.linear(gated, stacked).reshape(batch, height, width, out).permute(0, 3, 1, 2)


def _shifted(x: Tensor, weight: Tensor, routing_weights: Tensor, geometry: Geometry) -> Tensor:
    """Add up shifted copies of x times one tap each. Depthwise; the batch stays free and compilers fuse it."""
    kh, kw = weight.shape[2], weight.shape[3]
    kernels = _mix(weight, routing_weights).reshape(x.shape[0], geometry.groups, kh * kw)
    (stride_h, stride_w), (dilation_h, dilation_w) = geometry.stride, geometry.dilation
    x = F.pad(x, [geometry.padding[1], geometry.padding[1], geometry.padding[0], geometry.padding[0]])
    # From a first row or column to behind the last that one tap reads.
    rows = (x.shape[2] - dilation_h * (kh - 1) - 1) // stride_h * stride_h + 1
    columns = (x.shape[3] - dilation_w * (kw - 1) - 1) // stride_w * stride_w + 1
    terms = []
    for tap in range(kh * kw):
        top, left = tap // kw * dilation_h, tap % kw * dilation_w
        seen = x[:, :, top : top + rows : stride_h, left : left + columns : stride_w]
        terms.append(seen * kernels[:, :, tap, None, None])
    y = terms[0]
    for term in terms[1:]:
        y = y + term
    return y


def _wide(x: Tensor, weight: Tensor, routing_weights: Tensor, geometry: Geometry) -> Tensor:
    """Convolve with all experts, then add their outputs up. Constant kernels and a free batch, E times the products."""
    experts, groups = routing_weights.shape[1], geometry.groups
    out, channels, kh, kw = weight.shape[0] // experts, weight.shape[1], weight.shape[2], weight.shape[3]
    # A grouped convolution wants its kernels group by group, and they lie expert by expert.
    by_group = weight.reshape(experts, groups, out // groups, channels, kh, kw).transpose(0, 1)
    y = _conv2d(x, by_group.reshape(weight.shape), geometry)
    height, width = y.shape[2], y.shape[3]
    y = y.reshape(-1, groups, experts, out // groups, height, width)
    return (y * routing_weights.reshape(-1, 1, experts, 1, 1, 1)).sum(2).reshape(-1, out, height, width)


STRATEGIES = {
    "grouped": _grouped,
    "batched_matmul": _batched_matmul,
    "gated_inputs": _gated_inputs,
    "shifted": _shifted,
    "wide": _wide,
}


def _subsample(x: Tensor, stride: tuple[int, int]) -> Tensor:
    """The positions that a strided 1 x 1 kernel reads."""
    if stride[0] == 1 and stride[1] == 1:
        return x
    return x[:, :, :: stride[0], :: stride[1]]


def _conv2d(x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    return F.conv2d(x, weight, None, geometry.stride, geometry.padding, geometry.dilation, geometry.groups)


def _convolve_samples(x: Tensor, kernels: Tensor, geometry: Geometry) -> Tensor:
    """x (B, in, H, W) by kernels (B, out, in / groups, kh, kw), one a sample, with the batch folded into the groups."""
    batch, out = kernels.shape[0], kernels.shape[1]
    x = x.reshape(1, batch * x.shape[1], x.shape[2], x.shape[3])
    kernels = kernels.reshape(batch * out, kernels.shape[2], kernels.shape[3], kernels.shape[4])
    folded = Geometry(geometry.stride, geometry.padding, geometry.dilation, batch * geometry.groups)
    if not torch.jit.is_scripting() and _gains_by_own_gradient(x, kernels, folded.groups):
        y = _DepthwiseConv.apply(x, kernels, folded)
    else:
        y = _conv2d(x, kernels, folded)
    return y.reshape(batch, out, y.shape[2], y.shape[3])


@torch.jit.unused
def _gains_by_own_gradient(x: Tensor, kernels: Tensor, groups: int) -> bool:
    depthwise = kernels.shape[0] == groups == x.shape[1] and min(x.shape[2], x.shape[3]) > 1
    return depthwise and kernels.requires_grad and x.device.type == "cpu" and not torch.is_autocast_enabled("cpu")


class _DepthwiseConv(torch.autograd.Function):
    """Depthwise convolution on a CPU; the kernel's gradient is a convolution of the input by the output's gradient.

    oneDNN falls back to slow code for that gradient where the map is smaller than the kernel or the kernel is 5 x 5
    with stride 2: 10.7 and 4.1 ms against 0.8 and 0.5 (128 x 240 channels at 2 x 2, 128 x 56 at 4 x 4, one core; see
    benchmarks/strategies.py).
    """

    @staticmethod
    def forward(ctx, x, kernels, geometry):
        ctx.save_for_backward(x, kernels)
        ctx.geometry = geometry
        return _conv2d(x, kernels, geometry)

    @staticmethod
    def backward(ctx, grad):
        x, kernels = ctx.saved_tensors
        geometry = ctx.geometry
        grad_x = grad_kernels = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.nn.grad.conv2d_input(x.shape, kernels, grad, **geometry._asdict())
        if ctx.needs_input_grad[1]:
            # Strides and dilations change places: the tap (i, j) saw x at i * dilation + row * stride.
            swapped = Geometry(geometry.dilation, geometry.padding, geometry.stride, geometry.groups)
            taps = grad.reshape(x.shape[1], 1, grad.shape[2], grad.shape[3])
            seen = _conv2d(x, taps, swapped)[:, :, : kernels.shape[2], : kernels.shape[3]]
            grad_kernels = seen.reshape(kernels.shape)
        return grad_x, grad_kernels, None


def depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    training: bool,
) -> Tensor:
    """Static depthwise convolution, (B, C, H, W) by (C, 1, kh, kw).

    In training on a CPU, with kernels of 5 x 5 and larger, the batch is folded into the channels: 7.7 and 10.7 ms
    against oneDNN's 18.6 and 30.2 for 128 x 36 x 16 x 16 and 128 x 336 x 4 x 4 with stride 2, forward and backward on
    one core (benchmarks/strategies.py).
    """
    geometry = Geometry(stride, padding, dilation, weight.shape[0])
    if not torch.jit.is_scripting():
        large = x.ndim == 4 and x.shape[0] > 0 and min(weight.shape[2], weight.shape[3]) >= 5
        if training and large and x.device.type == "cpu" and not _records_a_graph():
            return _convolve_samples(x, weight.expand(x.shape[0], *weight.shape), geometry)
    return _conv2d(x, weight, geometry)


def _is_pointwise(weight: Tensor, padding: tuple[int, int], groups: int) -> bool:
    return weight.shape[2] == 1 and weight.shape[3] == 1 and padding[0] == 0 and padding[1] == 0 and groups == 1


def _is_depthwise(x: Tensor, weight: Tensor, routing_weights: Tensor, groups: int) -> bool:
    return groups == x.shape[1] and weight.shape[0] == groups * routing_weights.shape[1]


def choose_strategy(
    x: Tensor,
    weight: Tensor,
    routing_weights: Tensor,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    groups: int = 1,
    free_batch: bool = False,
) -> str:
    """Name of the strategy that runs; `free_batch` asks for one that does not write the batch size into a graph."""
    if _is_pointwise(weight, padding, groups):
        # Rounded up, as the strided positions 0, s, 2s, ... are counted.
        positions = ((x.shape[2] + stride[0] - 1) // stride[0]) * ((x.shape[3] + stride[1] - 1) // stride[1])
        # Up to here gating the inputs beats mixing a kernel for every sample. Training 80 -> 240 channels, batch 128,
        # on one core: 13 and 3.8 times as fast at 1 and 4 positions, 0.6 times at 16 (benchmarks/strategies.py).
        if positions <= 4 and not free_batch:
            return "gated_inputs"
        return "batched_matmul"
    if not free_batch:
        return "grouped"
    return "shifted" if _is_depthwise(x, weight, routing_weights, groups) else "wide"


def _check(x: Tensor, weight: Tensor, routing_weights: Tensor, bias: Tensor | None, groups: int) -> None:
    if x.ndim != 4:
        raise ValueError(f"x must be (batch, channels, height, width), got shape {tuple(x.shape)}")
    if weight.ndim != 4:
        raise ValueError(f"weight must be (experts * out, in / groups, kh, kw), got shape {tuple(weight.shape)}")
    if routing_weights.ndim != 2 or routing_weights.shape[0] != x.shape[0]:
        raise ValueError(
            f"routing_weights must be (batch, experts) with batch = {x.shape[0]}, got shape "
            f"{tuple(routing_weights.shape)}: one row of mixing coefficients for each sample of x"
        )
    experts = routing_weights.shape[1]
    if experts < 1 or weight.shape[0] % experts:
        raise ValueError(f"weight has {weight.shape[0]} kernels, which {experts} experts cannot share evenly")
    out = weight.shape[0] // experts
    if groups < 1 or x.shape[1] != weight.shape[1] * groups or out % groups:
        raise ValueError(
            f"x has {x.shape[1]} channels and each expert {out} kernels of {weight.shape[1]} channels, which "
            f"groups={groups} does not fit: channels must be {weight.shape[1]} * groups, kernels divide by groups"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be (experts * out,) = ({weight.shape[0]},), got {tuple(bias.shape)}")


def _check_strategy(strategy: str, pointwise: bool, depthwise: bool) -> None:
    if strategy not in STRATEGIES:
        raise ValueError(f"unknown strategy {strategy!r}; there are {', '.join(STRATEGIES)}")
    if strategy in ("batched_matmul", "gated_inputs") and not pointwise:
        raise ValueError(f"strategy {strategy!r} takes only 1 x 1 kernels without padding and groups; try 'grouped'")
    if strategy == "shifted" and not depthwise:
        raise ValueError("strategy 'shifted' takes only depthwise kernels, in = out = groups; try 'grouped'")


def _records_a_graph() -> bool:
    """Is a graph being recorded that may run with other batch sizes: a trace, a compiled or exported program?"""
    return torch.jit.is_tracing() or torch.compiler.is_compiling()


def dynamic_conv2d(
    x: Tensor,
    weight: Tensor,
    routing_weights: Tensor,
    bias: Tensor | None = None,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    strategy: str | None = None,
) -> Tensor:
    """Convolve each sample with a kernel of its own, mixed from experts.

    Args:
        x: Input (B, in, H, W).
        weight: Kernels of all experts, expert-major, (E * out, in / groups, kh, kw).
        routing_weights: Mixing coefficients (B, E), any values; cast to the dtype of `weight`.
        bias: Biases of all experts, (E * out,), mixed as the kernels are; or None.
        stride, padding, dilation: Numbers or (h, w) pairs; zeros are padded on both sides.
        groups: Groups of each sample's convolution.
        strategy: A name in `STRATEGIES`, used or refused and never replaced; None: the fast one for this shape.

    Returns:
        (B, out, H', W'), with H' and W' as torch.nn.Conv2d has them. An empty batch gives an empty output.

    Raises:
        ValueError: Shapes, groups or the strategy do not fit; the message shows the values.

    Source: CondConv, arXiv:1904.04971; the expert-major 4-D weight is ours.
    """
    if not torch.jit.is_scripting():
        stride, padding, dilation = pair(stride), pair(padding), pair(dilation)
        if not torch.jit.is_tracing():
            _check(x, weight, routing_weights, bias, groups)
        if strategy is not None:
            depthwise = _is_depthwise(x, weight, routing_weights, groups)
            _check_strategy(strategy, _is_pointwise(weight, padding, groups), depthwise)
    geometry = Geometry(stride, padding, dilation, groups)
    if x.shape[0] == 0:
        # No sample, no kernel to mix; the first expert's shape decides the output's.
        return _conv2d(x, weight[: weight.shape[0] // routing_weights.shape[1]], geometry)
    routing_weights = routing_weights.to(weight.dtype)
    if strategy is None:
        free_batch = False
        if not torch.jit.is_scripting():
            free_batch = _records_a_graph()
        strategy = choose_strategy(x, weight, routing_weights, stride, padding, groups, free_batch)
    # A chain and not a look-up in STRATEGIES, because TorchScript has no tables of functions.
    if strategy == "grouped":
        y = _grouped(x, weight, routing_weights, geometry)
    elif strategy == "batched_matmul":
        y = _batched_matmul(x, weight, routing_weights, geometry)
    elif strategy == "gated_inputs":
        y = _gated_inputs(x, weight, routing_weights, geometry)
    elif strategy == "shifted":
        y = _shifted(x, weight, routing_weights, geometry)
    else:
        y = _wide(x, weight, routing_weights, geometry)
    if bias is not None:
        y = y + _mix(bias, routing_weights).to(y.dtype)[:, :, None, None]
    return y
