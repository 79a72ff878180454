"""Record the routing weights that reach each dynamic convolution during forward passes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .compact import CompactConv
from .dynamic_conv import DynamicConv

__all__ = ["Recording", "dynamic_layers", "record_routing_weights", "replace_routing_weights"]


@dataclass
class Recording:
    """Routing weights by layer name.

    calls: (B, E) float64 on the CPU for every call of a layer, in order.
    from_caller: Names of layers whose caller passed routing weights, or any keyword argument.
    """

    calls: dict[str, list[Tensor]] = field(default_factory=dict)
    from_caller: set[str] = field(default_factory=set)

    def samples(self, name: str) -> Tensor:
        """Return all samples of a layer, (N, E); a layer used in several places has those of each."""
        return torch.cat(self.calls[name])


def dynamic_layers(model: nn.Module) -> dict[str, DynamicConv | CompactConv]:
    """Return the dynamic convolutions of a network by name, those with experts in 8 or 16 bits as well.

    Raises:
        ValueError: There are none.
    """
    convs = {name: module for name, module in model.named_modules() if isinstance(module, DynamicConv | CompactConv)}
    if not convs:
        raise ValueError(
            f"expected a network with dynamic convolutions, but this {type(model).__name__} has none: choose one of "
            "`parameternet list`, or make one with `parameternet upcycle`"
        )
    return convs


@contextmanager
def record_routing_weights(model: nn.Module) -> Iterator[Recording]:
    """Record the routing weights of every dynamic convolution while the block runs.

    >>> with record_routing_weights(model) as recording:  # doctest: +SKIP
    ...     model(images)
    >>> recording.samples("blocks.0.0.ghost1.primary_conv.0").shape  # doctest: +SKIP
    torch.Size([8, 4])

    Raises:
        ValueError: There are no dynamic convolutions.
    """
    recording = Recording({name: [] for name in dynamic_layers(model)})

    def note(name: str, conv: DynamicConv | CompactConv, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x, routing_weights = _given(*args, **kwargs)
        if len(args) > 1 or kwargs:
            recording.from_caller.add(name)
        if routing_weights is None and conv.routing is not None:
            routing_weights = conv.routing(x)
        if routing_weights is not None:  # without router and routing weights, the layer itself raises
            recording.calls[name].append(routing_weights.detach().cpu().double())

    with _before_each_call(model, note):
        yield recording


@contextmanager
def replace_routing_weights(model: nn.Module, replace: Callable[[str, Tensor], Tensor]) -> Iterator[None]:
    """Replace the routing weights of every dynamic convolution by `replace(name, routing_weights)` inside the block.

    >>> with replace_routing_weights(model, lambda name, weights: means[name].expand_as(weights)):  # doctest: +SKIP
    ...     model(images)

    Raises:
        ValueError: There are no dynamic convolutions.
    """

    def change(name: str, conv: DynamicConv | CompactConv, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x, routing_weights = _given(*args, **kwargs)
        if routing_weights is None and conv.routing is not None:
            routing_weights = conv.routing(x)
        return None if routing_weights is None else ((x, replace(name, routing_weights)), {})

    with _before_each_call(model, change):
        yield


def _given(x: Tensor, routing_weights: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    return x, routing_weights


@contextmanager
def _before_each_call(model: nn.Module, hook: Callable[..., Any]) -> Iterator[None]:
    hooks = [
        conv.register_forward_pre_hook(partial(hook, name), with_kwargs=True)
        for name, conv in dynamic_layers(model).items()
    ]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()
