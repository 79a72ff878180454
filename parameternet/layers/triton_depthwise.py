"""Depthwise convolutions with a kernel for each sample, in Triton: on CUDA, channels last.

torch has to fold the batch into the channels, which copies input and output of a network in channels last, and in
backward it starts a block of threads for each channel and tap. These programs read and write channels last.

Training parameternet_600m with 512 images of 64 pixels, bfloat16, as a CUDA graph on one H200, forward and backward of
a step take 53 ms channels first and 46 ms channels last with these programs; its static baseline, which uses them too,
takes 45 and 31 ms.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .autocast import without_autocast
from .gradients import directional_derivative, keep
from .strategies import ConvParams, is_channels_last, is_depthwise, mix

__all__ = ["DepthwiseOfEach", "mixed_depthwise", "static_depthwise", "takes"]

_TILE = 1024  # elements of a program's tile, over channels and positions
_MOST_CHANNELS = 64
_TYPES = (torch.float32, torch.float16, torch.bfloat16)


def takes(x: Tensor, weight: Tensor, groups: int, num_experts: int) -> bool:
    """Return whether these programs can compute a convolution (B, C, H, W) by (E * C, 1, kh, kw)."""
    if not x.is_cuda or x.dtype not in _TYPES or x.shape[0] < 2:  # one sample is a static convolution
        return False
    return is_depthwise(weight, groups, num_experts) and is_channels_last(x) and _has_triton()


def mixed_depthwise(
    x: Tensor, weight: Tensor, routing_weights: Tensor, output_bias: Tensor | None, conv_params: ConvParams
) -> Tensor:
    """Compute y_b = (sum_e alpha_be W_e) * x_b, depthwise; the arguments are those of a strategy."""
    experts, sides = routing_weights.shape[1], weight.shape[2:]
    by_tap = weight.reshape(experts, -1, sides[0] * sides[1]).transpose(1, 2)
    kernels = mix(by_tap, routing_weights).view(x.shape[0], by_tap.shape[1], by_tap.shape[2])
    y = DepthwiseOfEach.apply(x, kernels, sides, conv_params)
    return y if output_bias is None else y + output_bias[:, None, None]


def static_depthwise(x: Tensor, weight: Tensor, conv_params: ConvParams) -> Tensor:
    """Convolve (B, C, H, W) by (C, 1, kh, kw), depthwise."""
    kernels = weight.flatten(1).t().expand(x.shape[0], -1, -1)
    return DepthwiseOfEach.apply(x, kernels, weight.shape[2:], conv_params)


class DepthwiseOfEach(torch.autograd.Function):
    """Convolve each sample of (B, C, H, W) depthwise with its own kernel of (B, kh * kw, C).

    As in gradients.py, forward mode, `torch.func.vmap` and the gradient of a gradient use `plain`.
    """

    @staticmethod
    def forward(x: Tensor, kernels: Tensor, sides: Sequence[int], conv_params: ConvParams) -> Tensor:
        return _forward(x, kernels, sides, conv_params)

    @staticmethod
    def plain(x: Tensor, kernels: Tensor, sides: Sequence[int], conv_params: ConvParams) -> Tensor:
        """Compute the same in torch's own operations."""
        batch, channels = x.shape[:2]
        folded = kernels.transpose(1, 2).reshape(batch * channels, 1, sides[0], sides[1])
        stride, padding, dilation, _ = conv_params
        y = F.conv2d(x.reshape(1, -1, *x.shape[2:]), folded, None, stride, padding, dilation, batch * channels)
        return y.reshape(batch, channels, *y.shape[2:])

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        keep(ctx, inputs[:2], inputs[2:])

    @staticmethod
    def backward(ctx, grad):
        x, kernels = ctx.saved_tensors
        needed = ctx.needs_input_grad[:2]
        with without_autocast(grad.device.type):
            form = _plain_gradients if torch.is_grad_enabled() else _gradients  # create_graph=True
            return *form(x, kernels, grad, ctx.options, needed), None, None

    @staticmethod
    def jvp(ctx, *tangents):
        return directional_derivative(DepthwiseOfEach.plain, ctx, tangents)

    @staticmethod
    def vmap(info, in_dims, *inputs):
        return torch.vmap(DepthwiseOfEach.plain, in_dims)(*inputs), 0


Gradients = tuple[Tensor | None, Tensor | None]


