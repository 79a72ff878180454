"""The same sum computed in several orders: y_b = (sum_e alpha_be W_e) * x_b.

A strategy is a plain function `(x, weight, routing_weights, output_bias, conv_params) -> y`. Those that end in
`_in_parts` compute a batch in parts, for when neither gradients nor a graph are needed. `dispatch.py` says which one
runs where.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..deprecation import moved

__all__ = [
    "ConvParams",
    "batched_matmul",
    "batched_matmul_in_parts",
    "gated_inputs",
    "grouped",
    "grouped_in_parts",
    "is_channels_last",
    "is_depthwise",
    "is_pointwise",
    "kernels_are_large",
    "mix",
    "samples_at_a_time",
    "shifted",
    "wide",
]


class ConvParams(NamedTuple):
    """Stride, padding, dilation and groups of a convolution; pairs are (h, w)."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    @staticmethod
    def of(stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int) -> "ConvParams":
        """From pairs of any kind, as operators of torch get them."""
        return ConvParams((stride[0], stride[1]), (padding[0], padding[1]), (dilation[0], dilation[1]), groups)


# Mixed kernels of so many bytes stay in the cache of a CPU until they are used; larger ones go to memory and back.
CACHED_BYTES = 16 << 20
# From here on the C library asks the system for fresh pages at each call, which costs more than mixing.
HEAP_BYTES = 32 << 20
# A part reads all experts once, so that very large kernels want parts of some size: 960 -> 960, 3 x 3, batch 16 takes
# 613 ms in parts of 2 and 533 in parts of 8, on two cores.
FEWEST_SAMPLES = 8


def mix(weight: Tensor, routing_weights: Tensor) -> Tensor:
    """Experts (E * out, in / groups, kh, kw) and routing (B, E) -> kernels (B, out * in / groups * kh * kw)."""
    return torch.mm(routing_weights, weight.reshape(routing_weights.shape[1], -1))


