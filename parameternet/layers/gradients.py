"""Gradients of convolutions with mixed kernels that keep no kernel of a sample for backward, and of depthwise ones."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .strategies import STRATEGIES, WITHOUT_GRADIENTS, Geometry, is_pointwise, mix, samples_at_a_time

__all__ = [
    "DepthwiseConvolution",
    "MixedConvolution",
    "gains_by_float32_gradients",
    "gains_by_own_gradient",
    "mixed_gradients",
]


class MixedConvolution(torch.autograd.Function):
    """A strategy that mixes kernels; backward mixes them again, a few samples at a time.

    Only the inputs are kept for backward, not the kernels of all samples.
    """

    @staticmethod
    def forward(ctx, x, weight, routing_weights, geometry, strategy):
        ctx.save_for_backward(x, weight, routing_weights)
        ctx.geometry, ctx.strategy = geometry, strategy
        return WITHOUT_GRADIENTS[strategy](x, weight, routing_weights, None, geometry)

    @staticmethod
    def backward(ctx, grad):
        x, weight, routing_weights = ctx.saved_tensors
        if torch.is_grad_enabled():  # a graph of the gradients is wanted: through torch's own, differentiable formulas
            y = STRATEGIES[ctx.strategy](x, weight, routing_weights, None, ctx.geometry)
            wanted = [t for t, needed in zip(ctx.saved_tensors, ctx.needs_input_grad, strict=False) if needed]
            found = iter(torch.autograd.grad(y, wanted, grad, create_graph=True))
            return *(next(found) if needed else None for needed in ctx.needs_input_grad[:3]), None, None
        grads = mixed_gradients(x, weight, routing_weights, grad, ctx.geometry, ctx.needs_input_grad)
        return *grads, None, None


def mixed_gradients(
    x: Tensor, weight: Tensor, routing_weights: Tensor, grad: Tensor, geometry: Geometry, needed: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of input, experts and routing, as `needed`; kernels are mixed again, a few samples at a time."""
    form = _matmul_gradients if is_pointwise(weight, geometry.padding, geometry.groups) else _grouped_gradients
    experts = weight.reshape(routing_weights.shape[1], -1)
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format) if needed[0] else None
    # Summed over the batch in float32 at least, as a product over all of it would be.
    wide = torch.promote_types(weight.dtype, torch.float32)
    grad_experts = torch.zeros_like(experts, dtype=wide) if needed[1] else None
    grad_routing = torch.empty_like(routing_weights) if needed[2] else None
    step = samples_at_a_time(weight, routing_weights)
    for start in range(0, x.shape[0], step):
        part = slice(start, start + step)
        kernels = mix(weight, routing_weights[part])
        part_x, part_kernels = form(x[part], kernels, grad[part], weight.shape, geometry, needed)
        if grad_x is not None:
            grad_x[part] = part_x
        if grad_experts is not None:
            _add_product(grad_experts, routing_weights[part].t(), part_kernels)
        if grad_routing is not None:
            torch.mm(part_kernels, experts.t(), out=grad_routing[part])
    if grad_experts is not None:
        grad_experts = grad_experts.to(weight.dtype).reshape(weight.shape)
    return [grad_x, grad_experts, grad_routing]


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += torch.mm(a.to(total.dtype), b.to(total.dtype))


def _matmul_gradients(x, kernels, grad, shape, geometry, needed) -> tuple[Tensor | None, Tensor | None]:
    batch, channels = x.shape[:2]
    (stride_h, stride_w), grad_x, grad_kernels = geometry.stride, None, None
    strided = (stride_h, stride_w) != (1, 1)
    seen = x[:, :, ::stride_h, ::stride_w] if strided else x
    columns = seen.reshape(batch, channels, -1)
    grad = grad.reshape(batch, grad.shape[1], -1)
    if needed[0]:
        grad_x = torch.bmm(kernels.reshape(batch, -1, channels).transpose(1, 2), grad).reshape(seen.shape)
        if strided:
            spread = torch.zeros_like(x, memory_format=torch.contiguous_format)
            spread[:, :, ::stride_h, ::stride_w] = grad_x
            grad_x = spread
    if needed[1] or needed[2]:
        grad_kernels = torch.bmm(grad, columns.transpose(1, 2)).reshape(batch, -1)
    return grad_x, grad_kernels