def _plain_gradients(x: Tensor, kernels: Tensor, grad: Tensor, options: tuple, needed: Sequence[bool]) -> Gradients:
    """Return gradients that can be differentiated again."""
    wanted = [tensor for tensor, need in zip((x, kernels), needed, strict=True) if need]
    found = iter(torch.autograd.grad(DepthwiseOfEach.plain(x, kernels, *options), wanted, grad, create_graph=True))
    return (next(found) if needed[0] else None), (next(found) if needed[1] else None)


def _gradients(x: Tensor, kernels: Tensor, grad: Tensor, options: tuple, needed: Sequence[bool]) -> Gradients:
    return (
        _backward_x(x, kernels, grad, *options) if needed[0] else None,
        _backward_kernels(x, kernels, grad, *options) if needed[1] else None,
    )


def _forward(x: Tensor, kernels: Tensor, sides: Sequence[int], conv_params: ConvParams) -> Tensor:
    x, kernels = x.contiguous(memory_format=torch.channels_last), kernels.contiguous()
    out = _out_sides(x, sides, conv_params)
    y = x.new_empty(*x.shape[:2], *out).contiguous(memory_format=torch.channels_last)
    if y.numel():
        _by_rows(_programs()["forward"], (x, kernels, y), x, out, out[0] * out[1], sides, conv_params)
    return y


def _backward_x(x: Tensor, kernels: Tensor, grad: Tensor, sides: Sequence[int], conv_params: ConvParams) -> Tensor:
    kernels, grad = kernels.contiguous(), grad.contiguous(memory_format=torch.channels_last)
    grad_x = torch.empty_like(x, memory_format=torch.channels_last)
    positions = x.shape[2] * x.shape[3]
    _by_rows(_programs()["backward_x"], (grad, kernels, grad_x), x, grad.shape[2:], positions, sides, conv_params)
    return grad_x


