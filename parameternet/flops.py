"""Multiply-accumulates of a network, the mixing of kernels and the routing told apart from the convolutions."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import nn

from .layers import DynamicConv, Router

__all__ = ["Flops", "count_flops"]


@dataclass(frozen=True)
class Flops:
    """Multiply-accumulates for one picture. One multiplication with one addition counts once."""

    convolution: int = 0
    mixing: int = 0
    routing: int = 0
    linear: int = 0

    @property
    def total(self) -> int:
        return self.convolution + self.mixing + self.routing + self.linear

    def as_dict(self) -> dict[str, int]:
        return {**asdict(self), "total": self.total}


def count_flops(model: nn.Module, input_size: Sequence[int] = (3, 224, 224)) -> Flops:
    """Count by running `model` on one picture without arithmetic (meta device).

    Counted: convolutions and linear layers (without biases), kernel mixing (one for each number of the expert kernels)
    and routing linears. Not counted, here as in most tables: normalisation, activations, pooling, additions, and
    functional calls outside of these layers.

    Args:
        model: Any network of torch.nn.Conv2d, torch.nn.Linear and DynamicConv layers; it is left as it is.
        input_size: (channels, height, width).
    """
    counts = dict.fromkeys(("convolution", "mixing", "routing", "linear"), 0)

    def convolution(layer, inputs, output):
        kernel = layer.in_channels // layer.groups * layer.kernel_size[0] * layer.kernel_size[1]
        counts["convolution"] += kernel * output[0].numel()
        if isinstance(layer, DynamicConv):
            counts["mixing"] += layer.weight.numel()

    def linear(layer, inputs, output):
        counts["linear"] += layer.in_features * output[0].numel()

    def routing(layer, inputs, output):
        counts["routing"] += layer.weight.numel() + (0 if layer.hidden is None else layer.hidden.weight.numel())

    kinds = {nn.Conv2d: convolution, DynamicConv: convolution, Router: routing, nn.Linear: linear}
    copy = _on_meta(model)
    for module in copy.modules():
        hook = next((hook for kind, hook in kinds.items() if isinstance(module, kind)), None)
        if hook is not None:
            module.register_forward_hook(hook)
    with torch.no_grad():
        copy(torch.empty(1, *input_size, device="meta", dtype=next(copy.parameters()).dtype))
    return Flops(**counts)


def _on_meta(model: nn.Module) -> nn.Module:
    """A copy without memory for its tensors, in evaluation mode and without hooks that others hung in."""
    from copy import deepcopy

    memo = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        meta = tensor.detach().to("meta")
        memo[id(tensor)] = nn.Parameter(meta, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else meta
    return deepcopy(model, memo).eval()
