"""`dynamic_conv2d`: one kernel a sample, mixed from several experts.

For sample b, with routing weights alpha and expert kernels W_e: W_b = sum_e alpha_be W_e and y_b = W_b * x_b. The
experts are one 4-D tensor, expert-major: `weight[e * out : (e + 1) * out]` is the kernel of expert e. In which order
the sum is computed is the business of `strategies.py`, how it is differentiated that of `gradients.py`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .autocast import autocast_dtype, without_autocast
from .compiled import compiles_for_python, convolve_compiled
from .gradients import (
    DepthwiseConvolution,
    MixedConvolution,
    gains_by_float32_gradients,
    gains_by_own_gradient,
)
from .strategies import (
    STRATEGIES,
    WITHOUT_GRADIENTS,
    Geometry,
    _batched_matmul,
    _gated_inputs,
    _grouped,
    _shifted,
    _wide,
    check_strategy,
    choose_strategy,
    is_depthwise,
    kernels_are_large,
    mix,
)

__all__ = ["STRATEGIES", "convolve", "depthwise_conv2d", "dynamic_conv2d", "pair"]


def pair(value: int | tuple[int, int]) -> tuple[int, int]:
    """(h, w) from a number, which stands for both, or from two numbers."""
    if isinstance(value, int):
        return value, value
    h, w = value
    return int(h), int(w)


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
    shift: Tensor | None = None,
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
        shift: Added to the output of every sample as it is, (out,); or None.

    Returns:
        (B, out, H', W'), with H' and W' as torch.nn.Conv2d has them. An empty batch gives an empty output.

    Raises:
        ValueError: Shapes, groups or the strategy do not fit; the message shows the values.

    Where the kernels of all samples are large, none is kept for backward: they are mixed again. Source: CondConv,
    arXiv:1904.04971; the expert-major 4-D weight is ours.
    """
    if not torch.jit.is_scripting():
        stride, padding, dilation = pair(stride), pair(padding), pair(dilation)
        if not torch.jit.is_tracing():
            _check(x, weight, routing_weights, bias, shift, groups)
    return convolve(x, weight, routing_weights, bias, Geometry(stride, padding, dilation, groups), strategy, shift)


def convolve(
    x: Tensor,
    weight: Tensor,
    routing_weights: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    strategy: str | None,
    shift: Tensor | None,
) -> Tensor:
    """`dynamic_conv2d` for tensors whose shapes are known to fit; a strategy that was asked for is still checked."""
    if strategy is not None:
        check_strategy(strategy, weight, geometry.padding, geometry.groups, routing_weights.shape[1])
    if torch.jit.is_scripting():
        routing_weights = routing_weights.to(weight.dtype)
        y = _convolve_scripted(x, weight, routing_weights, geometry, strategy, shift)
    else:
        dtype = autocast_dtype(x.device.type)
        if dtype is not None and x.dtype != torch.float64:
            with without_autocast(x.device.type):
                return convolve(x.to(dtype), weight.to(dtype), routing_weights, bias, geometry, strategy, shift)
        # Comparing is cheaper than a cast that changes nothing, and at batch 1 such things add up.
        if routing_weights.dtype != weight.dtype:
            routing_weights = routing_weights.to(weight.dtype)
        if shift is not None and shift.dtype != weight.dtype:
            shift = shift.to(weight.dtype)
        y = _convolve(x, weight, routing_weights, geometry, strategy, shift)
    if bias is not None:
        y = y + mix(bias.to(weight.dtype), routing_weights)[:, :, None, None]
    return y


@torch.jit.unused
def _convolve(
    x: Tensor, weight: Tensor, routing_weights: Tensor, geometry: Geometry, strategy: str | None, shift: Tensor | None
) -> Tensor:
    """By whom it is computed: a compiler's operator, a recorded graph, autograd, or nobody that looks on."""
    if x.shape[0] == 0:
        return _convolve_nothing(x, weight, routing_weights, geometry, shift)
    recorded = _records_a_graph()
    if recorded and compiles_for_python():
        return convolve_compiled(x, weight, routing_weights, geometry, strategy, shift)
    if strategy is None:
        stride, padding, _, groups = geometry
        strategy = choose_strategy(x, weight, routing_weights, stride, padding, groups, recorded)
    if recorded:
        return STRATEGIES[strategy](x, weight, routing_weights, shift, geometry)
    if not torch.is_grad_enabled() or not any(
        t is not None and t.requires_grad for t in (x, weight, routing_weights, shift)
    ):
        return WITHOUT_GRADIENTS[strategy](x, weight, routing_weights, shift, geometry)
    if not _remixes(strategy, x, weight, routing_weights, geometry.groups):
        return STRATEGIES[strategy](x, weight, routing_weights, shift, geometry)
    y = MixedConvolution.apply(x, weight, routing_weights, geometry, strategy)
    return y if shift is None else y + shift[:, None, None]


