"""Convert timm's CondConv networks to DynamicConv."""

from copy import deepcopy
from typing import Any

import torch
from timm.layers import CondConv2d
from torch import nn

from ..layers import DynamicConv
from ..layers.altered import alteration
from ..layers.replacing import replace_layer
from .inspection import read_elsewhere, refuse_distributed, tied
from .observe import observe

__all__ = ["convert_condconv"]


def convert_condconv(model: nn.Module, inplace: bool = False) -> nn.Module:
    """Replace each of timm's CondConv2d by a DynamicConv with the same weights and outputs.

    The network becomes faster and exportable. Each block keeps its routing (one linear layer for its three
    convolutions) and passes the routing weights, so the new layers have no router.

    Args:
        model: timm's `tf_efficientnet_cc_*`, or any network with CondConv2d.
        inplace: Change `model` itself. Otherwise a copy is changed.

    Returns:
        The network, with an attribute `converting`, which maps the name of each CondConv2d to the reason why it was
        skipped, or to None if it was converted.

    Raises:
        ValueError: There is no CondConv2d, or none that can be converted.

    Source: CondConv, arXiv:1904.04971.
    """
    refuse_distributed(model)
    if not inplace:
        model = deepcopy(model)
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, CondConv2d)]
    if not found:
        raise ValueError(f"this {type(model).__name__} has no CondConv2d")
    shared = set(tied(model, CondConv2d))
    elsewhere = read_elsewhere(observe(model))
    left = {name: _left(old) or elsewhere.get(name) for name, old in found}
    left |= dict.fromkeys(shared, "is shared, or shares its weight")
    if all(left.values()):
        reasons = "; ".join(f"{name}: {why}" for name, why in [*left.items()][:8])
        raise ValueError(f"no CondConv2d of this {type(model).__name__} can be converted ({reasons})")
    for name, old in found:
        if left[name] is None:
            replace_layer(model, name, _converted(old))
    converted: Any = model
    converted.converting = left
    return model


def _left(old: CondConv2d) -> str | None:
    if type(old) is not CondConv2d:
        return f"a {type(old).__name__} may compute something else from its weights"
    return alteration(old)


@torch.no_grad()
def _converted(old: CondConv2d) -> DynamicConv:
    new = DynamicConv(
        old.in_channels,
        old.out_channels,
        old.kernel_size,
        old.stride,
        "same" if old.dynamic_padding else old.padding,
        old.dilation,
        old.groups,
        old.bias is not None,
        old.num_experts,
        routing=None,
        device=old.weight.device,
        dtype=old.weight.dtype,
    )
    new.weight.copy_(old.weight.reshape(new.weight.shape))
    if old.bias is not None and new.bias is not None:
        new.bias.copy_(old.bias.flatten())
    return new.train(old.training).requires_grad_(old.weight.requires_grad)