def _by_rows(program: Any, tensors, x: Tensor, out, positions: int, sides, conv_params: ConvParams) -> None:
    """Run a program over tiles of (sample and position, channel)."""
    channels = _channels(x.shape[1])
    rows, total = _TILE // channels, len(x) * positions
    grid = (-(-total // rows), -(-x.shape[1] // channels))
    program[grid](*tensors, total, *x.shape[1:], *out, *_numbers(conv_params), *sides, rows, channels, num_warps=4)


def _backward_kernels(
    x: Tensor, kernels: Tensor, grad: Tensor, sides: Sequence[int], conv_params: ConvParams
) -> Tensor:
    x, grad = (t.contiguous(memory_format=torch.channels_last) for t in (x, grad))
    grad_kernels = torch.empty_like(kernels, memory_format=torch.contiguous_format)
    channels = _channels(x.shape[1])
    places = min(_power_of_two(grad.shape[2] * grad.shape[3]), _TILE // channels)
    samples = _TILE // channels // places
    grid = (-(-len(x) // samples), -(-x.shape[1] // channels))
    _programs()["backward_kernels"][grid](
        grad, x, grad_kernels, len(x), *x.shape[1:], *grad.shape[2:], *_numbers(conv_params), *sides, samples, places,
        channels, num_warps=4,
    )  # fmt: skip
    return grad_kernels


def _channels(channels: int) -> int:
    return min(_power_of_two(channels), _MOST_CHANNELS)


def _power_of_two(number: int) -> int:
    """Return the next power of two, at least 2."""
    return 1 << max(number - 1, 1).bit_length()


def _numbers(conv_params: ConvParams) -> tuple[int, ...]:
    return *conv_params.stride, *conv_params.padding, *conv_params.dilation


def _out_sides(x: Tensor, sides: Sequence[int], conv_params: ConvParams) -> tuple[int, int]:
    stride, padding, dilation, _ = conv_params
    h, w = ((x.shape[2 + i] + 2 * padding[i] - dilation[i] * (sides[i] - 1) - 1) // stride[i] + 1 for i in range(2))
    return h, w


@functools.cache
def _has_triton() -> bool:
    """Return whether Triton can be imported; it comes with torch on Linux."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


@functools.cache
def _programs() -> dict[str, Any]:
    """Define the Triton programs."""
    import triton
    import triton.language as tl

    # One compiled program serves all sizes, strides and paddings.
    varying = ["total", "C", "H", "W", "OH", "OW", "SH", "SW", "PH", "PW", "DH", "DW"]

    @triton.jit(do_not_specialize=varying)
    def forward(
        x, kernels, y, total, C, H, W, OH, OW, SH, SW, PH, PW, DH, DW,
        KH: tl.constexpr, KW: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        channel = (tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS))[None, :]
        sample, place = (row // (OH * OW))[:, None], (row % (OH * OW))[:, None]
        top, left = place // OW * SH - PH, place % OW * SW - PW
        inside = (row < total)[:, None] & (channel < C)
        x += sample.to(tl.int64) * (H * W * C) + channel
        kernels += sample.to(tl.int64) * (KH * KW * C) + channel
        result = tl.zeros((ROWS, CHANNELS), tl.float32)
        for i in tl.static_range(KH):
            for j in tl.static_range(KW):
                h, w = top + i * DH, left + j * DW
                seen = inside & (h >= 0) & (h < H) & (w >= 0) & (w < W)
                tap = tl.load(kernels + (i * KW + j) * C, mask=inside, other=0.0)
                result += tl.load(x + (h * W + w) * C, mask=seen, other=0.0).to(tl.float32) * tap.to(tl.float32)
        tl.store(y + row.to(tl.int64)[:, None] * C + channel, result.to(y.dtype.element_ty), mask=inside)

    @triton.jit(do_not_specialize=varying)
    def backward_x(
        grad, kernels, grad_x, total, C, H, W, OH, OW, SH, SW, PH, PW, DH, DW,
        KH: tl.constexpr, KW: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        channel = (tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS))[None, :]
        sample, place = (row // (H * W))[:, None], (row % (H * W))[:, None]
        bottom, right = place // W + PH, place % W + PW
        inside = (row < total)[:, None] & (channel < C)
        grad += sample.to(tl.int64) * (OH * OW * C) + channel
        kernels += sample.to(tl.int64) * (KH * KW * C) + channel
        result = tl.zeros((ROWS, CHANNELS), tl.float32)
        for i in tl.static_range(KH):
            for j in tl.static_range(KW):
                # The output (h / SH, w / SW) read this input through tap (i, j), if both are whole numbers.
                h, w = bottom - i * DH, right - j * DW
                seen = inside & (h >= 0) & (h < OH * SH) & (w >= 0) & (w < OW * SW) & (h % SH == 0) & (w % SW == 0)
                tap = tl.load(kernels + (i * KW + j) * C, mask=inside, other=0.0)
                slope = tl.load(grad + (h // SH * OW + w // SW) * C, mask=seen, other=0.0)
                result += slope.to(tl.float32) * tap.to(tl.float32)
        tl.store(grad_x + row.to(tl.int64)[:, None] * C + channel, result.to(grad_x.dtype.element_ty), mask=inside)

    @triton.jit(do_not_specialize=varying)
    def backward_kernels(
        grad, x, grad_kernels, total, C, H, W, OH, OW, SH, SW, PH, PW, DH, DW,
        KH: tl.constexpr, KW: tl.constexpr, SAMPLES: tl.constexpr, PLACES: tl.constexpr, CHANNELS: tl.constexpr,
    ):  # fmt: skip
        first = tl.program_id(0) * SAMPLES
        row = tl.arange(0, SAMPLES * PLACES)[:, None]
        sample = first + row // PLACES
        channel = (tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS))[None, :]
        known = (sample < total) & (channel < C)
        x += sample.to(tl.int64) * (H * W * C) + channel
        grad += sample.to(tl.int64) * (OH * OW * C) + channel
        kernel = (first + tl.arange(0, SAMPLES)).to(tl.int64)[:, None] * (KH * KW * C) + channel
        stored = (first + tl.arange(0, SAMPLES) < total)[:, None] & (channel < C)
        for i in tl.static_range(KH):
            for j in tl.static_range(KW):
                result = tl.zeros((SAMPLES * PLACES, CHANNELS), tl.float32)
                for start in range(0, OH * OW, PLACES):
                    place = start + row % PLACES
                    h, w = place // OW * SH - PH + i * DH, place % OW * SW - PW + j * DW
                    inside = known & (place < OH * OW)
                    seen = inside & (h >= 0) & (h < H) & (w >= 0) & (w < W)
                    value = tl.load(x + (h * W + w) * C, mask=seen, other=0.0).to(tl.float32)
                    result += value * tl.load(grad + place * C, mask=inside, other=0.0).to(tl.float32)
                found = tl.sum(tl.reshape(result, (SAMPLES, PLACES, CHANNELS)), 1)
                at = grad_kernels + kernel + (i * KW + j) * C
                tl.store(at, found.to(grad_kernels.dtype.element_ty), mask=stored)

    return {"forward": forward, "backward_x": backward_x, "backward_kernels": backward_kernels}
