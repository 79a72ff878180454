"""Custom gradients for convolutions: mixed kernels, which are not kept for backward, and depthwise kernels.

Both functions are linear in each of their tensors: `backward` consists of differentiable operations, and forward mode
and `torch.func.vmap` use `plain`, the same function in torch's own operations. So they behave like `F.conv2d` under
autograd; `tests/layers/test_like_conv2d.py` checks this.
"""

import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import native
from .autocast import without_autocast
from .strategies import (
    ConvParams,
    fits_depthwise_kernels,
    in_float32,
    is_channels_last,
    is_depthwise,
    is_pointwise,
    mix,
    runs_channels_last,
    runs_natively,
    samples_at_a_time,
)

__all__ = [
    "DepthwiseConvolution",
    "MixedConvolution",
    "directional_derivative",
    "gains_by_float32_gradients",
    "gains_by_own_gradient",
    "keep",
    "mixed_gradients",
]


# Largest number of positions at which our gradient of depthwise kernels is faster on CUDA.
CUDA_POSITIONS = 64


class MixedConvolution(torch.autograd.Function):
    """Run a strategy that mixes kernels; backward mixes them again, a few samples at a time.

    Only the inputs are kept for backward, not the kernels of all samples.
    """

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        routing_weights: Tensor,
        conv_params: ConvParams,
        forward: Callable,
        inference: Callable,
    ) -> Tensor:
        return _own_tensor(inference(x, weight, routing_weights, None, conv_params))

    @staticmethod
    def plain(
        x: Tensor,
        weight: Tensor,
        routing_weights: Tensor,
        conv_params: ConvParams,
        forward: Callable,
        inference: Callable,
    ) -> Tensor:
        return forward(x, weight, routing_weights, None, conv_params)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        keep(ctx, inputs[:3], inputs[3:])

    @staticmethod
    def backward(ctx, grad):
        conv_params = ctx.options[0]
        with without_autocast(grad.device.type):  # forward ran without autocast, whatever is on now
            grads = mixed_gradients(*ctx.saved_tensors, grad, conv_params, ctx.needs_input_grad)
        return *grads, None, None, None

    @staticmethod
    def jvp(ctx, *tangents):
        return directional_derivative(MixedConvolution.plain, ctx, tangents)

    @staticmethod
    def vmap(info, in_dims, *inputs):
        return torch.vmap(MixedConvolution.plain, in_dims)(*inputs), 0


class DepthwiseConvolution(torch.autograd.Function):
    """Convolve (B, C, H, W) depthwise by (C, 1, kh, kw), with the gradients of `convolution_gradients`."""

    @staticmethod
    def forward(x: Tensor, kernels: Tensor, conv_params: ConvParams) -> Tensor:
        return F.conv2d(x, kernels, None, *conv_params)

    plain = forward

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        keep(ctx, inputs[:2], inputs[2:])

    @staticmethod
    def backward(ctx, grad):
        (conv_params,) = ctx.options
        with without_autocast(grad.device.type):
            return *convolution_gradients(*ctx.saved_tensors, grad, conv_params, *ctx.needs_input_grad[:2]), None

    @staticmethod
    def jvp(ctx, *tangents):
        return directional_derivative(DepthwiseConvolution.plain, ctx, tangents)

    @staticmethod
    def vmap(info, in_dims, *inputs):
        return torch.vmap(DepthwiseConvolution.plain, in_dims)(*inputs), 0


def _own_tensor(y: Tensor) -> Tensor:
    """Return `y` as a tensor that is not a view: autograd forbids in-place changes of views returned by a Function."""
    return y.new_empty(0).set_(y)  # type: ignore[call-overload]  # torch's types lack this form


def keep(ctx, tensors: Sequence[Tensor], options: Sequence) -> None:
    """Save tensors for backward and forward mode, and the other inputs as `ctx.options`."""
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)
    ctx.options = options


