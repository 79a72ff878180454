"""The dynamic convolution as a single operator in torch.compile's graphs.

The operator is opaque to the compiler: the batch size stays dynamic, and each call chooses the same strategy as an
uncompiled one. Traced and exported programs, which run outside of Python, must not contain it.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .autocast import autocast_dtype
from .gradients import mixed_gradients
from .strategies import ConvParams, is_channels_last

__all__ = ["compiles_for_python", "make_operator", "records_a_graph", "runs_eagerly"]


def records_a_graph() -> bool:
    """Return whether a graph is being recorded that may run with other batch sizes: traced, compiled or exported."""
    return torch.jit.is_tracing() or torch.compiler.is_compiling()


def runs_eagerly(device: str) -> bool:
    """Return whether operations on this device type run as they are written: without graph and autocast."""
    return not records_a_graph() and autocast_dtype(device) is None


def compiles_for_python() -> bool:
    """Return whether torch.compile, and not an export, is recording."""
    if not torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    # Before torch 2.7 the two could not be distinguished.
    return hasattr(torch.compiler, "is_exporting") and not torch.compiler.is_exporting()


def make_operator(compute: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Register `parameternet::convolve`, and return a function that calls it.

    Args:
        compute: `(x, weight, routing_weights, output_bias, conv_params, strategy) -> y`, the operator's implementation.

    Returns:
        `(x, weight, routing_weights, conv_params, strategy, output_bias) -> y`, for tensors of one dtype.
    """

    def operator(
        x: Tensor,
        weight: Tensor,
        routing_weights: Tensor,
        output_bias: Tensor | None,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
        strategy: str | None,
    ) -> Tensor:
        y = compute(x, weight, routing_weights, output_bias, ConvParams.of(stride, padding, dilation, groups), strategy)
        return y.contiguous(memory_format=_format(x))

    registered = torch.library.custom_op("parameternet::convolve", operator, mutates_args=())
    registered.register_fake(_fake)
    registered.register_autograd(_backward, setup_context=_keep)

    def call(
        x: Tensor,
        weight: Tensor,
        routing_weights: Tensor,
        conv_params: ConvParams,
        strategy: str | None,
        output_bias: Tensor | None,
    ) -> Tensor:
        return torch.ops.parameternet.convolve(x, weight, routing_weights, output_bias, *conv_params, strategy)

    return call


def _format(x: Tensor) -> torch.memory_format:
    """Return the memory format that the graph records: the input's."""
    return torch.channels_last if is_channels_last(x) else torch.contiguous_format


def _fake(x, weight, routing_weights, output_bias, stride, padding, dilation, groups, strategy) -> Tensor:
    """Return an output with the right shape and memory format, without computing it."""
    sides = [
        (x.shape[2 + i] + 2 * padding[i] - dilation[i] * (weight.shape[2 + i] - 1) - 1) // stride[i] + 1
        for i in range(2)
    ]
    shape = (x.shape[0], weight.shape[0] // routing_weights.shape[1], *sides)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=_format(x))


@torch.library.custom_op("parameternet::convolve_backward", mutates_args=())
def _convolve_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    routing_weights: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[Tensor, Tensor, Tensor]:
    conv_params = ConvParams.of(stride, padding, dilation, groups)
    grads = mixed_gradients(x, weight, routing_weights, grad, conv_params, (True, True, True))
    grad_x, grad_weight, grad_routing = (g.contiguous() for g in grads if g is not None)
    return grad_x, grad_weight, grad_routing


@_convolve_backward.register_fake
def _(grad, x, weight, routing_weights, stride, padding, dilation, groups):
    return tuple(torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, weight, routing_weights))


def _keep(ctx, inputs, output):
    x, weight, routing_weights, output_bias, *conv_params, _ = inputs
    ctx.save_for_backward(x, weight, routing_weights)
    ctx.conv_params, ctx.has_output_bias = conv_params, output_bias is not None


def _backward(ctx, grad):
    grads = torch.ops.parameternet.convolve_backward(grad, *ctx.saved_tensors, *ctx.conv_params)
    grad_output_bias = grad.sum((0, 2, 3)) if ctx.has_output_bias else None
    return *grads, grad_output_bias, None, None, None, None, None
