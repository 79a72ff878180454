# SPDX-License-Identifier: AGPL-3.0-or-later
"""Layers for the rows of Ultralytics' YAMLs, in Ultralytics' signatures: c1 and c2 are channels in and out.

Checkpoints refer to these classes as `parameternet.yolo.<name>`, whichever file defines them.
"""

from typing import Any, TypeVar

from torch import Tensor, nn
from ultralytics.nn.modules import C2f, Conv
from ultralytics.nn.modules.block import Bottleneck, C3k, C3k2

from parameternet import layers
from parameternet.layers.folding import fold_batch_norm
from parameternet.layers.functional import pair

__all__ = [
    "C2f_DynamicConv",
    "C2f_GhostModule_DynamicConv",
    "C3k2_DynamicConv",
    "C3k2_GhostModule_DynamicConv",
    "C3k_DynamicConv",
    "DynamicConv",
    "DynamicConvBnAct",
    "GhostBottleneck",
    "GhostModule",
]

Class = TypeVar("Class", bound=type)


def _public(cls: Class) -> Class:
    """Set the dotted name that checkpoints store."""
    cls.__module__ = "parameternet.yolo"
    return cls


def _pair(value: Any) -> Any:
    return pair(value) if isinstance(value, list | tuple) else value


@_public
class DynamicConv(layers.DynamicConv):
    """The bare layer of the articles, without norm and activation; the output shrinks only by the stride.

    p: Padding, as in `parameternet.DynamicConv`; None is its default. The rest as there: bias, num_experts, routing,
    routing_hidden, temperature; in a YAML as a dictionary that ends the row, `[512, 3, 2, {num_experts: 8}]`.
    """

    def __init__(self, c1: int, c2: int, k=1, s=1, p=None, g: int = 1, d=1, bias: bool = False, **options: Any):
        padding = "" if p is None else _pair(p)
        super().__init__(c1, c2, _pair(k), _pair(s), padding, _pair(d), g, bias, **options)


@_public
class DynamicConvBnAct(nn.Module):
    """Ultralytics' `Conv` with a dynamic convolution, followed by batch norm and the network's activation.

    Submodules and padding are those of `Conv`, so that its weights can be upcycled. act: True for the default
    activation of the network that is being built, a module, or False for none.
    """

    def __init__(self, c1: int, c2: int, k=1, s=1, p=None, g: int = 1, d=1, act: Any = True, **options: Any):
        super().__init__()
        self.conv = DynamicConv(c1, c2, k, s, _autopad(k, d) if p is None else p, g, d, **options)
        self.bn = nn.BatchNorm2d(c2)
        self.act = Conv.default_act if act is True else act if isinstance(act, nn.Module) else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))

    def reparameterize(self) -> None:
        """Fold batch normalisation into every expert, in place; idempotent."""
        self.bn = fold_batch_norm(self.conv, self.bn)


def _autopad(k: Any, d: Any) -> tuple[int, int]:
    return tuple(
        (dilation * (kernel - 1) + 1) // 2 for kernel, dilation in zip(pair(_pair(k)), pair(_pair(d)), strict=True)
    )


def _conv_layer(options: dict[str, Any]):
    def conv(c1, c2, kernel_size, stride=1, padding=0, groups=1, bias=False, device=None, dtype=None):
        return DynamicConv(
            c1, c2, kernel_size, stride, padding, groups, bias=bias, device=device, dtype=dtype, **options
        )

    return conv


@_public
class GhostModule(layers.GhostModule):
    """`parameternet.GhostModule` with the arguments of a YAML row."""

    def __init__(self, c1: int, c2: int, k: int = 1, s: int = 1, ratio: int = 2, dw_size: int = 3, **options: Any):
        super().__init__(c1, c2, k, ratio, dw_size, s, conv_layer=_conv_layer(options))


