"""Blocks of GhostNet with dynamic convolutions: ConvBnAct, GhostModule, GhostBottleneck.

Every block builds its convolutions with `conv_layer`, which takes the arguments of torch.nn.Conv2d. None means
DynamicConv with `num_experts` experts; torch.nn.Conv2d gives the static block; use functools.partial to set a router.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from timm.layers import DropPath, HardSwish, make_divisible
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ..deprecation import renamed_arguments
from . import native
from .autocast import autocast_dtype
from .compact import CompactConv
from .dynamic_conv import DynamicConv
from .folding import fold_batch_norm
from .router import Router
from .static import DepthwiseConv, SqueezeExcite
from .strategies import are_few

__all__ = ["ConvBnAct", "GhostBottleneck", "GhostModule"]

ConvLayer = Callable[..., nn.Module] | None
ActLayer = type[nn.Module] | None
# The activations that native kernels compute.
NATIVE_ACTIVATIONS = {nn.Identity: "none", nn.ReLU: "relu", nn.Hardswish: "hard_swish", HardSwish: "hard_swish"}


def _conv_layer(conv_layer: ConvLayer, num_experts: int) -> Callable[..., nn.Module]:
    return partial(DynamicConv, num_experts=num_experts) if conv_layer is None else conv_layer


def _act(act_layer: ActLayer) -> nn.Module:
    return nn.Identity() if act_layer is None else act_layer()


class ConvBnAct(nn.Module):
    """Convolution, batch norm, activation; with `skip`, the input is added if it has the output's shape.

    Input (B, in_chs, H, W) -> output (B, out_chs, H', W'). `pad_type` is DynamicConv's `padding`.
    """

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        kernel_size: int,
        stride: int = 1,
        dilation: int = 1,
        pad_type: str = "",
        skip: bool = False,
        act_layer: ActLayer = nn.ReLU,
        norm_layer: type[nn.Module] = nn.BatchNorm2d,
        drop_path_rate: float = 0.0,
        num_experts: int = 4,
        conv_layer: ConvLayer = None,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        padding = ((stride - 1) + dilation * (kernel_size - 1)) // 2 if pad_type == "" else pad_type
        conv = _conv_layer(conv_layer, num_experts)
        self.conv = conv(
            in_chs, out_chs, kernel_size, stride=stride, padding=padding, dilation=dilation, bias=False, **dd
        )
        self.bn1: nn.Module = norm_layer(out_chs, **dd)
        self.act1 = _act(act_layer)
        self.has_residual = skip and stride == 1 and in_chs == out_chs
        self.drop_path = DropPath(drop_path_rate) if drop_path_rate else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.act1(self.bn1(self.conv(x)))
        return x + self.drop_path(y) if self.has_residual else y

    @torch.jit.ignore
    def reparameterize(self) -> None:
        """Fold batch normalisation, in place; timm's `reparameterize_model` calls this."""
        self.bn1 = fold_batch_norm(self.conv, self.bn1)


