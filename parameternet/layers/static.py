"""Static layers of torch and timm, in forms that train and compile faster."""

from typing import TYPE_CHECKING, Any

import timm.layers
import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from . import native, triton_depthwise
from .autocast import autocast_dtype, without_autocast
from .compiled import compiles_for_python, records_a_graph
from .gradients import DepthwiseConvolution
from .strategies import ConvParams

__all__ = ["CollapsedConv", "CollapsedConvSame", "DepthwiseConv", "PooledConv", "SqueezeExcite", "static_conv2d"]

# They choose an algorithm by the input, which torch.fx cannot trace.
torch.fx.wrap("depthwise_conv2d")
torch.fx.wrap("pooled_conv2d")


class DepthwiseConv(nn.Conv2d):
    """A static depthwise torch.nn.Conv2d that trains faster on a CPU, see `depthwise_conv2d`.

    Arguments are as in torch.nn.Conv2d, except that `padding` must be numbers and there is no `padding_mode`.

    Raises:
        ValueError: Not exactly one kernel per channel, or another kind of padding.
    """

    if TYPE_CHECKING:
        stride: tuple[int, int]
        padding: tuple[int, int]
        dilation: tuple[int, int]

    def __init__(self, in_channels: int, out_channels: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(in_channels, out_channels, *args, **kwargs)
        one_each = self.groups == in_channels == out_channels
        if not one_each or isinstance(self.padding, str) or self.padding_mode != "zeros":
            raise ValueError(
                "a depthwise convolution has in_channels = out_channels = groups, and numbers for padding, with "
                f"zeros; got {self}; use torch.nn.Conv2d"
            )

    def forward(self, x: Tensor) -> Tensor:
        return depthwise_conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.training)


class CollapsedConv(nn.Conv2d):
    """A torch.nn.Conv2d that accepts and ignores routing weights, for callers that pass them."""

    def forward(self, x: Tensor, routing_weights: Tensor | None = None) -> Tensor:
        return super().forward(x)


class CollapsedConvSame(timm.layers.Conv2dSame):
    """`CollapsedConv` with timm's 'same' padding."""

    def forward(self, x: Tensor, routing_weights: Tensor | None = None) -> Tensor:
        return super().forward(x)


def static_conv2d(in_channels: int, out_channels: int, kernel_size: int, groups: int = 1, **kwargs) -> nn.Conv2d:
    """Build a torch.nn.Conv2d, or a `DepthwiseConv` if it is depthwise; arguments are as in torch.nn.Conv2d."""
    depthwise = groups == in_channels == out_channels and not isinstance(kwargs.get("padding"), str)
    layer = DepthwiseConv if depthwise else nn.Conv2d
    return layer(in_channels, out_channels, kernel_size, groups=groups, **kwargs)


def depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    training: bool,
) -> Tensor:
    """Compute a static depthwise convolution, (B, C, H, W) by (C, 1, kh, kw), plus a bias (C,) or None.

    In training on a CPU, in channels last, native kernels compute the gradients. Otherwise, with kernels of 5 x 5 and
    larger, the batch is folded into the channels: 7.7 and 10.7 ms against oneDNN's 18.6 and 30.2 for 128 x 36 x 16 x 16
    and 128 x 336 x 4 x 4 with stride 2, forward and backward on one core. In half precision gradients are computed in
    float32, see `gains_by_float32_gradients`.
    """
    if not torch.jit.is_scripting() and training and bias is None:
        if _trains_channels_last(x, weight):
            return DepthwiseConvolution.apply(x, weight, ConvParams(stride, padding, dilation, weight.shape[0]))
        if _gains_by_folding(x, weight):
            return _depthwise_by_samples(x, weight, ConvParams(stride, padding, dilation, x.shape[0] * weight.shape[0]))
        if _trains_in_half(x, weight):
            return _depthwise_in_half(x, weight, ConvParams(stride, padding, dilation, weight.shape[0]))
        if _trains_in_triton(x, weight):
            return _depthwise_in_triton(x, weight, ConvParams(stride, padding, dilation, weight.shape[0]))
    return F.conv2d(x, weight, bias, stride, padding, dilation, weight.shape[0])


@torch.jit.unused
def _gains_by_folding(x: Tensor, weight: Tensor) -> bool:
    large = x.ndim == 4 and x.shape[0] > 0 and min(weight.shape[2], weight.shape[3]) >= 5
    eager = not records_a_graph() and autocast_dtype(x.device.type) is None
    return large and x.device.type == "cpu" and weight.requires_grad and eager


