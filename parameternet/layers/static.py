"""Static layers of torch and timm, computed as they train and compile best."""

import timm.layers
import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from .functional import depthwise_conv2d

__all__ = ["DepthwiseConv", "PooledConv", "SqueezeExcite"]

# Its choice between two ways depends on the input, which torch.fx cannot follow.
torch.fx.wrap("depthwise_conv2d")


class DepthwiseConv(nn.Conv2d):
    """A static depthwise torch.nn.Conv2d that trains faster on a CPU, see `depthwise_conv2d`."""

    def forward(self, x: Tensor) -> Tensor:
        return depthwise_conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.training)


class PooledConv(nn.Conv2d):
    """A 1 x 1 torch.nn.Conv2d for pooled maps, which compiles as the linear layer that it is there.

    torch.compile writes the batch size into a graph with a static 1 x 1 convolution on a CPU: one graph below 16 and
    one from there on (torch 2.15). It does not do so with a linear layer.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting() and torch.compiler.is_compiling() and x.shape[2] == 1 and x.shape[3] == 1:
            return F.linear(x.flatten(1), self.weight.flatten(1), self.bias)[:, :, None, None]
        return self._conv_forward(x, self.weight, self.bias)


class SqueezeExcite(timm.layers.SqueezeExcite):
    """timm's, with `PooledConv` inside."""

    def __init__(self, channels: int, device=None, dtype=None, **kwargs) -> None:
        super().__init__(channels, device=device, dtype=dtype, **kwargs)
        width = self.fc1.out_channels
        self.fc1 = PooledConv(channels, width, 1, device=device, dtype=dtype)
        self.fc2 = PooledConv(width, channels, 1, device=device, dtype=dtype)
