"""Compare two networks: size, cost and outputs."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..flops import Flops, count_flops
from .modes import evaluating

__all__ = ["Comparison", "compare"]


@dataclass(frozen=True)
class Comparison:
    """A comparison of two networks, (before, after).

    difference: The largest difference between outputs, relative to the largest output.
    """

    parameters: tuple[int, int]
    flops: tuple[Flops, Flops]
    difference: float


@torch.no_grad()
def compare(before: nn.Module, after: nn.Module, x: Tensor) -> Comparison:
    """Compare two networks that should have the same outputs, in evaluation mode.

    Args:
        before, after: Networks whose output is a tensor.
        x: Images (B, C, H, W), on the networks' device.
    """
    networks = (before, after)
    with evaluating(*networks):
        outputs = [network(x) for network in networks]
    scale = outputs[0].abs().max().clamp_min(torch.finfo(outputs[0].dtype).tiny)
    return Comparison(
        (sum(p.numel() for p in before.parameters()), sum(p.numel() for p in after.parameters())),
        (count_flops(before, x.shape[1:]), count_flops(after, x.shape[1:])),
        float((outputs[1] - outputs[0]).abs().max() / scale),
    )
