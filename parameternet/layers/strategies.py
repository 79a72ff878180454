"""Strategies: different ways to compute y_b = (sum_e alpha_be W_e) * x_b.

A strategy is a plain function `(x, weight, routing_weights, output_bias, conv_params) -> y`. Those that end in
`_in_parts` are for when neither gradients nor a graph are needed: they run native kernels if there are any, and
otherwise compute a batch in parts. `dispatch.py` chooses among them.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..deprecation import moved
from . import native

__all__ = [
    "ConvParams",
    "are_few",
    "are_few_in_half",
    "batched_matmul",
    "batched_matmul_in_parts",
    "convolve_each",
    "fits_depthwise_kernels",
    "gated_inputs",
    "gated_outputs",
    "grouped",
    "grouped_in_parts",
    "in_float32",
    "is_channels_last",
    "is_depthwise",
    "is_pointwise",
    "kernels_are_large",
    "mix",
    "runs_channels_last",
    "runs_natively",
    "samples_at_a_time",
    "samples_in_cache",
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
        """Convert from sequences of any kind, as torch operators receive them."""
        return ConvParams((stride[0], stride[1]), (padding[0], padding[1]), (dilation[0], dilation[1]), groups)


# Mixed kernels of up to this many bytes stay in a CPU's cache until they are used.
CACHED_BYTES = 16 << 20
# Above this size the C library requests fresh pages on each call, which costs more than mixing.
HEAP_BYTES = 32 << 20
# Each part reads all experts once, so very large kernels need larger parts: 960 -> 960, 3 x 3, batch 16 takes
# 613 ms in parts of 2 and 533 in parts of 8, on two cores.
FEWEST_SAMPLES = 8


def mix(weight: Tensor, routing_weights: Tensor) -> Tensor:
    """Mix experts (E * out, in / groups, kh, kw) by routing (B, E) into kernels (B, out * in / groups * kh * kw)."""
    return torch.mm(routing_weights, weight.reshape(routing_weights.shape[1], -1))


def samples_at_a_time(weight: Tensor, routing_weights: Tensor) -> int:
    """Return how many samples' kernels to mix at once if they need not be kept."""
    batch, experts = routing_weights.shape
    if weight.device.type != "cpu":
        return batch
    return min(batch, samples_in_cache(weight.numel() // experts * weight.element_size()))


def samples_in_cache(kernel_bytes: int) -> int:
    """Return how many samples' kernels of this size to mix at once on a CPU."""
    return max(CACHED_BYTES // max(kernel_bytes, 1), FEWEST_SAMPLES)


def are_few(positions: int) -> bool:
    """Return whether gating inputs or outputs of a pointwise convolution is faster than mixing a kernel per sample.

    Training 80 -> 240 channels, batch 128, on one core: 13 and 3.8 times as fast at 1 and 4 positions, 0.6 times at 16.
    """
    return positions <= 4


def are_few_in_half(positions: int, weight: Tensor, routing_weights: Tensor) -> bool:
    """Return `are_few` for half precision on a CPU, where products are faster and mixing is not.

    Training in bfloat16, gating takes 0.46 to 1.0 of the time at 9 positions (112 -> 672, 232 -> 696 and 672 -> 112
    channels, batch 16 and 128, one core with AVX-512 BF16) and 0.9 to 1.2 for 80 -> 240; at 16 positions 0.7 to 0.8 for
    kernels that are large, and 1.0 to 1.8 for others.
    """
    return positions <= (16 if kernels_are_large(weight, routing_weights) else 9)


def kernels_are_large(weight: Tensor, routing_weights: Tensor) -> bool:
    """Return whether the mixed kernels of a whole batch exceed memory that is already allocated."""
    batch, experts = routing_weights.shape
    return batch * (weight.numel() // experts) * weight.element_size() > HEAP_BYTES


def grouped(
    x: Tensor, weight: Tensor, routing_weights: Tensor, output_bias: Tensor | None, conv_params: ConvParams
) -> Tensor:
    """Mix B kernels, fold the batch into the channels, and convolve once with B * groups groups.

    At batch 1 this is a plain convolution. Supports every shape."""
    batch, experts = routing_weights.shape
    out = weight.shape[0] // experts
    kernels = mix(weight, routing_weights).reshape(batch * out, weight.shape[1], weight.shape[2], weight.shape[3])
    return _grouped_product(x, kernels, output_bias, conv_params)


def _grouped_product(x: Tensor, kernels: Tensor, output_bias: Tensor | None, conv_params: ConvParams) -> Tensor:
    """Convolve each sample with its own kernel, (B * out, in / groups, kh, kw)."""
    batch = x.shape[0]
    out = kernels.shape[0] // batch
    stride, padding, dilation, groups = conv_params
    if batch == 1:
        return F.conv2d(x, kernels, output_bias, stride, padding, dilation, groups)
    # In float32, contiguous even if x is not: native kernels are faster then (parameternet_600m with AVX-512, batch 8:
    # 153 ms instead of 205).
    last = x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16) and is_channels_last(x)
    x = x.reshape(1, batch * x.shape[1], x.shape[2], x.shape[3])
    bias = None if output_bias is None else output_bias.repeat(batch)
    y = F.conv2d(x, kernels, bias, stride, padding, dilation, batch * groups)
    y = y.reshape(batch, out, y.shape[2], y.shape[3])
    return y.contiguous(memory_format=torch.channels_last) if last else y


def grouped_in_parts(
    x: Tensor, weight: Tensor, routing_weights: Tensor, output_bias: Tensor | None, conv_params: ConvParams
) -> Tensor:
    if is_depthwise(weight, conv_params.groups, routing_weights.shape[1]):
        tensors = x, weight, routing_weights, output_bias
        if is_channels_last(x) or fits_depthwise_kernels(x, weight, conv_params):
            tensors = in_float32(*tensors)
        if runs_natively(*tensors, conv_params):
            return native.depthwise(*tensors, conv_params.padding).to(x.dtype)
        if runs_channels_last(*tensors, conv_params):
            return native.depthwise_last(*tensors, *conv_params[:3]).to(x.dtype)
    # The outputs of the parts are concatenated, which pays off only for large kernels.
    if x.shape[0] == 1 or not kernels_are_large(weight, routing_weights):
        return grouped(x, weight, routing_weights, output_bias, conv_params)
    step = samples_at_a_time(weight, routing_weights)
    parts = zip(x.split(step), routing_weights.split(step), strict=True)
    return torch.cat([grouped(part, weight, r, output_bias, conv_params) for part, r in parts])


def batched_matmul(
    x: Tensor, weight: Tensor, routing_weights: Tensor, output_bias: Tensor | None, conv_params: ConvParams
) -> Tensor:
    """Mix B kernels and apply them by a batched matrix product. Pointwise; the batch size stays dynamic."""
    x = _subsample(x, conv_params.stride)
    batch, channels, height, width = x.shape
    out = weight.shape[0] // routing_weights.shape[1]  # -1 would be ambiguous in a recorded graph at batch 0
    if is_channels_last(x):
        rows = x.permute(0, 2, 3, 1).reshape(batch, height * width, channels)
        y = _product(rows, _transposed_kernels(weight, routing_weights, out), output_bias)
        return y.reshape(batch, height, width, out).permute(0, 3, 1, 2)
    kernels = mix(weight, routing_weights).reshape(batch, out, channels)
    columns = x.reshape(batch, channels, height * width)
    y = _product(kernels, columns, None if output_bias is None else output_bias.unsqueeze(1))
    return y.reshape(batch, out, height, width)


def _transposed_kernels(weight: Tensor, routing_weights: Tensor, out: int) -> Tensor:
    """Mix pointwise experts (E * out, in, 1, 1) into (B, in, out)."""
    batch, experts = routing_weights.shape
    channels = weight.shape[1]
    if not torch.jit.is_scripting() and _transposes_experts(batch, experts):
        # Products give the gradient of what they read, which is transposed if they read a transposed tensor: it is
        # cheaper to transpose the experts than a gradient for each sample.
        turned = weight.reshape(experts, out, channels).transpose(1, 2).reshape(experts * channels, out)
        return mix(turned, routing_weights).reshape(batch, channels, out)
    return mix(weight, routing_weights).reshape(batch, out, channels).transpose(1, 2)


@torch.jit.unused
def _transposes_experts(batch: int, experts: int) -> bool:
    recorded = torch.jit.is_tracing() or torch.compiler.is_compiling()  # the batch size of a graph may be free
    return torch.is_grad_enabled() and not recorded and batch > experts


def _product(a: Tensor, b: Tensor, output_bias: Tensor | None) -> Tensor:
    return torch.bmm(a, b) if output_bias is None else torch.baddbmm(output_bias, a, b)


def batched_matmul_in_parts(
    x: Tensor, weight: Tensor, routing_weights: Tensor, output_bias: Tensor | None, conv_params: ConvParams
) -> Tensor:
    """Compute `batched_matmul` by a native kernel, or for as many samples at a time as have kernels in the cache."""
    x = _subsample(x, conv_params.stride)
    batch, channels, height, width = x.shape
    if is_channels_last(x) and native.readable(x):
        x = x.contiguous(memory_format=torch.channels_last)  # if it is strided
    if native.ready(x, weight, routing_weights, output_bias):
        return native.pointwise(x, weight, routing_weights, output_bias)
    if runs_channels_last(x, weight, routing_weights, output_bias, conv_params._replace(stride=(1, 1))):
        return native.pointwise_last(x, weight, routing_weights, output_bias)
    if is_channels_last(x):
        first = x.contiguous() if native.readable(x) else x  # with so few images, kernels are larger than x
        if native.ready(first, weight, routing_weights, output_bias):
            y = native.pointwise(first, weight, routing_weights, output_bias)
            return y.contiguous(memory_format=torch.channels_last)
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
    """Multiply (B, in, positions) by each sample's kernel -> (B, out, positions)."""
    batch, channels, _ = columns.shape
    return _columns_product(columns, mix(weight, routing_weights).view(batch, -1, channels), output_bias)


def _columns_product(columns: Tensor, kernels: Tensor, output_bias: Tensor | None) -> Tensor:
    """Multiply (B, in, positions) by kernels (B, out, in) -> (B, out, positions)."""
    batch, _, positions = columns.shape
    # Vectors run along the last axis of a product. A few positions, as the 49 of 7 x 7, do not fill them; channels do:
    # 0.85 to 0.95 of the time at batch 8 and 32, two cores. From 64 positions on, or for one sample, it is the other
    # way round.
    if batch > 1 and positions < 64 and positions % 8 and columns.device.type == "cpu":
        y = torch.bmm(columns.transpose(1, 2), kernels.transpose(1, 2))
        return _add_(y, output_bias).transpose(1, 2).contiguous()
    return _add_(torch.bmm(kernels, columns), None if output_bias is None else output_bias.unsqueeze(1))


def _add_(y: Tensor, output_bias: Tensor | None) -> Tensor:
    # baddbmm would first copy the bias to every position: 3 % of parameternet_600m's time at batch 8.
    return y if output_bias is None else y.add_(output_bias)


def convolve_each(x: Tensor, kernels: Tensor, output_bias: Tensor | None, conv_params: ConvParams) -> Tensor:
    """Convolve each sample with its own kernel, (B, out, in / groups, kh, kw), where no gradients are needed."""
    batch, out, channels = kernels.shape[:3]
    kernels = kernels.flatten(0, 1)
    if not is_pointwise(kernels, conv_params.padding, conv_params.groups):
        return _grouped_product(x, kernels, output_bias, conv_params)
    x = _subsample(x, conv_params.stride)
    height, width = x.shape[2], x.shape[3]
    columns = x.reshape(batch, channels, height * width)
    return _columns_product(columns, kernels.view(batch, out, channels), output_bias).view(batch, out, height, width)


def gated_inputs(
    x: Tensor, weight: Tensor, routing_weights: Tensor, output_bias: Tensor | None, conv_params: ConvParams
) -> Tensor:
    """Compute [W_1 ... W_E] [alpha_1 x; ...; alpha_E x] as one product, at E times the cost. Pointwise."""
    x = _subsample(x, conv_params.stride)
    batch, channels, height, width = x.shape
    experts = routing_weights.shape[1]
    out = weight.shape[0] // experts
    rows = x.permute(0, 2, 3, 1).reshape(batch, height * width, 1, channels)
    gated = (rows * routing_weights.reshape(batch, 1, experts, 1)).reshape(-1, experts * channels)
    stacked = weight.reshape(experts, out, channels).transpose(0, 1).reshape(out, experts * channels)
    return F.linear(gated, stacked, output_bias).reshape(batch, height, width, out).permute(0, 3, 1, 2)


def gated_outputs(
    x: Tensor, weight: Tensor, routing_weights: Tensor, output_bias: Tensor | None, conv_params: ConvParams
) -> Tensor:
    """Compute sum_e alpha_e (W_e x) as one product and a sum, at E times the cost. Pointwise."""
    x = _subsample(x, conv_params.stride)
    batch, channels, height, width = x.shape
    experts = routing_weights.shape[1]
    out = weight.shape[0] // experts
    rows = x.permute(0, 2, 3, 1).reshape(-1, channels)
    each = F.linear(rows, weight.reshape(experts * out, channels)).reshape(batch, height * width, experts, out)
    y = torch.matmul(routing_weights.reshape(batch, 1, 1, experts), each).reshape(batch, height, width, out)
    return (y if output_bias is None else y + output_bias).permute(0, 3, 1, 2)


def shifted(
    x: Tensor, weight: Tensor, routing_weights: Tensor, output_bias: Tensor | None, conv_params: ConvParams
) -> Tensor:
    """Add up shifted copies of x times one tap each. Depthwise; the batch size stays dynamic, and compilers fuse it."""
    kh, kw = weight.shape[2], weight.shape[3]
    kernels = mix(weight, routing_weights).reshape(x.shape[0], conv_params.groups, kh * kw)
    (stride_h, stride_w), (dilation_h, dilation_w) = conv_params.stride, conv_params.dilation
    x = F.pad(x, [conv_params.padding[1], conv_params.padding[1], conv_params.padding[0], conv_params.padding[0]])
    # The first row or column that a tap reads, and the end of its range.
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
    """Convolve with all experts, then sum their outputs. Constant kernels, dynamic batch size, E times the cost.

    With one expert this is a static convolution whose output is scaled for each sample."""
    experts, groups = routing_weights.shape[1], conv_params.groups
    if experts == 1:
        y = F.conv2d(x, weight, None, conv_params.stride, conv_params.padding, conv_params.dilation, groups)
        y = y * routing_weights[:, :, None, None]
        return y if output_bias is None else y + output_bias[:, None, None]
    out, channels, kh, kw = weight.shape[0] // experts, weight.shape[1], weight.shape[2], weight.shape[3]
    # A grouped convolution needs kernels ordered by group, not by expert.
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
    """Return the positions that a strided 1 x 1 kernel reads."""
    if stride[0] == 1 and stride[1] == 1:
        return x
    x = x[:, :, :: stride[0], :: stride[1]]
    # Otherwise torch.export would add guards on sizes for which the following reshape is a view.
    return x.contiguous() if torch.compiler.is_compiling() else x


def runs_natively(
    x: Tensor, weight: Tensor, routing_weights: Tensor, output_bias: Tensor | None, conv_params: ConvParams
) -> bool:
    """Return whether native kernels compute this convolution and its first gradients, channels first."""
    if not native.ready(x, weight, routing_weights, output_bias):
        return False
    if is_pointwise(weight, conv_params.padding, conv_params.groups):
        return conv_params.stride == (1, 1)
    depthwise = is_depthwise(weight, conv_params.groups, routing_weights.shape[1])
    return depthwise and fits_depthwise_kernels(x, weight, conv_params)


def fits_depthwise_kernels(x: Tensor, weight: Tensor, conv_params: ConvParams) -> bool:
    """Return whether there are native kernels for this depthwise convolution, channels first."""
    stride, padding, dilation, _ = conv_params
    # For several samples, torch's operators are faster for large kernels: 0.57 to 0.87 of the time for 7 x 7.
    large = weight.shape[2] * weight.shape[3] > 25 and x.shape[0] > 1
    return (
        not large
        and stride[0] == stride[1] == dilation[0] == dilation[1] == 1
        and padding[0] < weight.shape[2] <= x.shape[2] + 2 * padding[0]
        and padding[1] < weight.shape[3] <= x.shape[3] + 2 * padding[1]
    )


def runs_channels_last(
    x: Tensor, weight: Tensor, routing_weights: Tensor, output_bias: Tensor | None, conv_params: ConvParams
) -> bool:
    """Return whether native kernels compute this convolution and its first gradients in channels last."""
    stride, padding, dilation, groups = conv_params
    if not native.ready_channels_last(x, weight, routing_weights, output_bias):
        return False
    if is_pointwise(weight, padding, groups):
        # They transpose all experts, which pays off if these are mixed for several samples.
        return stride[0] == stride[1] == 1 and x.shape[0] >= routing_weights.shape[1]
    return (
        is_depthwise(weight, groups, routing_weights.shape[1])
        and dilation[0] * (weight.shape[2] - 1) < x.shape[2] + 2 * padding[0]
        and dilation[1] * (weight.shape[3] - 1) < x.shape[3] + 2 * padding[1]
    )


def in_float32(*tensors: Any) -> Any:
    """Convert tensors in half precision, which native kernels do not read, to float32; return others as they are."""
    dtypes = {t.dtype for t in tensors if t is not None}
    half = dtypes in ({torch.bfloat16}, {torch.float16}) and tensors[0].device.type == "cpu"
    if not half or not native.level():
        return tensors
    return tuple(None if t is None else t.float() for t in tensors)


def is_channels_last(x: Tensor) -> bool:
    """Return whether channels are innermost, so that positions are rows of a matrix and nothing is copied."""
    return x.stride(1) == 1 and x.shape[1] > 1 and x.shape[2] * x.shape[3] > 1


def is_pointwise(weight: Tensor, padding: tuple[int, int], groups: int) -> bool:
    """Return whether the kernel is 1 x 1, unpadded and ungrouped, i.e. a matrix product."""
    return weight.shape[2] == 1 and weight.shape[3] == 1 and padding[0] == 0 and padding[1] == 0 and groups == 1


def is_depthwise(weight: Tensor, groups: int, num_experts: int) -> bool:
    """Return whether there is one single-channel kernel per input channel."""
    return weight.shape[1] == 1 and weight.shape[0] == groups * num_experts


__getattr__ = moved(__name__, {"Geometry": f"{__name__}:ConvParams"})
