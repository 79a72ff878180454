"""Contestants of speed.py: our layer and networks, the same on timm's CondConv2d and on peers, static, naive.

All contestants of a kind have the same weights, so that each can be compared with the naive form.
"""

import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.layers import CondConv2d
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from reference import naive_dynamic_conv2d

import parameternet  # noqa: F401  registers the networks
from parameternet.layers import DynamicConv
from parameternet.layers.static import DepthwiseConv
from parameternet.surgery import fuse

EXPERTS = 4


# networks -------------------------------------------------------------------------------------------------------------


def network(contestant: str, name: str, training: bool, smooth: bool = False) -> nn.Module:
    """`name` as "ours", "condconv", "static" or "naive"; for inference all but the naive one are fused.

    The static network is the baseline with `dynamic=False`. "naive static" is that one, not fused. `smooth` removes the
    kinks of activations: some of the millions of values in a step lie within a rounding of a kink and get either slope,
    which moves the gradient by 3e-4 of its length in any form, the naive one too. Without kinks it is 5e-6.
    """
    torch.manual_seed(0)
    static = contestant in ("static", "naive static")
    model = timm.create_model(name, num_classes=1000, drop_rate=0.0, dynamic=not static)
    _draw_norms(model)
    if smooth:
        _replace(model, lambda act: SMOOTH[type(act).__name__](), tuple(SMOOTH))
    model.train(training)
    if not training and not contestant.startswith("naive"):
        model = fuse(model)
    if contestant == "condconv":
        _replace(model, OnCondConv2d, ("DynamicConv",))
    if contestant == "naive":
        _replace(model, Naive, ("DynamicConv",))
    return model.train(training)


def _draw_norms(model: nn.Module) -> None:
    """Statistics as after training: a fresh normalisation does nothing, and folding it would be no feat."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)


SMOOTH = {"Hardswish": nn.SiLU, "ReLU": nn.SiLU, "Hardsigmoid": nn.Sigmoid, "HardSigmoid": nn.Sigmoid}


def _replace(model: nn.Module, make: Callable[[Any], nn.Module], kinds: tuple[str, ...]) -> None:
    """Put make(layer) in the place of each layer whose class has one of these names."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child).__name__ in kinds:
                setattr(parent, name, make(child))


class OnCondConv2d(nn.Module):
    """A DynamicConv with its kernels in timm's CondConv2d, routed by its own router.

    The parameters come in the order that DynamicConv has them in, so that gradients can be compared.
    """

    def __init__(self, conv: DynamicConv) -> None:
        super().__init__()
        self.cond = cond_conv(conv, CondConv2d if conv.output_bias is None else ShiftedCondConv2d)
        self.routing = conv.routing

    def forward(self, x: Tensor) -> Tensor:
        return self.cond(x, self.routing(x).to(x.dtype))


def cond_conv(conv: DynamicConv, kind: type[nn.Module]) -> nn.Module:
    """A layer of the class `kind`, which is CondConv2d or built like it, with the kernels of `conv`."""
    layer = kind(
        conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups,
        num_experts=conv.num_experts,
    )  # fmt: skip
    layer.weight = nn.Parameter(conv.weight.detach().reshape(conv.num_experts, -1).clone())
    if conv.output_bias is not None:
        layer.output_bias = nn.Parameter(conv.output_bias.detach().clone())
    return layer