@torch.jit.unused
def _trains_channels_last(x: Tensor, weight: Tensor) -> bool:
    trains = weight.requires_grad and not records_a_graph() and autocast_dtype(x.device.type) is None
    return trains and native.ready_channels_last(x, weight)


@torch.jit.unused
def _trains_in_half(x: Tensor, weight: Tensor) -> bool:
    halved = autocast_dtype(x.device.type) is not None and x.dtype != torch.float64 and x.ndim == 4
    return x.device.type == "cpu" and halved and weight.requires_grad and not records_a_graph()


@torch.jit.unused
def _trains_in_triton(x: Tensor, weight: Tensor) -> bool:
    return not records_a_graph() and x.ndim == 4 and triton_depthwise.takes(x, weight, weight.shape[0], 1)


@torch.jit.unused
def _depthwise_in_triton(x: Tensor, weight: Tensor, conv_params: ConvParams) -> Tensor:
    dtype = autocast_dtype(x.device.type) or x.dtype
    with without_autocast(x.device.type):
        return triton_depthwise.static_depthwise(x.to(dtype), weight.to(dtype), conv_params)


@torch.jit.unused
def _depthwise_in_half(x: Tensor, weight: Tensor, conv_params: ConvParams) -> Tensor:
    dtype = autocast_dtype(x.device.type)
    with without_autocast(x.device.type):
        return DepthwiseConvolution.apply(x.to(dtype), weight.to(dtype), conv_params)


@torch.jit.unused
def _depthwise_by_samples(x: Tensor, weight: Tensor, conv_params: ConvParams) -> Tensor:
    batch, channels = x.shape[:2]
    kernels = weight.expand(batch, *weight.shape).reshape(-1, *weight.shape[1:])
    y = DepthwiseConvolution.apply(x.reshape(1, batch * channels, *x.shape[2:]), kernels, conv_params)
    return y.reshape(batch, channels, *y.shape[2:])


class PooledConv(nn.Conv2d):
    """A 1 x 1 torch.nn.Conv2d for pooled maps, computed as a linear layer, see `pooled_conv2d`.

    Raises:
        ValueError: Another kernel size, or strides, padding or groups.
    """

    def __init__(self, in_channels: int, out_channels: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(in_channels, out_channels, *args, **kwargs)
        if (self.kernel_size, self.stride, self.padding, self.groups) != ((1, 1), (1, 1), (0, 0), 1):
            raise ValueError(
                "a convolution of pooled maps has a kernel of 1 x 1 and neither strides nor padding nor groups; "
                f"got {self}; use torch.nn.Conv2d"
            )

    def forward(self, x: Tensor) -> Tensor:
        return pooled_conv2d(x, self.weight, self.bias, self.training)


def pooled_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, training: bool) -> Tensor:
    """Compute a static 1 x 1 convolution, (B, C, H, W) by (out, C, 1, 1), plus a bias (out,) or None.

    On maps of one position it is a linear layer in training and for torch.compile. Backward of 1,824 -> 456 channels
    then takes 0.6 ms instead of 13.5 (128 samples, bfloat16, two cores with AMX). Also, torch.compile on a CPU
    specialises a graph with such a convolution on the batch size, below 16 and from 16 on (torch 2.15), which it does
    not do for a linear layer.
    """
    if not torch.jit.is_scripting() and _is_linear(x, training):
        return F.linear(x.flatten(1), weight.flatten(1), bias)[:, :, None, None]
    return F.conv2d(x, weight, bias)


@torch.jit.unused
def _is_linear(x: Tensor, training: bool) -> bool:
    used = compiles_for_python() if records_a_graph() else training
    return used and x.shape[2] == 1 and x.shape[3] == 1


class SqueezeExcite(timm.layers.SqueezeExcite):
    """timm's squeeze-and-excitation, built from `PooledConv`."""

    def __init__(self, channels: int, device=None, dtype=None, **kwargs) -> None:
        super().__init__(channels, device=device, dtype=dtype, **kwargs)
        width = self.fc1.out_channels
        self.fc1 = PooledConv(channels, width, 1, device=device, dtype=dtype)
        self.fc2 = PooledConv(width, channels, 1, device=device, dtype=dtype)
