"""Static layers of torch and timm, computed as they train and compile best."""

import timm.layers
import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from .compiled import compiles_for_python
from .functional import depthwise_conv2d

__all__ = ["CollapsedConv", "CollapsedConvSame", "DepthwiseConv", "PooledConv", "SqueezeExcite", "static_conv2d"]

# Their choice between two ways depends on the input, which torch.fx cannot follow.
torch.fx.wrap("depthwise_conv2d")
torch.fx.wrap("pooled_conv2d")


class DepthwiseConv(nn.Conv2d):
    """A static depthwise torch.nn.Conv2d that trains faster on a CPU, see `depthwise_conv2d`."""

    def forward(self, x: Tensor) -> Tensor:
        return depthwise_conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.training)


class CollapsedConv(nn.Conv2d):
    """A torch.nn.Conv2d for callers that hand on routing weights, which it does not need."""

    def forward(self, x: Tensor, routing_weights: Tensor | None = None) -> Tensor:
        return super().forward(x)


class CollapsedConvSame(timm.layers.Conv2dSame):
    """`CollapsedConv` with timm's 'same' padding."""

    def forward(self, x: Tensor, routing_weights: Tensor | None = None) -> Tensor:
        return super().forward(x)


def static_conv2d(in_channels: int, out_channels: int, kernel_size: int, groups: int = 1, **kwargs) -> nn.Conv2d:
    """A torch.nn.Conv2d, as `DepthwiseConv` where it is a depthwise one; arguments are torch.nn.Conv2d's."""
    layer = DepthwiseConv if groups == in_channels == out_channels else nn.Conv2d
    return layer(in_channels, out_channels, kernel_size, groups=groups, **kwargs)


class PooledConv(nn.Conv2d):
    """A 1 x 1 torch.nn.Conv2d for pooled maps, computed as the linear layer that it is there, see `pooled_conv2d`."""

    def forward(self, x: Tensor) -> Tensor:
        return pooled_conv2d(x, self.weight, self.bias, self.training)


def pooled_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, training: bool) -> Tensor:
    """Static 1 x 1 convolution, (B, C, H, W) by (out, C, 1, 1), plus a bias (out,) or None.

    On maps of one position it is a linear layer in training and for torch.compile. Backward of 1,824 -> 456 channels
    takes 0.6 ms so, and 13.5 ms as a convolution (128 samples, bfloat16, two cores with AMX). And torch.compile writes
    the batch size into a graph with such a convolution on a CPU, one graph below 16 and one from there on (torch 2.15);
    it does not do so with a linear layer.
    """
    if not torch.jit.is_scripting() and _is_linear(x, training):
        return F.linear(x.flatten(1), weight.flatten(1), bias)[:, :, None, None]
    return F.conv2d(x, weight, bias)


@torch.jit.unused
def _is_linear(x: Tensor, training: bool) -> bool:
    recorded = torch.jit.is_tracing() or torch.compiler.is_compiling()
    used = compiles_for_python() if recorded else training
    return used and x.shape[2] == 1 and x.shape[3] == 1


class SqueezeExcite(timm.layers.SqueezeExcite):
    """timm's, with `PooledConv` inside."""

    def __init__(self, channels: int, device=None, dtype=None, **kwargs) -> None:
        super().__init__(channels, device=device, dtype=dtype, **kwargs)
        width = self.fc1.out_channels
        self.fc1 = PooledConv(channels, width, 1, device=device, dtype=dtype)
        self.fc2 = PooledConv(width, channels, 1, device=device, dtype=dtype)