class ShiftedCondConv2d(CondConv2d):
    """timm's CondConv2d after batch normalisation was folded in.

    What normalisation adds is the same for every routing, and sigmoid coefficients do not sum to one, so it cannot be
    the bias that CondConv2d mixes. It goes in where it costs least, as the bias of the one convolution; all else is as
    timm computes it.
    """

    def forward(self, x: Tensor, routing_weights: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        kernels = (routing_weights @ self.weight).view(-1, self.in_channels // self.groups, *self.kernel_size)
        y = F.conv2d(
            x.reshape(1, batch * channels, height, width),
            kernels,
            self.output_bias.repeat(batch),
            self.stride,
            self.padding,
            self.dilation,
            batch * self.groups,
        )
        return y.permute([1, 0, 2, 3]).view(batch, self.out_channels, y.shape[-2], y.shape[-1])


class Naive(nn.Module):
    """DynamicConv by its definition: sample by sample, expert by expert."""

    def __init__(self, conv: DynamicConv) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        c = self.conv
        conv_params = {"stride": c.stride, "padding": c.padding, "dilation": c.dilation, "groups": c.groups}
        return naive_dynamic_conv2d(x, c.weight, c.routing(x).to(c.weight.dtype), c.bias, **conv_params)


# layers ---------------------------------------------------------------------------------------------------------------


def layers(cin: int, cout: int, kernel: int, stride: int, groups: int) -> dict[str, nn.Module]:
    """The same convolution by each contestant. Each takes (x, routing weights), as CondConv2d does.

    Peers take part where they are installed; see `PEERS`.
    """
    torch.manual_seed(0)
    ours = DynamicConv(cin, cout, kernel, stride, kernel // 2, groups=groups, num_experts=EXPERTS)
    found = {"ours": ours, "condconv": cond_conv(ours, CondConv2d), "static": Static(ours)}
    for name, make in PEERS.items():
        try:
            peer = make(ours)
        except ModuleNotFoundError:
            continue
        if peer is not None:
            found[name] = peer
    return found


class Static(nn.Module):
    """The first expert alone, as torch.nn.Conv2d."""

    def __init__(self, conv: DynamicConv) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, groups=conv.groups,
            bias=False,
        )  # fmt: skip
        self.conv.weight = nn.Parameter(conv.expert_kernels()[0].clone())

    def forward(self, x: Tensor, routing_weights: Tensor) -> Tensor:
        return self.conv(x)


class StaticDepthwise(Static):
    """The same as DepthwiseConv, which is what our networks have in its place."""

    def __init__(self, conv: DynamicConv) -> None:
        super().__init__(conv)
        plain = self.conv
        self.conv = DepthwiseConv(
            plain.in_channels, plain.out_channels, plain.kernel_size, plain.stride, plain.padding, groups=plain.groups,
            bias=False,
        )  # fmt: skip
        self.conv.weight = plain.weight


def naive_layer(conv: DynamicConv, x: Tensor, routing_weights: Tensor, weight: Tensor | None = None) -> Tensor:
    weight = conv.weight if weight is None else weight
    return naive_dynamic_conv2d(
        x, weight, routing_weights, stride=conv.stride, padding=conv.padding, groups=conv.groups
    )


def _geffnet(conv: DynamicConv) -> nn.Module:
    from geffnet.conv2d_layers import CondConv2d as Peer

    return cond_conv(conv, Peer)


def _fightingcv(conv: DynamicConv) -> nn.Module | None:
    from fightingcv_attention.conv.CondConv import CondConv as Peer

    if conv.stride != (1, 1):  # it gives its output the shape of its input
        return None
    peer = Peer(
        conv.in_channels, conv.out_channels, conv.kernel_size[0], 1, conv.padding[0], grounps=conv.groups, bias=False,
        K=conv.num_experts,
    )  # fmt: skip
    peer.weight = nn.Parameter(conv.weight.detach().reshape(peer.weight.shape).clone())
    peer.attention = nn.Identity()
    return GivenRouting(peer)


class GivenRouting(nn.Module):
    """A peer that routes by itself, made to take the routing weights that all others take."""

    def __init__(self, peer: nn.Module) -> None:
        super().__init__()
        self.peer = peer

    def forward(self, x: Tensor, routing_weights: Tensor) -> Tensor:
        self.peer.attention.forward = lambda _: routing_weights
        return self.peer(x)


PEERS = {"geffnet": _geffnet, "fightingcv": _fightingcv}


def double(module: nn.Module) -> nn.Module:
    return deepcopy(module).double()