def directional_derivative(plain: Callable, ctx, tangents: Sequence[Tensor | None]) -> Tensor:
    """Return the directional derivative of a multilinear function: sum it with each tensor replaced by its tangent."""
    tensors = ctx.saved_tensors
    terms = [
        plain(*tensors[:index], tangent, *tensors[index + 1 :], *ctx.options)
        for index, tangent in enumerate(tangents[: len(tensors)])
        if tangent is not None
    ]
    return functools.reduce(torch.add, terms)


def mixed_gradients(
    x: Tensor, weight: Tensor, routing_weights: Tensor, grad: Tensor, conv_params: ConvParams, needed: Sequence[bool]
) -> list[Tensor | None]:
    """Return the `needed` gradients of input, experts and routing, mixing kernels again a few samples at a time."""
    # With gradients enabled, this is itself being differentiated.
    if not torch.is_grad_enabled():
        tensors = x, weight, routing_weights
        depthwise = is_depthwise(weight, conv_params.groups, routing_weights.shape[1])
        if depthwise and (is_channels_last(x) or fits_depthwise_kernels(x, weight, conv_params)):
            tensors = in_float32(*tensors)
        channels_last = runs_channels_last(*tensors, None, conv_params)
        if channels_last or runs_natively(*tensors, None, conv_params):
            layout = torch.channels_last if channels_last else torch.contiguous_format
            grad_y = grad.to(tensors[0].dtype).contiguous(memory_format=layout)
            if native.readable(grad_y):
                grads = _native_gradients(*tensors, grad_y, conv_params, needed, channels_last)
                return [None if g is None else g.to(x.dtype) for g in grads]
    form = _matmul_gradients if is_pointwise(weight, conv_params.padding, conv_params.groups) else _grouped_gradients
    experts = weight.reshape(routing_weights.shape[1], -1)
    grads_x: list[Tensor] = []
    grads_routing: list[Tensor] = []
    grad_experts: Tensor | None = None
    step = samples_at_a_time(weight, routing_weights)
    whole = step >= x.shape[0]
    for start in range(0, x.shape[0], step):
        part = slice(start, start + step)
        kernels = mix(weight, routing_weights[part])
        part_x, part_kernels = form(x[part], kernels, grad[part], weight.shape, conv_params, needed)
        if part_x is not None:
            grads_x.append(part_x)
        if part_kernels is not None and needed[1]:
            turned = routing_weights[part].t()
            grad_experts = torch.mm(turned, part_kernels) if whole else _add_product(grad_experts, turned, part_kernels)
        if part_kernels is not None and needed[2]:
            grads_routing.append(torch.mm(part_kernels, experts.t()))
    return [
        _joined(grads_x) if needed[0] else None,
        None if grad_experts is None else grad_experts.to(weight.dtype).reshape(weight.shape),
        _joined(grads_routing) if needed[2] else None,
    ]


def _native_gradients(x, weight, routing_weights, grad, conv_params, needed, channels_last) -> list[Tensor | None]:
    of_x, of_weight = needed[0], needed[1] or needed[2]
    if is_pointwise(weight, conv_params.padding, conv_params.groups):
        grads = native.pointwise_gradients(x, weight, routing_weights, grad, of_x, of_weight)
    elif channels_last:
        stride, padding, dilation, _ = conv_params
        grads = native.depthwise_last_gradients(
            x, weight, routing_weights, grad, stride, padding, dilation, of_x, of_weight
        )
    else:
        grads = native.depthwise_gradients(x, weight, routing_weights, grad, conv_params.padding, of_x, of_weight)
    return [g if wanted else None for g, wanted in zip(grads, needed, strict=False)]


