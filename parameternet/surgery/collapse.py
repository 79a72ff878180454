"""`collapse`: dynamic convolutions whose routing hardly varies as static ones again."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass

import torch
from timm.layers import Conv2dSame
from torch import Tensor, nn

from ..layers import DynamicConv
from ..layers.replacing import replace_layer

__all__ = ["Variation", "collapse", "listening", "measure_routing"]


@dataclass(frozen=True)
class Variation:
    """How much one layer's kernels vary over a data set.

    coefficients: Mean routing weights (E,), float64. error: By how much a sample's kernel differs from the mean kernel
    at most, both as lengths (root of the sum of squares), relative to the mean kernel. samples: How many were seen.
    """

    name: str
    coefficients: Tensor
    error: float
    samples: int


def measure_routing(model: nn.Module, data: Iterable[Tensor]) -> list[Variation]:
    """Run batches of pictures through a network, in evaluation mode, and see what its routers say.

    Args:
        model: A network with DynamicConv layers.
        data: Batches (B, C, H, W), or tuples that begin with one, as data loaders give them.

    Raises:
        ValueError: Nothing to measure: no dynamic layer, or not one picture.
    """
    convs = {name: m for name, m in model.named_modules() if isinstance(m, DynamicConv)}
    if not convs:
        raise ValueError(f"this {type(model).__name__} has no dynamic convolution whose routing could be measured")
    with listening(convs) as heard, torch.no_grad():
        training = model.training
        model.eval()
        device = next(model.parameters()).device
        for batch in data:
            model((batch[0] if isinstance(batch, tuple | list) else batch).to(device))
        model.train(training)
    silent = [name for name in convs if not heard[name]]
    if silent:
        raise ValueError(f"no picture reached {', '.join(silent[:5])}: data must hold at least one batch")
    return [_variation(name, convs[name], torch.cat(heard[name])) for name in convs]


def collapse(
    model: nn.Module, data: Iterable[Tensor], tolerance: float = 1e-3, inplace: bool = False
) -> tuple[nn.Module, list[Variation]]:
    """Fold layers whose kernels vary by no more than `tolerance` over `data` into static convolutions.

    Args:
        model, data: As of `measure_routing`.
        tolerance: Largest `Variation.error` of a layer that is folded; of upcycled layers with neutral routers it is 0.
        inplace: Change `model` itself. Otherwise a copy is changed.

    Returns:
        The network, and the variation of every layer, folded or not; those up to `tolerance` were folded.
    """
    variations = measure_routing(model, data)
    if not inplace:
        model = deepcopy(model)
    for variation in variations:
        if variation.error <= tolerance:
            static = _static(model.get_submodule(variation.name), variation.coefficients)
            replace_layer(model, variation.name, static)
    return model, variations


@contextmanager
def listening(convs: dict[str, DynamicConv]) -> Iterator[dict[str, list[Tensor]]]:
    """Coefficients that reach each convolution, from its router or from whoever calls it: (B, E) float64 a call."""
    heard: dict[str, list[Tensor]] = {name: [] for name in convs}

    def note(name: str, conv: DynamicConv, inputs: tuple[Tensor, ...]) -> None:
        routing_weights = inputs[1] if len(inputs) > 1 else conv.routing(inputs[0])
        heard[name].append(routing_weights.cpu().double())

    hooks = [
        conv.register_forward_pre_hook(lambda conv, inputs, name=name: note(name, conv, inputs))
        for name, conv in convs.items()
    ]
    try:
        yield heard
    finally:
        for hook in hooks:
            hook.remove()


def _variation(name: str, conv: DynamicConv, coefficients: Tensor) -> Variation:
    """From coefficients (samples, E)."""
    mean = coefficients.mean(0)
    kernels = conv.weight.detach().double().cpu().reshape(conv.num_experts, -1)
    # Lengths of mixtures need the experts' products with each other alone: E x E numbers.
    products = kernels @ kernels.T
    apart = coefficients - mean
    squares = torch.einsum("ne,ef,nf->n", apart, products, apart).clamp_min(0)
    length = (mean @ products @ mean).sqrt().clamp_min(torch.finfo(torch.float64).tiny)
    return Variation(name, mean, float(squares.max().sqrt() / length), len(coefficients))


@torch.no_grad()
def _static(conv: DynamicConv, coefficients: Tensor) -> nn.Conv2d:
    """The convolution that `conv` is for these coefficients (E,)."""
    kind = Conv2dSame if conv.pad_same else nn.Conv2d
    has_bias = conv.bias is not None or conv.shift is not None
    static = kind(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        conv.stride,
        0 if conv.pad_same else conv.padding,
        conv.dilation,
        conv.groups,
        has_bias,
        device=conv.weight.device,
        dtype=conv.weight.dtype,
    )
    static.weight.copy_(_mixed(conv.weight, coefficients))
    if has_bias:
        static.bias.zero_()
        for part in (None if conv.bias is None else _mixed(conv.bias, coefficients), conv.shift):
            if part is not None:
                static.bias.add_(part)
    return static.train(conv.training).requires_grad_(conv.weight.requires_grad)


def _mixed(stacked: Tensor, coefficients: Tensor) -> Tensor:
    experts = stacked.double().unflatten(0, (len(coefficients), -1))
    return torch.tensordot(coefficients.to(stacked.device), experts, 1)