class GhostModule(nn.Module):
    """Compute half of the channels with a convolution, and the rest from these with a cheap depthwise one.

    Input (B, in_chs, H, W) -> output (B, out_chs, H', W'). The primary convolution makes ceil(out_chs / ratio)
    channels, the cheap one ratio - 1 more from each; channels beyond `out_chs` are dropped. Ratio 1 has no cheap part.

    Args:
        in_chs, out_chs: Channels in and out.
        kernel_size, stride: For the primary convolution.
        ratio: Output channels per primary channel, at least 1.
        dw_size: Kernel of the cheap convolution, odd (an even one changes height and width).
        act_layer: After each part; None for none.
        num_experts: Kernels per convolution.
        conv_layer: Builds convolutions from the arguments of torch.nn.Conv2d; None: DynamicConv with `num_experts`.

    Source: GhostNet, arXiv:1911.11907.
    """

    @renamed_arguments(inp="in_chs", oup="out_chs")
    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        kernel_size: int = 1,
        ratio: int = 2,
        dw_size: int = 3,
        stride: int = 1,
        act_layer: ActLayer = nn.ReLU,
        num_experts: int = 4,
        conv_layer: ConvLayer = None,
        norm_layer: type[nn.Module] = nn.BatchNorm2d,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if ratio < 1:
            raise ValueError(f"ratio must be at least 1, got {ratio}")
        if dw_size % 2 == 0 or kernel_size % 2 == 0:
            raise ValueError(
                f"kernel_size={kernel_size} and dw_size={dw_size} must be odd: with an even kernel the two halves of "
                "a Ghost module differ in height and width"
            )
        dd = {"device": device, "dtype": dtype}
        conv = _conv_layer(conv_layer, num_experts)
        self.out_channels = out_chs
        primary = math.ceil(out_chs / ratio)
        cheap = primary * (ratio - 1)
        self.primary_conv = nn.Sequential(
            conv(in_chs, primary, kernel_size, stride=stride, padding=kernel_size // 2, bias=False, **dd),
            norm_layer(primary, **dd),
            _act(act_layer),
        )
        self.cheap_operation = nn.Sequential()
        if cheap:
            self.cheap_operation = nn.Sequential(
                conv(primary, cheap, dw_size, stride=1, padding=dw_size // 2, groups=primary, bias=False, **dd),
                norm_layer(cheap, **dd),
                _act(act_layer),
            )
        self.has_cheap = cheap > 0
        self.has_surplus = primary + cheap > out_chs

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            y = self._infer(x)
            if y is not None:
                return y
        x = self.primary_conv(x)
        if self.has_cheap:
            x = torch.cat([x, self.cheap_operation(x)], dim=1)
        return x[:, : self.out_channels] if self.has_surplus else x

    @torch.jit.unused
    def _infer(self, x: Tensor) -> Tensor | None:
        """Let native kernels write both parts into one tensor, activated; return None if they cannot.

        This saves a concatenation and two passes of the activation.
        """
        if not native.ready(x) or autocast_dtype("cpu") is not None or (torch.is_grad_enabled() and x.requires_grad):
            return None
        primary, cheap = _inferable(self.primary_conv), _inferable(self.cheap_operation)
        if primary is None or cheap is None or self.has_surplus or _has_any_global_hook():
            return None
        (conv, router, activation), (cheap_conv, cheap_router, cheap_activation) = primary, cheap
        batch, _, height, width = x.shape
        middle, out = conv.out_channels, conv.out_channels + cheap_conv.out_channels
        if not (
            conv.in_channels == x.shape[1]
            and conv.kernel_size == conv.stride == cheap_conv.stride == cheap_conv.dilation == (1, 1)
            and conv.padding == (0, 0)
            and conv.groups == 1
            and type(cheap_conv) is DynamicConv
            and not are_few(height * width)
            and cheap_conv.groups == cheap_conv.out_channels == middle
            and all(side == 2 * pad + 1 for side, pad in zip(cheap_conv.kernel_size, cheap_conv.padding, strict=True))
        ):
            return None
        y = x.new_empty(batch, out, height, width)
        half = y[:, :middle]
        native.pointwise(x, conv.weight, _readable(router(x), conv.num_experts), conv.output_bias, activation, half)
        native.depthwise(
            half,
            cheap_conv.weight,
            _readable(cheap_router(half), cheap_conv.num_experts),
            cheap_conv.output_bias,
            cheap_conv.padding,
            cheap_activation,
            y[:, middle:],
        )
        return y

    @torch.jit.ignore
    def reparameterize(self) -> None:
        """Fold batch normalisation, in place; timm's `reparameterize_model` calls this."""
        _fold_inside(self.primary_conv)
        _fold_inside(self.cheap_operation)


class GhostBottleneck(nn.Module):
    """Ghost module up, depthwise convolution if stride > 1, squeeze-and-excitation, Ghost module down, shortcut.

    Input (B, in_chs, H, W) -> output (B, out_chs, ceil(H / stride), ceil(W / stride)).

    Args:
        in_chs, out_chs: Channels in and out.
        dw_kernel_size: For the strided depthwise convolution and a projecting shortcut; odd.
        stride: For both of these.
        act_layer: For the first Ghost module and squeeze-and-excitation.
        se_ratio: Width of squeeze-and-excitation relative to the middle; 0 or None for none.
        drop_path: Probability of dropping the residual branch of a sample in training.
        mid_chs: Middle width, as in the released ParameterNet; None: 2 * in_chs, as in the articles.
        num_experts, conv_layer: As in GhostModule. The strided depthwise convolution is always static.

    Source: GhostNet, arXiv:1911.11907; ParameterNet, arXiv:2306.14525.
    """

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        dw_kernel_size: int = 3,
        stride: int = 1,
        act_layer: ActLayer = nn.ReLU,
        se_ratio: float | None = 0.0,
        drop_path: float = 0.0,
        num_experts: int = 4,
        mid_chs: int | None = None,
        conv_layer: ConvLayer = None,
        norm_layer: type[nn.Module] = nn.BatchNorm2d,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if dw_kernel_size % 2 == 0:
            raise ValueError(f"dw_kernel_size must be odd, got {dw_kernel_size}")
        dd = {"device": device, "dtype": dtype}
        conv = _conv_layer(conv_layer, num_experts)
        ghost: Callable[..., nn.Module] = partial(GhostModule, conv_layer=conv, norm_layer=norm_layer, **dd)
        mid_chs = 2 * in_chs if mid_chs is None else mid_chs
        depthwise = {"stride": stride, "padding": dw_kernel_size // 2, "bias": False}

        self.ghost1 = ghost(in_chs, mid_chs, act_layer=act_layer)
        self.conv_dw: nn.Module = nn.Identity()
        self.bn_dw: nn.Module = nn.Identity()
        if stride > 1:
            self.conv_dw = DepthwiseConv(mid_chs, mid_chs, dw_kernel_size, groups=mid_chs, **depthwise, **dd)
            self.bn_dw = norm_layer(mid_chs, **dd)
        self.se: nn.Module = nn.Identity()
        if se_ratio:
            width = make_divisible(mid_chs * se_ratio, 4)
            self.se = SqueezeExcite(
                mid_chs, rd_channels=width, act_layer=act_layer or nn.ReLU, gate_layer="hard_sigmoid", **dd
            )
        self.ghost2 = ghost(mid_chs, out_chs, act_layer=None)
        self.shortcut = nn.Sequential()
        if stride > 1 or in_chs != out_chs:
            self.shortcut = nn.Sequential(
                conv(in_chs, in_chs, dw_kernel_size, groups=in_chs, **depthwise, **dd),
                norm_layer(in_chs, **dd),
                conv(in_chs, out_chs, 1, bias=False, **dd),
                norm_layer(out_chs, **dd),
            )
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.ghost1(x)
        y = self.bn_dw(self.conv_dw(y))
        y = self.ghost2(self.se(y))
        return self.shortcut(x) + self.drop_path(y)

    @torch.jit.ignore
    def reparameterize(self) -> None:
        """Fold batch normalisation outside of the Ghost modules, in place; timm's `reparameterize_model` calls this."""
        self.bn_dw = fold_batch_norm(self.conv_dw, self.bn_dw)
        _fold_inside(self.shortcut)


def _inferable(layers: nn.Sequential) -> tuple[DynamicConv | CompactConv, Router, str] | None:
    """Return a part's convolution, router and activation if native kernels compute the same as calling the part."""
    if type(layers) is not nn.Sequential or len(layers) != 3 or any(_is_observed(layer) for layer in (layers, *layers)):
        return None
    conv, norm, act = layers
    activation = NATIVE_ACTIVATIONS.get(type(act))
    if type(conv) not in (DynamicConv, CompactConv) or type(norm) is not nn.Identity or activation is None:
        return None
    if conv.routing is None or conv.bias is not None or conv.pad_same:
        return None
    if torch.is_grad_enabled() and (
        _is_observed(conv.routing)  # a hook may return what requires gradients
        or any(t is not None and t.requires_grad for t in (conv.weight, conv.output_bias, *conv.routing.parameters()))
    ):
        return None
    if type(conv) is CompactConv:
        readable = native.ready_compact(conv.weight, conv.num_experts)
    else:
        readable = conv.strategy is None and native.ready(conv.weight, conv.output_bias)
    return (conv, conv.routing, activation) if readable else None


def _readable(routing_weights: Tensor, num_experts: int) -> Tensor:
    """Convert routing weights to contiguous float32; a router's hook may have changed them."""
    if routing_weights.shape[1:] != (num_experts,):
        raise ValueError(
            f"expected routing_weights of shape (batch, num_experts) with num_experts={num_experts}, got "
            f"{tuple(routing_weights.shape)}"
        )
    return routing_weights.float().contiguous()


def _is_observed(layer: nn.Module) -> bool:
    """Return whether calling this layer does more than its class says."""
    return bool(layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer))


def _fold_inside(layers: nn.Sequential) -> None:
    for index in range(1, len(layers)):
        layers[index] = fold_batch_norm(layers[index - 1], layers[index])