def _add_product(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """Return `total + a @ b`, accumulated in at least float32, like one product over the whole batch."""
    wide = torch.promote_types(a.dtype, torch.float32)
    a, b = a.to(wide), b.to(wide)
    return torch.mm(a, b) if total is None else total.addmm_(a, b)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _matmul_gradients(x, kernels, grad, shape, conv_params, needed) -> tuple[Tensor | None, Tensor | None]:
    batch, channels = x.shape[:2]
    (stride_h, stride_w), grad_x, grad_kernels = conv_params.stride, None, None
    strided = (stride_h, stride_w) != (1, 1)
    seen = x[:, :, ::stride_h, ::stride_w] if strided else x
    columns = seen.reshape(batch, channels, -1)
    kernels = kernels.reshape(batch, -1, channels)
    grad = grad.reshape(batch, grad.shape[1], -1)
    if needed[0] and is_channels_last(x):  # as its input, so that nothing after it copies
        rows = torch.bmm(grad.transpose(1, 2), kernels)
        grad_x = rows.reshape(batch, *seen.shape[2:], channels).permute(0, 3, 1, 2)
    elif needed[0]:
        grad_x = torch.bmm(kernels.transpose(1, 2), grad).reshape(seen.shape)
    if grad_x is not None and strided:
        grad_x = _spread(grad_x, x.shape, conv_params.stride)
    if needed[1] or needed[2]:
        grad_kernels = torch.bmm(grad, columns.transpose(1, 2)).reshape(batch, -1)
    return grad_x, grad_kernels


def _spread(grad: Tensor, shape: torch.Size, stride: tuple[int, int]) -> Tensor:
    """Scatter the gradient of `x[:, :, ::stride_h, ::stride_w]` to its positions in x, with zeros elsewhere."""
    spread = grad.new_zeros(shape)
    spread[:, :, :: stride[0], :: stride[1]] = grad
    return spread


def _grouped_gradients(x, kernels, grad, shape, conv_params, needed) -> tuple[Tensor | None, Tensor | None]:
    batch = x.shape[0]
    folded = ConvParams(conv_params.stride, conv_params.padding, conv_params.dilation, batch * conv_params.groups)
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


def convolution_gradients(x, kernels, grad, conv_params, of_x, of_kernels) -> tuple[Tensor | None, Tensor | None]:
    """Return gradients of a static convolution; depthwise ones by native kernels, float32 or our formulas if faster."""
    grad, dtype = grad.to(x.dtype), x.dtype
    depthwise = kernels.shape[0] == conv_params.groups == x.shape[1]
    half = depthwise and gains_by_float32_gradients(x)
    if half:
        x, kernels, grad = x.float(), kernels.float(), grad.float()
    if depthwise and (half or is_channels_last(x)) and _gains_by_native_gradients(x, kernels, grad, conv_params):
        grads = _static_gradients(x, kernels, grad, conv_params, of_x, of_kernels)
    else:
        grads = _torch_gradients(x, kernels, grad, conv_params, of_x, of_kernels, depthwise)
    grad_x, grad_kernels = (None if g is None else g.to(dtype) for g in grads)
    return grad_x, grad_kernels


def _torch_gradients(x, kernels, grad, conv_params, of_x, of_kernels, depthwise) -> tuple[Tensor | None, Tensor | None]:
    own = of_kernels and depthwise and x.shape[0] == 1 and gains_by_own_gradient(x, kernels)
    stride, padding, dilation, groups = conv_params
    mask = [of_x, of_kernels and not own, False]
    grad_x, grad_kernels, _ = torch.ops.aten.convolution_backward(
        grad, x, kernels, None, stride, padding, dilation, False, [0, 0], groups, mask
    )
    if own:
        # A convolution of the input by the output's gradient, with stride and dilation swapped: the tap
        # (i, j) saw x at i * dilation + row * stride.
        taps = grad.reshape(x.shape[1], 1, grad.shape[2], grad.shape[3])
        seen = F.conv2d(x, taps, None, dilation, padding, stride, groups)
        grad_kernels = seen.narrow(2, 0, kernels.shape[2]).narrow(3, 0, kernels.shape[3]).reshape(kernels.shape)
    return grad_x, grad_kernels


def _gains_by_native_gradients(x: Tensor, kernels: Tensor, grad: Tensor, conv_params: ConvParams) -> bool:
    """Return whether native kernels compute the gradients of this depthwise convolution of several samples.

    They take 0.2 to 1.0 of the time of torch's: 7 ms instead of 16 for 164 channels at 8 x 8 with 5 x 5 kernels and
    stride 2, 28 instead of 51 for 68 channels at 32 x 32 with 3 x 3 kernels (128 samples of bfloat16, converted to
    float32, one core with AVX-512). In float32, contiguous tensors gained nothing; in channels last, forward and
    backward take 6.6 ms instead of 11.8 for 32 x 92 x 28 x 28 with 5 x 5 kernels and stride 2, and 3.7 instead of 4.3
    with 3 x 3.
    """
    (pad_h, pad_w), dilation = conv_params.padding, conv_params.dilation
    if torch.is_grad_enabled() or x.shape[0] == 1:  # with gradients enabled, this is being differentiated
        return False
    if native.ready_channels_last(x, kernels):
        return native.readable(grad) and runs_channels_last(x, kernels, x.new_ones(x.shape[0], 1), None, conv_params)
    return (
        dilation[0] == dilation[1] == 1
        and pad_h < kernels.shape[2] <= x.shape[2] + 2 * pad_h
        and pad_w < kernels.shape[3] <= x.shape[3] + 2 * pad_w
        and native.ready(x, kernels)
        and native.ready(grad)
    )


def _static_gradients(x, kernels, grad, conv_params, of_x, of_kernels) -> tuple[Tensor | None, Tensor | None]:
    """Return gradients of a depthwise convolution by native kernels, as those of a single expert."""
    stride, padding, dilation, _ = conv_params
    alone = x.new_ones(x.shape[0], 1)
    if not x.is_contiguous():
        grad = grad.contiguous(memory_format=torch.channels_last)
        geometry = stride, padding, dilation
        return native.depthwise_last_gradients(x, kernels, alone, grad, *geometry, of_x, of_kernels)[:2]
    if stride != (1, 1):
        rows, columns = (x.shape[2 + i] + 2 * padding[i] - kernels.shape[2 + i] + 1 for i in range(2))
        grad = _spread(grad, torch.Size((*x.shape[:2], rows, columns)), stride)
    return native.depthwise_gradients(x, kernels, alone, grad, padding, of_x, of_kernels)[:2]


def gains_by_own_gradient(x: Tensor, weight: Tensor) -> bool:
    """Return whether torch's gradient of depthwise kernels is slower than ours for these shapes.

    oneDNN is slow for kernels of 5 x 5 and more, and for maps smaller than the kernel: ours takes 0.16 to 0.34 of its
    time (backward only; 16 samples of 44 to 912 channels, sides 2 to 32, one core). For 3 x 3 kernels on larger maps
    ours takes up to 1.26 times as long. CUDA is slow on small maps, because it starts a block of threads per kernel:
    ours takes 0.03, 0.05 and 0.24 of its time on sides of 2, 4 and 8, and 1.2 on 16 (512 samples, bfloat16, one H200).
    """
    kernel, side = max(weight.shape[2], weight.shape[3]), min(x.shape[2], x.shape[3])
    if x.device.type == "cuda":
        return x.shape[2] * x.shape[3] <= CUDA_POSITIONS
    return x.device.type == "cpu" and side > 1 and (kernel >= 5 or side < kernel)


def gains_by_float32_gradients(x: Tensor) -> bool:
    """Return whether this is half precision on a CPU, where oneDNN's depthwise gradients are faster in float32.

    The input's gradient for stride 2 takes 65 to 75 ms in bfloat16 and 1 to 5 ms in float32; for 5 x 5 kernels 31 and
    5; for 3 x 3 kernels on 2 x 2 maps 23 and 4 (64 samples of 92, 136 and 912 channels, channels last, one core with
    AMX); elsewhere the two differ little.
    """
    return x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16)