def _grouped_gradients(x, kernels, grad, shape, geometry, needed) -> tuple[Tensor | None, Tensor | None]:
    batch = x.shape[0]
    folded = Geometry(geometry.stride, geometry.padding, geometry.dilation, batch * geometry.groups)
    grad_x, grad_kernels = convolution_gradients(
        x.reshape(1, -1, *x.shape[2:]),
        kernels.reshape(-1, *shape[1:]),
        grad.reshape(1, -1, *grad.shape[2:]),
        folded,
        needed[0],
        needed[1] or needed[2],
    )
    grad_x = None if grad_x is None else grad_x.reshape(x.shape)
    return grad_x, None if grad_kernels is None else grad_kernels.reshape(batch, -1)


def convolution_gradients(x, kernels, grad, geometry, of_x, of_kernels) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of a static convolution, those of a depthwise one in float32 or by our own formula where it gains."""
    grad, dtype = grad.to(x.dtype), x.dtype
    depthwise = kernels.shape[0] == geometry.groups == x.shape[1]
    if depthwise and gains_by_float32_gradients(x):
        x, kernels, grad = x.float(), kernels.float(), grad.float()
    own = of_kernels and depthwise and x.shape[0] == 1 and gains_by_own_gradient(x, kernels)
    stride, padding, dilation, groups = geometry
    mask = [of_x, of_kernels and not own, False]
    grad_x, grad_kernels, _ = torch.ops.aten.convolution_backward(
        grad, x, kernels, None, stride, padding, dilation, False, [0, 0], groups, mask
    )
    if own:
        # A convolution of the input by the output's gradient, in which strides and dilations change places: the tap
        # (i, j) saw x at i * dilation + row * stride.
        taps = grad.reshape(x.shape[1], 1, grad.shape[2], grad.shape[3])
        seen = F.conv2d(x, taps, None, dilation, padding, stride, groups)
        grad_kernels = seen[:, :, : kernels.shape[2], : kernels.shape[3]].reshape(kernels.shape)
    return grad_x if grad_x is None else grad_x.to(dtype), grad_kernels if grad_kernels is None else grad_kernels.to(
        dtype
    )


def gains_by_own_gradient(x: Tensor, weight: Tensor) -> bool:
    """Is oneDNN's gradient of depthwise kernels slow for these shapes?

    It is for kernels of 5 x 5 and more, and for maps smaller than the kernel: 0.16 to 0.34 of its time (forward not
    counted; 16 samples of 44 to 912 channels, sides 2 to 32, one core). For 3 x 3 kernels on larger maps ours takes up
    to 1.26 times as long.
    """
    kernel, side = max(weight.shape[2], weight.shape[3]), min(x.shape[2], x.shape[3])
    return x.device.type == "cpu" and side > 1 and (kernel >= 5 or side < kernel)


def gains_by_float32_gradients(x: Tensor) -> bool:
    """Is this half precision on a CPU? oneDNN's gradients of depthwise convolutions are better not taken in it.

    The input's gradient for stride 2 takes 65 to 75 ms in bfloat16 and 1 to 5 ms in float32, that of 5 x 5 kernels 31
    and 5, that of 3 x 3 kernels on maps of 2 x 2 23 and 4 (64 samples of 92, 136 and 912 channels, channels last, one
    core with AMX); elsewhere the two differ little.
    """
    return x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16)


class DepthwiseConvolution(torch.autograd.Function):
    """Depthwise convolution (B, C, H, W) by (C, 1, kh, kw) with the gradients of `convolution_gradients`."""

    @staticmethod
    def forward(ctx, x, kernels, geometry):
        ctx.save_for_backward(x, kernels)
        ctx.geometry = geometry
        return F.conv2d(x, kernels, None, *geometry)

    @staticmethod
    def backward(ctx, grad):
        x, kernels = ctx.saved_tensors
        if torch.is_grad_enabled():
            y = F.conv2d(x, kernels, None, *ctx.geometry)
            wanted = [t for t, needed in zip((x, kernels), ctx.needs_input_grad, strict=False) if needed]
            found = iter(torch.autograd.grad(y, wanted, grad, create_graph=True))
            return *(next(found) if needed else None for needed in ctx.needs_input_grad[:2]), None
        return *convolution_gradients(x, kernels, grad, ctx.geometry, *ctx.needs_input_grad[:2]), None
