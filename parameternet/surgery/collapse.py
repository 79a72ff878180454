"""`collapse`: dynamic convolutions whose routing hardly varies as static ones again."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from timm.layers import Conv2dSame
from torch import Tensor, nn

from ..layers import DynamicConv
from ..layers.altered import alteration
from ..layers.replacing import replace_layer
from ..layers.static import CollapsedConv, CollapsedConvSame
from .modes import evaluating
from .observe import Observation, observe
from .survey import read_elsewhere, refuse_distributed, tied

__all__ = ["Variation", "collapse", "listening", "measure_routing"]


@dataclass(frozen=True)
class Variation:
    """How much one layer's kernels vary over a data set.

    coefficients: Mean routing weights (E,), float64. error: By how much a sample's kernel differs from the mean kernel
    at most, both as lengths (root of the sum of squares), relative to the mean kernel. samples: How many were seen, in
    all calls of the layer. handed: Its caller hands it routing weights or keyword arguments, or calls its router. left:
    Why `collapse` leaves it whatever the error; None if it does not.
    """

    name: str
    coefficients: Tensor
    error: float
    samples: int
    handed: bool = False
    left: str | None = None


def measure_routing(model: nn.Module, data: Iterable[Tensor]) -> list[Variation]:
    """Run batches of pictures through a network, in evaluation mode, and see what its routers say.

    Args:
        model: A network with DynamicConv layers.
        data: Batches (B, C, H, W), or tuples that begin with one, as data loaders give them.

    Returns:
        A `Variation` for every layer that was called.

    Raises:
        ValueError: Nothing to measure: no dynamic layer, or none that an image reached.
    """
    convs = {name: m for name, m in model.named_modules() if isinstance(m, DynamicConv)}
    if not convs:
        raise ValueError(f"this {type(model).__name__} has no dynamic convolution whose routing could be measured")
    batches = iter(data)
    first = next(batches, None)
    seen = observe(model, None if first is None else _images(first)[:1])
    left = _left(model, convs, seen)
    handed = {name for name, conv in convs.items() if conv.routing is None} | _asked(convs, seen)
    with listening(convs, handed) as heard, torch.no_grad(), evaluating(model):
        device = next(model.parameters()).device
        for batch in chain([] if first is None else [first], batches):
            model(_images(batch).to(device))
    rows = {name: all_rows for name, parts in heard.items() if parts and len(all_rows := torch.cat(parts))}
    if not rows:
        raise ValueError(f"no image reached {', '.join([*convs][:5])}: data must hold at least one batch")
    return [_variation(name, convs[name], found, name in handed, left.get(name)) for name, found in rows.items()]


def _images(batch: Tensor | tuple[Tensor, ...] | list[Tensor]) -> Tensor:
    return batch[0] if isinstance(batch, tuple | list) else batch


def _asked(convs: dict[str, DynamicConv], seen: Observation | None) -> set[str]:
    """Layers whose router others call."""
    calls = seen.calls if seen else {}
    asked = {name for name, made in calls.items() if any(not call.inside & convs.keys() for call in made)}
    routers = {id(convs[owner].routing) for name in asked if (owner := _owner(name)) in convs}
    return {name for name, conv in convs.items() if conv.routing is not None and id(conv.routing) in routers}


def _owner(router: str) -> str | None:
    return router.removesuffix(".routing") if router.endswith(".routing") else None


def _left(model: nn.Module, convs: dict[str, DynamicConv], seen: Observation | None) -> dict[str, str]:
    """Why layers cannot be static ones."""
    shared = set(tied(model, DynamicConv))
    elsewhere = read_elsewhere(seen)
    found = {}
    for name, conv in convs.items():
        if type(conv).forward is not DynamicConv.forward:
            why: str | None = f"a {type(conv).__name__} may compute something else from its weights"
        elif name in shared:
            why = "shares itself or its weight with another place"
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
        model, data: As of `measure_routing`.
        tolerance: Largest `Variation.error` of a layer that is folded; of upcycled layers with neutral routers it is 0.
        inplace: Change `model` itself. Otherwise a copy is changed.

    Returns:
        The network, and the variation of every layer that was called, folded or not; those up to `tolerance` were
        folded, but for those that are `left`.
    """
    refuse_distributed(model)
    variations = measure_routing(model, data)
    if not inplace:
        model = deepcopy(model)
    for variation in variations:
        if variation.error <= tolerance and variation.left is None:
            replace_layer(model, variation.name, _static(model.get_submodule(variation.name), variation))
    return model, variations


@contextmanager
def listening(convs: dict[str, DynamicConv], handed: set[str] | None = None) -> Iterator[dict[str, list[Tensor]]]:
    """Routing weights that reach each convolution, from its router or from its caller: (B, E) float64 a call.

    Names of layers that are called in other ways than `conv(x)` are added to `handed`.
    """
    heard: dict[str, list[Tensor]] = {name: [] for name in convs}

    def note(name: str, conv: DynamicConv, args: tuple[Tensor, ...], kwargs: dict[str, Tensor | None]) -> None:
        given = dict(zip(("x", "routing_weights"), args, strict=False)) | kwargs
        routing_weights = given.get("routing_weights")
        if handed is not None and ("routing_weights" in given or kwargs):
            handed.add(name)
        if routing_weights is None and conv.routing is not None:
            routing_weights = conv.routing(given["x"])
        if routing_weights is not None:  # without them the layer itself says what it lacks
            heard[name].append(routing_weights.detach().cpu().double())

    hooks = [
        conv.register_forward_pre_hook(
            lambda conv, args, kwargs, name=name: note(name, conv, args, kwargs), with_kwargs=True
        )
        for name, conv in convs.items()
    ]
    try:
        yield heard
    finally:
        for hook in hooks:
            hook.remove()


def _variation(name: str, conv: DynamicConv, coefficients: Tensor, handed: bool, left: str | None) -> Variation:
    """From coefficients (samples, E)."""
    mean = coefficients.mean(0)
    kernels = conv.weight.detach().double().cpu().reshape(conv.num_experts, -1)
    # Lengths of mixtures need the experts' products with each other alone: E x E numbers.
    products = kernels @ kernels.T
    apart = coefficients - mean
    squares = torch.einsum("ne,ef,nf->n", apart, products, apart).clamp_min(0)
    length = (mean @ products @ mean).sqrt().clamp_min(torch.finfo(torch.float64).tiny)
    return Variation(name, mean, float(squares.max().sqrt() / length), len(coefficients), handed, left)


@torch.no_grad()
def _static(conv: Any, variation: Variation) -> nn.Conv2d:
    """The convolution that `conv` is for its mean routing weights."""
    coefficients = variation.coefficients
    plain, collapsed = (Conv2dSame, CollapsedConvSame) if conv.pad_same else (nn.Conv2d, CollapsedConv)
    kind = collapsed if variation.handed else plain
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
    if static.bias is not None:
        static.bias.zero_()
        for part in (None if conv.bias is None else _mixed(conv.bias, coefficients), conv.shift):
            if part is not None:
                static.bias.add_(part)
    if variation.handed and conv.routing is not None:
        static.routing = conv.routing  # callers may still ask it
    return static.train(conv.training).requires_grad_(conv.weight.requires_grad)


def _mixed(stacked: Tensor, coefficients: Tensor) -> Tensor:
    experts = stacked.double().unflatten(0, (len(coefficients), -1))
    return torch.tensordot(coefficients.to(stacked.device), experts, 1)
