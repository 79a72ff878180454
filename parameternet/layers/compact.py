"""CompactConv: a dynamic convolution for inference whose experts take fewer bytes."""

from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import native
from .autocast import autocast_dtype, without_autocast
from .compiled import records_a_graph
from .dispatch import convolve
from .dynamic_conv import DynamicConv, pad_same
from .router import Router
from .strategies import ConvParams, are_few, convolve_each, samples_in_cache

__all__ = ["EXPERT_DTYPES", "SHORTEST_ROW", "CompactConv"]

EXPERT_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "int8": torch.uint8}
# Shorter rows, such as those of depthwise kernels, are slower to mix this way and a small part of a network.
SHORTEST_ROW = 32
# An int8 row ends with its scale and offset, two 32-bit floats.
SCALE_BYTES = 8
MIX_BYTES = torch.ops.quantized.embedding_bag_byte_rowwise_offsets


class CompactConv(nn.Module):
    """A `DynamicConv` for inference whose experts are stored as float16, bfloat16 or int8; same input and output.

    `weight` is a buffer with one row per output channel of each expert, expert-major: (E * out_channels, in_channels /
    groups * kh * kw). With int8, a row has 8 more bytes for its scale and offset. Kernels are mixed in float32 from
    int8 and, in native kernels, from 16 bits; otherwise in their own dtype. The convolution runs in the input's dtype.

    Args:
        conv: The convolution to convert; its router and biases are shared with it.
        expert_dtype: 'float16', 'bfloat16' or 'int8'.

    Raises:
        ValueError: An unknown dtype, or experts that are not finite in it.
        RuntimeError: The input or the routing weights require gradients, which this layer does not have.
    """

    if TYPE_CHECKING:
        routing: Router | None
        weight: Tensor
        bias: Tensor | None
        output_bias: Tensor | None
        rows: Tensor
        bags: Tensor

    def __init__(self, conv: DynamicConv, expert_dtype: str) -> None:
        super().__init__()
        if expert_dtype not in EXPERT_DTYPES:
            raise ValueError(f"expert_dtype must be one of {', '.join(EXPERT_DTYPES)}, got {expert_dtype!r}")
        self.in_channels, self.out_channels, self.kernel_size = conv.in_channels, conv.out_channels, conv.kernel_size
        self.stride, self.padding, self.dilation, self.groups = conv.stride, conv.padding, conv.dilation, conv.groups
        self.pad_same, self.num_experts, self.expert_dtype = conv.pad_same, conv.num_experts, expert_dtype
        self.routing = conv.routing
        self.register_buffer("weight", _rows(conv.weight.detach(), expert_dtype))
        for name in ("bias", "output_bias"):
            value = getattr(conv, name)
            self.register_buffer(name, None if value is None else value.detach())
        rows = torch.arange(conv.weight.shape[0], dtype=torch.int32, device=conv.weight.device)
        # For each output channel, the rows of all experts; and where each channel's rows begin.
        self.register_buffer("rows", rows.view(self.num_experts, -1).t().flatten(), persistent=False)
        self.register_buffer("bags", rows[:: self.num_experts].clone(), persistent=False)
        self.train(conv.training)

    def forward(self, x: Tensor, routing_weights: Tensor | None = None) -> Tensor:
        DynamicConv._check(cast(DynamicConv, self), x, routing_weights)
        if routing_weights is None:
            if self.routing is None:
                raise ValueError("this convolution has no router: pass routing_weights (batch, experts) with x")
            routing_weights = self.routing(x)
            DynamicConv._check(cast(DynamicConv, self), x, routing_weights)  # a custom router's
        if torch.is_grad_enabled() and (x.requires_grad or routing_weights.requires_grad):
            raise RuntimeError(
                f"experts in {self.expert_dtype} have no gradients: run the network in torch.inference_mode(), or use "
                "the network without expert_dtype"
            )
        if self.pad_same:
            x = pad_same(x, self.kernel_size, self.stride, self.dilation)
        conv_params = ConvParams(self.stride, self.padding, self.dilation, self.groups)
        if records_a_graph() or x.device.type != "cpu" or x.shape[0] == 0:
            experts = self.experts().to(x.dtype)
            return convolve(x, experts, routing_weights, self.bias, conv_params, None, self.output_bias)
        dtype = autocast_dtype(x.device.type)
        if dtype is None:
            return self._convolve(x, routing_weights, conv_params)
        with without_autocast(x.device.type):
            return self._convolve(x.to(dtype), routing_weights, conv_params)

    def _convolve(self, x: Tensor, routing_weights: Tensor, conv_params: ConvParams) -> Tensor:
        if self.is_native(x) and native.ready(x, routing_weights, self.output_bias):
            return native.pointwise(x, self.weight, routing_weights, self.output_bias)
        output_bias = None if self.output_bias is None else self.output_bias.to(x.dtype)
        kernel_size = self.kernel_size[0] * self.kernel_size[1]
        step = samples_in_cache(self.out_channels * self.in_channels // self.groups * kernel_size * x.element_size())
        if x.shape[0] <= step:
            y = convolve_each(x, self.kernels(routing_weights).to(x.dtype), output_bias, conv_params)
        else:
            parts = zip(x.split(step), routing_weights.split(step), strict=True)
            y = torch.cat([convolve_each(p, self.kernels(r).to(x.dtype), output_bias, conv_params) for p, r in parts])
        if self.bias is None:
            return y
        biases = torch.mm(routing_weights.to(x.dtype), self.bias.view(self.num_experts, -1).to(x.dtype))
        return y + biases[:, :, None, None]

    def is_native(self, x: Tensor) -> bool:
        """Return whether a native kernel mixes and convolves this convolution's experts, given readable inputs."""
        return (
            self.groups == 1
            and self.padding == (0, 0)
            and self.kernel_size == self.stride == (1, 1)
            and self.bias is None
            and not are_few(x.shape[2] * x.shape[3])
            and native.ready_compact(self.weight, self.num_experts)
        )

    def kernels(self, routing_weights: Tensor) -> Tensor:
        """Mix experts by routing weights (B, E) -> kernels (B, out_channels, in_channels / groups, kh, kw). CPU."""
        shape = (-1, self.out_channels, self.in_channels // self.groups, *self.kernel_size)
        batch, experts = routing_weights.shape
        # Each output channel of a sample's kernel is a bag of rows, one per expert, summed by the routing weights.
        rows, bags = self.rows, self.bags
        if batch > 1:
            rows, bags = rows.repeat(batch), torch.arange(0, batch * rows.numel(), experts, dtype=torch.int32)
        # The operator reads memory in order. `repeat` would take longer than mixing a small kernel.
        weights = routing_weights[:, None].expand(batch, self.out_channels, experts).contiguous().view(-1)
        if self.weight.dtype == torch.uint8:
            mixed = MIX_BYTES(self.weight, rows, bags, per_sample_weights=weights.float())
        else:
            mixed = F.embedding_bag(
                rows, self.weight, bags, mode="sum", per_sample_weights=weights.to(self.weight.dtype)
            )
        return mixed.view(shape)

    def experts(self) -> Tensor:
        """Return the experts as floats, (E * out_channels, in_channels / groups, kh, kw)."""
        rows = self.weight
        if rows.dtype == torch.uint8 and torch.jit.is_tracing():  # which does not support views of another dtype
            rows = torch.ops.quantized.embedding_bag_byte_unpack(rows)
        elif rows.dtype == torch.uint8:
            # A copy: the scales' place in memory need not be a multiple of 4 bytes.
            scales = rows[:, -SCALE_BYTES:].contiguous().view(torch.float32)
            rows = rows[:, :-SCALE_BYTES].float() * scales[:, :1] + scales[:, 1:]
        return rows.view(-1, self.in_channels // self.groups, *self.kernel_size)

    def extra_repr(self) -> str:
        padding = "'same'" if self.pad_same else self.padding
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={padding}, dilation={self.dilation}, groups={self.groups}, num_experts={self.num_experts}, "
            f"expert_dtype={self.expert_dtype!r}"
        )


def _rows(weight: Tensor, expert_dtype: str) -> Tensor:
    """Convert experts (E * out, in / groups, kh, kw) to a row per output channel."""
    rows = weight.flatten(1)
    if expert_dtype == "int8":
        if not rows.isfinite().all():
            raise ValueError("experts have numbers that are not finite, which do not fit int8")
        return torch.ops.quantized.embedding_bag_byte_prepack(rows.float().cpu()).to(weight.device)
    rows = rows.to(EXPERT_DTYPES[expert_dtype])
    if not rows.isfinite().all():
        raise ValueError(f"experts have numbers that do not fit {expert_dtype}: choose another expert_dtype")
    return rows