def samples_at_a_time(weight: Tensor, routing_weights: Tensor) -> int:
    """For how many samples kernels are mixed at once, where the parts need not be kept."""
    batch, experts = routing_weights.shape
    if weight.device.type != "cpu":
        return batch
    bytes_each = weight.numel() // experts * weight.element_size()
    return min(batch, max(CACHED_BYTES // max(bytes_each, 1), FEWEST_SAMPLES))


def kernels_are_large(weight: Tensor, routing_weights: Tensor) -> bool:
    """Are the mixed kernels of a whole batch more than memory that is at hand?"""
    batch, experts = routing_weights.shape
    return batch * (weight.numel() // experts) * weight.element_size() > HEAP_BYTES


def grouped(
    x: Tensor, weight: Tensor, routing_weights: Tensor, output_bias: Tensor | None, conv_params: ConvParams
) -> Tensor:
    """Mix B kernels, fold the batch into the channels, convolve once with B * groups groups: at batch 1 a plain
    convolution. Takes every shape."""
    batch, experts = routing_weights.shape
    out = weight.shape[0] // experts
    kernels = mix(weight, routing_weights).reshape(batch * out, weight.shape[1], weight.shape[2], weight.shape[3])
    stride, padding, dilation, groups = conv_params
    if batch == 1:
        return F.conv2d(x, kernels, output_bias, stride, padding, dilation, groups)
    x = x.reshape(1, batch * x.shape[1], x.shape[2], x.shape[3])
    bias = None if output_bias is None else output_bias.repeat(batch)
    y = F.conv2d(x, kernels, bias, stride, padding, dilation, batch * groups)
    return y.reshape(batch, out, y.shape[2], y.shape[3])


def grouped_in_parts(
    x: Tensor, weight: Tensor, routing_weights: Tensor, output_bias: Tensor | None, conv_params: ConvParams
) -> Tensor:
    # The parts of a convolution are copied together, which only pays where the kernels are large.
    if x.shape[0] == 1 or not kernels_are_large(weight, routing_weights):
        return grouped(x, weight, routing_weights, output_bias, conv_params)
    step = samples_at_a_time(weight, routing_weights)
    parts = zip(x.split(step), routing_weights.split(step), strict=True)
    return torch.cat([grouped(part, weight, r, output_bias, conv_params) for part, r in parts])


def batched_matmul(
    x: Tensor, weight: Tensor, routing_weights: Tensor, output_bias: Tensor | None, conv_params: ConvParams
) -> Tensor:
    """Mix B kernels and apply each to its sample by a batched matrix product. Pointwise; the batch stays free."""
    x = _subsample(x, conv_params.stride)
    batch, channels, height, width = x.shape
    out = weight.shape[0] // routing_weights.shape[1]  # -1 would mean nothing to a recorded graph at batch 0
    kernels = mix(weight, routing_weights).reshape(batch, out, channels)
    if is_channels_last(x):
        rows = x.permute(0, 2, 3, 1).reshape(batch, height * width, channels)
        return (
            _product(rows, kernels.transpose(1, 2), output_bias).reshape(batch, height, width, out).permute(0, 3, 1, 2)
        )
    columns = x.reshape(batch, channels, height * width)
    y = _product(kernels, columns, None if output_bias is None else output_bias.unsqueeze(1))
    return y.reshape(batch, out, height, width)


def _product(a: Tensor, b: Tensor, output_bias: Tensor | None) -> Tensor:
    return torch.bmm(a, b) if output_bias is None else torch.baddbmm(output_bias, a, b)


def batched_matmul_in_parts(
    x: Tensor, weight: Tensor, routing_weights: Tensor, output_bias: Tensor | None, conv_params: ConvParams
) -> Tensor:
    """The same, as many samples at a time as the cache holds kernels of."""
    x = _subsample(x, conv_params.stride)
    batch, channels, height, width = x.shape
    if is_channels_last(x):
        return batched_matmul(x, weight, routing_weights, output_bias, conv_params._replace(stride=(1, 1)))
    columns = x.reshape(batch, channels, height * width)
    step = 1 if batch == 1 else samples_at_a_time(weight, routing_weights)
    if step >= batch:
        y = _mixed_product(columns, weight, routing_weights, output_bias)
    else:
        parts = zip(columns.split(step), routing_weights.split(step), strict=True)
        y = torch.cat([_mixed_product(part, weight, r, output_bias) for part, r in parts])
    return y.view(batch, -1, height, width)


def _mixed_product(columns: Tensor, weight: Tensor, routing_weights: Tensor, output_bias: Tensor | None) -> Tensor:
    """(B, in, positions) -> (B, out, positions)."""
    batch, channels, positions = columns.shape
    kernels = mix(weight, routing_weights).view(batch, -1, channels)
    # Vectors run along the last axis of a product. A few positions, as the 49 of 7 x 7, do not fill them; channels do:
    # 0.85 to 0.95 of the time at batch 8 and 32, two cores. From 64 positions on, or for one sample, it is the other
    # way round.
    if batch > 1 and positions < 64 and positions % 8 and columns.device.type == "cpu":
        y = torch.bmm(columns.transpose(1, 2), kernels.transpose(1, 2))
        return _add_(y, output_bias).transpose(1, 2).contiguous()
    return _add_(torch.bmm(kernels, columns), None if output_bias is None else output_bias.unsqueeze(1))


def _add_(y: Tensor, output_bias: Tensor | None) -> Tensor:
    # baddbmm would first write a copy of the bias for every position: 3 % of parameternet_600m at batch 8.
    return y if output_bias is None else y.add_(output_bias)


def gated_inputs(
    x: Tensor, weight: Tensor, routing_weights: Tensor, output_bias: Tensor | None, conv_params: ConvParams
) -> Tensor:
    """[W_1 ... W_E] [alpha_1 x; ...; alpha_E x] as one product: no kernel a sample, E times the products. Pointwise."""
    x = _subsample(x, conv_params.stride)
    batch, channels, height, width = x.shape
    experts = routing_weights.shape[1]
    out = weight.shape[0] // experts
    rows = x.permute(0, 2, 3, 1).reshape(batch, height * width, 1, channels)
    gated = (rows * routing_weights.reshape(batch, 1, experts, 1)).reshape(-1, experts * channels)
    stacked = weight.reshape(experts, out, channels).transpose(0, 1).reshape(out, experts * channels)
    return F.linear(gated, stacked, output_bias).reshape(batch, height, width, out).permute(0, 3, 1, 2)


def shifted(
    x: Tensor, weight: Tensor, routing_weights: Tensor, output_bias: Tensor | None, conv_params: ConvParams
) -> Tensor:
    """Add up shifted copies of x times one tap each. Depthwise; the batch stays free and compilers fuse it."""
    kh, kw = weight.shape[2], weight.shape[3]
    kernels = mix(weight, routing_weights).reshape(x.shape[0], conv_params.groups, kh * kw)
    (stride_h, stride_w), (dilation_h, dilation_w) = conv_params.stride, conv_params.dilation
    x = F.pad(x, [conv_params.padding[1], conv_params.padding[1], conv_params.padding[0], conv_params.padding[0]])
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
    return y if output_bias is None else y + output_bias[:, None, None]


def wide(
    x: Tensor, weight: Tensor, routing_weights: Tensor, output_bias: Tensor | None, conv_params: ConvParams
) -> Tensor:
    """Convolve with all experts, then add their outputs up. Constant kernels and a free batch, E times the products."""
    experts, groups = routing_weights.shape[1], conv_params.groups
    out, channels, kh, kw = weight.shape[0] // experts, weight.shape[1], weight.shape[2], weight.shape[3]
    # A grouped convolution needs kernels ordered by group; they are ordered by expert.
    by_group = weight.reshape(experts, groups, out // groups, channels, kh, kw).transpose(0, 1).reshape(weight.shape)
    y = F.conv2d(x, by_group, None, conv_params.stride, conv_params.padding, conv_params.dilation, groups)
    height, width = y.shape[2], y.shape[3]
    if out == groups:  # depthwise: the sum has the shape of the output
        y = y.reshape(-1, groups, experts, height, width)
        y = (y * routing_weights.reshape(-1, 1, experts, 1, 1)).sum(2)
    else:
        y = y.reshape(-1, groups, experts, out // groups, height, width)
        y = (y * routing_weights.reshape(-1, 1, experts, 1, 1, 1)).sum(2).reshape(-1, out, height, width)
    return y if output_bias is None else y + output_bias[:, None, None]


def _subsample(x: Tensor, stride: tuple[int, int]) -> Tensor:
    """The positions that a strided 1 x 1 kernel reads."""
    if stride[0] == 1 and stride[1] == 1:
        return x
    x = x[:, :, :: stride[0], :: stride[1]]
    # torch.export would else ask for sizes for which the reshape that follows is the kind of view that it saw.
    return x.contiguous() if torch.compiler.is_compiling() else x


def is_channels_last(x: Tensor) -> bool:
    """Whether channels are innermost, so that positions are rows of a product and nothing is copied."""
    return x.stride(1) == 1 and x.shape[1] > 1 and x.shape[2] * x.shape[3] > 1


def is_pointwise(weight: Tensor, padding: tuple[int, int], groups: int) -> bool:
    """1 x 1, unpadded and ungrouped: a matrix product."""
    return weight.shape[2] == 1 and weight.shape[3] == 1 and padding[0] == 0 and padding[1] == 0 and groups == 1


def is_depthwise(weight: Tensor, groups: int, num_experts: int) -> bool:
    """One kernel of one channel for each channel of the input."""
    return weight.shape[1] == 1 and weight.shape[0] == groups * num_experts


__getattr__ = moved(__name__, {"Geometry": f"{__name__}:ConvParams"})