def _convolve_scripted(
    x: Tensor, weight: Tensor, routing_weights: Tensor, geometry: Geometry, strategy: str | None, shift: Tensor | None
) -> Tensor:
    """A chain and not a look-up in STRATEGIES, because TorchScript has no tables of functions."""
    if x.shape[0] == 0:
        return _convolve_nothing(x, weight, routing_weights, geometry, shift)
    if strategy is None:
        strategy = choose_strategy(
            x, weight, routing_weights, geometry.stride, geometry.padding, geometry.groups, False
        )
    if strategy == "grouped":
        return _grouped(x, weight, routing_weights, shift, geometry)
    if strategy == "batched_matmul":
        return _batched_matmul(x, weight, routing_weights, shift, geometry)
    if strategy == "gated_inputs":
        return _gated_inputs(x, weight, routing_weights, shift, geometry)
    if strategy == "shifted":
        return _shifted(x, weight, routing_weights, shift, geometry)
    return _wide(x, weight, routing_weights, shift, geometry)


def _convolve_nothing(
    x: Tensor, weight: Tensor, routing_weights: Tensor, geometry: Geometry, shift: Tensor | None
) -> Tensor:
    """The empty output of an empty batch. Everything takes part, so that every gradient is zero and none is missing."""
    kernel = weight[: weight.shape[0] // routing_weights.shape[1]]
    y = F.conv2d(x, kernel, shift, geometry.stride, geometry.padding, geometry.dilation, geometry.groups)
    return y * routing_weights.sum(1).reshape(-1, 1, 1, 1)


def _records_a_graph() -> bool:
    """Is a graph being recorded that may run with other batch sizes: a trace, a compiled or exported program?"""
    return torch.jit.is_tracing() or torch.compiler.is_compiling()


def _remixes(strategy: str, x: Tensor, weight: Tensor, routing_weights: Tensor, groups: int) -> bool:
    """Is it better to mix kernels again for their gradients than to keep those of all samples?

    It is where they are large, and where the gradients of depthwise ones are our own. (Training of parameternet_600m,
    batch 16, 128 px, two cores: 0.90 of the time that it takes to mix them all again.)
    """
    if strategy not in ("grouped", "batched_matmul"):
        return False
    slow = gains_by_own_gradient(x, weight) or gains_by_float32_gradients(x)
    own = is_depthwise(weight, groups, routing_weights.shape[1]) and slow
    return own or kernels_are_large(weight, routing_weights)


def _check(
    x: Tensor, weight: Tensor, routing_weights: Tensor, bias: Tensor | None, shift: Tensor | None, groups: int
) -> None:
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
    if shift is not None and shift.shape != (out,):
        raise ValueError(f"shift must be (out,) = ({out},), got {tuple(shift.shape)}")


def depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    training: bool,
) -> Tensor:
    """Static depthwise convolution, (B, C, H, W) by (C, 1, kh, kw), plus a bias (C,) or None.

    In training on a CPU, with kernels of 5 x 5 and larger, the batch is folded into the channels: 7.7 and 10.7 ms
    against oneDNN's 18.6 and 30.2 for 128 x 36 x 16 x 16 and 128 x 336 x 4 x 4 with stride 2, forward and backward on
    one core. In half precision its gradients are taken in float32, see `gains_by_float32_gradients`.
    """
    if not torch.jit.is_scripting() and training and bias is None:
        if _gains_by_folding(x, weight):
            return _depthwise_by_samples(x, weight, Geometry(stride, padding, dilation, x.shape[0] * weight.shape[0]))
        if _trains_in_half(x, weight):
            return _depthwise_in_half(x, weight, Geometry(stride, padding, dilation, weight.shape[0]))
    return F.conv2d(x, weight, bias, stride, padding, dilation, weight.shape[0])


@torch.jit.unused
def _gains_by_folding(x: Tensor, weight: Tensor) -> bool:
    large = x.ndim == 4 and x.shape[0] > 0 and min(weight.shape[2], weight.shape[3]) >= 5
    eager = not _records_a_graph() and autocast_dtype(x.device.type) is None
    return large and x.device.type == "cpu" and weight.requires_grad and eager


@torch.jit.unused
def _trains_in_half(x: Tensor, weight: Tensor) -> bool:
    halved = autocast_dtype(x.device.type) is not None and x.dtype != torch.float64
    return x.device.type == "cpu" and halved and weight.requires_grad and not _records_a_graph()


@torch.jit.unused
def _depthwise_in_half(x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    dtype = autocast_dtype(x.device.type)
    with without_autocast(x.device.type):
        return DepthwiseConvolution.apply(x.to(dtype), weight.to(dtype), geometry)


@torch.jit.unused
def _depthwise_by_samples(x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    batch, channels = x.shape[:2]
    kernels = weight.expand(batch, *weight.shape).reshape(-1, *weight.shape[1:])
    y = DepthwiseConvolution.apply(x.reshape(1, batch * channels, *x.shape[2:]), kernels, geometry)
    return y.reshape(batch, channels, *y.shape[2:])
