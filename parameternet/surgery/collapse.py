"""Turn dynamic convolutions with almost constant routing into static ones."""

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from timm.layers import Conv2dSame
from torch import Tensor, nn

from ..deprecation import renamed
from ..layers import DynamicConv
from ..layers.altered import alteration
from ..layers.compact import CompactConv
from ..layers.recording import dynamic_layers, record_routing_weights
from ..layers.replacing import replace_layer
from ..layers.static import CollapsedConv, CollapsedConvSame
from .inspection import read_elsewhere, refuse_distributed, tied
from .modes import evaluating
from .observe import Observation, observe

__all__ = ["Variation", "collapse", "measure_routing"]


@dataclass(frozen=True)
class Variation:
    """How much the kernel of one layer varies over a data set.

    routing_weights: Mean routing weights (E,), float64.
    error: Largest distance of a sample's kernel from the mean kernel, relative to the mean kernel (Frobenius norms).
    samples: Samples seen, in all calls of the layer.
    from_caller: Whether its caller passes routing weights or keyword arguments, or calls its router.
    left: Why `collapse` skips it regardless of the error; None if it does not.
    """

    name: str
    routing_weights: Tensor
    error: float
    samples: int
    from_caller: bool = False
    left: str | None = None

    coefficients = renamed("coefficients", "routing_weights")
    handed = renamed("handed", "from_caller")


def measure_routing(model: nn.Module, data: Iterable[Tensor]) -> list[Variation]:
    """Measure how much the kernels of a network vary over batches of images, in evaluation mode.

    Args:
        model: A network with DynamicConv layers.
        data: Batches (B, C, H, W), or tuples that begin with one, as from a data loader.

    Returns:
        A `Variation` for every layer that was called.

    Raises:
        ValueError: The network has no dynamic layer, or no image reached one.
    """
    convs = dynamic_layers(model)
    batches = iter(data)
    first = next(batches, None)
    seen = observe(model, None if first is None else _images(first)[:1])
    left = _left(model, convs, seen)
    with record_routing_weights(model) as recording, torch.no_grad(), evaluating(model):
        device = next(model.parameters()).device
        for batch in chain([] if first is None else [first], batches):
            model(_images(batch).to(device))
    samples = {name: rows for name, calls in recording.calls.items() if calls and len(rows := recording.samples(name))}
    if not samples:
        raise ValueError(f"no image reached {', '.join([*convs][:5])}: data must contain at least one batch")
    without_router = {name for name, conv in convs.items() if conv.routing is None}
    from_caller = recording.from_caller | without_router | _router_called(convs, seen)
    return [_variation(name, convs[name], rows, name in from_caller, left.get(name)) for name, rows in samples.items()]


def _images(batch: Tensor | tuple[Tensor, ...] | list[Tensor]) -> Tensor:
    return batch[0] if isinstance(batch, tuple | list) else batch


def _router_called(convs: dict[str, DynamicConv | CompactConv], seen: Observation | None) -> set[str]:
    """Return layers whose router is called from outside dynamic layers."""
    calls = seen.calls if seen else {}
    asked = {name for name, made in calls.items() if any(not call.inside & convs.keys() for call in made)}
    routers = {id(convs[owner].routing) for name in asked if (owner := _owner(name)) in convs}
    return {name for name, conv in convs.items() if conv.routing is not None and id(conv.routing) in routers}


def _owner(router: str) -> str | None:
    return router.removesuffix(".routing") if router.endswith(".routing") else None


def _left(model: nn.Module, convs: dict[str, DynamicConv | CompactConv], seen: Observation | None) -> dict[str, str]:
    """Return, for each layer that cannot become static, the reason."""
    shared = set(tied(model, DynamicConv))
    elsewhere = read_elsewhere(seen)
    found = {}
    for name, conv in convs.items():
        if isinstance(conv, CompactConv):
            why: str | None = f"its experts are stored in {conv.expert_dtype}: collapse before `fuse(expert_dtype=...)`"
        elif type(conv).forward is not DynamicConv.forward:
            why = f"a {type(conv).__name__} may compute something else from its weights"
        elif name in shared:
            why = "is shared, or shares its weight"
        else:
            why = alteration(conv) or elsewhere.get(name) or elsewhere.get(f"{name}.routing")
        if why:
            found[name] = why
    return found


def collapse(
    model: nn.Module, data: Iterable[Tensor], tolerance: float = 1e-3, inplace: bool = False
) -> tuple[nn.Module, list[Variation]]:
    """Fold layers whose kernels vary by no more than `tolerance` over `data` into static convolutions.

    Args:
        model, data: As in `measure_routing`.
        tolerance: Largest `Variation.error` of a layer to fold; it is 0 for upcycled layers with neutral routers.
        inplace: Change `model` itself. Otherwise a copy is changed.

    Returns:
        The network, and the variation of every layer that was called. Layers up to `tolerance` were folded, except
        those that are `left`.
    """
    refuse_distributed(model)
    variations = measure_routing(model, data)
    if not inplace:
        model = deepcopy(model)
    for variation in variations:
        if variation.error <= tolerance and variation.left is None:
            replace_layer(model, variation.name, _static(model.get_submodule(variation.name), variation))
    return model, variations


def _variation(
    name: str, conv: DynamicConv | CompactConv, routing_weights: Tensor, from_caller: bool, left: str | None
) -> Variation:
    """Compute a `Variation` from routing weights (samples, E)."""
    mean = routing_weights.mean(0)
    experts = conv.experts() if isinstance(conv, CompactConv) else conv.weight
    kernels = experts.detach().double().cpu().reshape(conv.num_experts, -1)
    # Norms of mixtures need only the E x E inner products of the experts.
    products = kernels @ kernels.T
    apart = routing_weights - mean
    squares = torch.einsum("ne,ef,nf->n", apart, products, apart).clamp_min(0)
    length = (mean @ products @ mean).sqrt().clamp_min(torch.finfo(torch.float64).tiny)
    return Variation(name, mean, float(squares.max().sqrt() / length), len(routing_weights), from_caller, left)


@torch.no_grad()
def _static(conv: Any, variation: Variation) -> nn.Conv2d:
    """Return the static convolution that `conv` equals at its mean routing weights."""
    routing_weights = variation.routing_weights
    plain, collapsed = (Conv2dSame, CollapsedConvSame) if conv.pad_same else (nn.Conv2d, CollapsedConv)
    kind = collapsed if variation.from_caller else plain
    has_bias = conv.bias is not None or conv.output_bias is not None
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
    static.weight.copy_(_mixed(conv.weight, routing_weights))
    if static.bias is not None:
        static.bias.zero_()
        for part in (None if conv.bias is None else _mixed(conv.bias, routing_weights), conv.output_bias):
            if part is not None:
                static.bias.add_(part)
    if variation.from_caller and conv.routing is not None:
        static.routing = conv.routing  # callers may still read it
    return static.train(conv.training).requires_grad_(conv.weight.requires_grad)


def _mixed(stacked: Tensor, routing_weights: Tensor) -> Tensor:
    experts = stacked.double().unflatten(0, (len(routing_weights), -1))
    return torch.tensordot(routing_weights.to(stacked.device), experts, 1)