@_public
class GhostBottleneck(layers.GhostBottleneck):
    """`parameternet.GhostBottleneck`; in a YAML `GhostBottleneck_DynamicConv`, because Ultralytics has its own."""

    def __init__(self, c1: int, c2: int, k: int = 3, s: int = 1, se_ratio: float = 0.0, **options: Any):
        super().__init__(c1, c2, k, s, se_ratio=se_ratio, conv_layer=_conv_layer(options))


@_public
class C2f_GhostModule_DynamicConv(C2f):
    """C2f whose blocks are Ghost modules without a shortcut, as in the articles; `shortcut` and `g` are ignored."""

    def __init__(
        self, c1: int, c2: int, n: int = 1, shortcut: bool = False, g: int = 1, e: float = 0.5, **options: Any
    ):
        super().__init__(c1, c2, 0, shortcut, g, e)
        self.cv2 = Conv((2 + n) * self.c, c2, 1)
        self.m = nn.ModuleList(GhostModule(self.c, self.c, **options) for _ in range(n))


@_public
class C2f_DynamicConv(C2f):
    """C2f whose bottlenecks have a `DynamicConvBnAct` as the second convolution, and keep the shortcut."""

    def __init__(
        self, c1: int, c2: int, n: int = 1, shortcut: bool = False, g: int = 1, e: float = 0.5, **options: Any
    ):
        super().__init__(c1, c2, n, shortcut, g, e)
        make_bottlenecks_dynamic(self, options)


@_public
class C3k_DynamicConv(C3k):
    """C3k with the bottlenecks of `C2f_DynamicConv`."""

    def __init__(
        self,
        c1: int,
        c2: int,
        n: int = 1,
        shortcut: bool = True,
        g: int = 1,
        e: float = 0.5,
        k: int = 3,
        **options: Any,
    ):
        super().__init__(c1, c2, n, shortcut, g, e, k)
        make_bottlenecks_dynamic(self, options)


@_public
class C3k2_DynamicConv(C3k2):
    """C3k2 with the bottlenecks of `C2f_DynamicConv`; `rebuild` converts a C3k2 built by Ultralytics."""

    def __init__(self, *args: Any, num_experts: int = 4, routing: str = "softmax", **kwargs: Any):
        super().__init__(*args, **kwargs)
        make_bottlenecks_dynamic(self, {"num_experts": num_experts, "routing": routing})

    @classmethod
    def rebuild(cls, stock: C3k2, **options: Any) -> nn.Module:
        """Change a stock layer in place: a dynamic second convolution in each bottleneck."""
        make_bottlenecks_dynamic(stock, options)
        stock.__class__ = cls
        return stock


@_public
class C3k2_GhostModule_DynamicConv(C3k2):
    """C3k2 whose blocks are Ghost modules, like `C2f_GhostModule_DynamicConv`."""

    def __init__(self, *args: Any, num_experts: int = 4, routing: str = "softmax", **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.rebuild(self, num_experts=num_experts, routing=routing)

    @classmethod
    def rebuild(cls, stock: C3k2, **options: Any) -> nn.Module:
        """Change a stock layer in place: a Ghost module for each of its blocks."""
        stock.m = nn.ModuleList(GhostModule(stock.c, stock.c, **options) for _ in stock.m)
        stock.__class__ = cls
        return stock


def make_bottlenecks_dynamic(module: nn.Module, options: dict[str, Any]) -> None:
    """Replace the second convolution of every bottleneck in `module` by a new `DynamicConvBnAct`."""
    for block in module.modules():
        if isinstance(block, Bottleneck) and isinstance(block.cv2, Conv):
            conv = block.cv2.conv
            block.cv2 = DynamicConvBnAct(
                conv.in_channels,
                conv.out_channels,
                conv.kernel_size,
                conv.stride,
                conv.padding,
                conv.groups,
                conv.dilation,
                block.cv2.act,
                **options,
            )


def fold(model: nn.Module) -> None:
    """Fold batch normalisation in all of our layers, in place, also in training mode; idempotent."""
    own = DynamicConvBnAct, layers.GhostModule, layers.GhostBottleneck, layers.ConvBnAct
    for module in model.modules():
        if isinstance(module, own):
            module.reparameterize()
