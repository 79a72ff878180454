"""Sums over the positions of feature maps, with a gradient that is expanded and not written."""

import torch
from torch import Tensor

from .gradients import keep

__all__ = ["ChannelSums", "channel_sums"]


class ChannelSums(torch.autograd.Function):
    """Sum (B, C, H, W) over positions in another dtype.

    The gradient is the same at all positions: it is converted before it is expanded, not after, so no memory is
    written for it.
    """

    @staticmethod
    def forward(x: Tensor, dtype: torch.dtype) -> Tensor:
        return x.sum((2, 3), dtype=dtype)

    plain = forward

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.of = inputs[0].dtype, inputs[0].shape
        keep(ctx, inputs[:0], inputs[1:])

    @staticmethod
    def backward(ctx, grad):
        dtype, shape = ctx.of
        return grad.to(dtype)[:, :, None, None].expand(shape), None

    @staticmethod
    def jvp(ctx, *tangents):
        return ChannelSums.plain(tangents[0], *ctx.options)

    @staticmethod
    def vmap(info, in_dims, *inputs):
        return torch.vmap(ChannelSums.plain, in_dims)(*inputs), 0


def channel_sums(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `x.sum((2, 3), dtype=dtype)`, (B, C), with a gradient that needs no memory."""
    if x.dtype == dtype or not (torch.is_grad_enabled() and x.requires_grad):
        return x.sum((2, 3), dtype=dtype)
    return ChannelSums.apply(x, dtype)
