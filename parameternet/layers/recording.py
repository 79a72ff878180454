"""Record the routing weights that reach each dynamic convolution during forward passes."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .dynamic_conv import DynamicConv

__all__ = ["Recording", "dynamic_layers", "record_routing_weights"]


@dataclass
class Recording:
    """Routing weights by layer name.

    calls: (B, E) float64 on the CPU for every call of a layer, in order.
    from_caller: Names of layers whose caller passed routing weights, or anything by keyword.
    """

    calls: dict[str, list[Tensor]] = field(default_factory=dict)
    from_caller: set[str] = field(default_factory=set)

    def samples(self, name: str) -> Tensor:
        """All samples of a layer, (N, E). A layer used in several places has the samples of each."""
        return torch.cat(self.calls[name])


def dynamic_layers(model: nn.Module) -> dict[str, DynamicConv]:
    """Return the dynamic convolutions of a network by name.

    Raises:
        ValueError: There are none.
    """
    convs = {name: module for name, module in model.named_modules() if isinstance(module, DynamicConv)}
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
    convs = dynamic_layers(model)
    recording = Recording({name: [] for name in convs})

    def note(name: str, conv: DynamicConv, args: tuple[Tensor, ...], kwargs: dict[str, Tensor | None]) -> None:
        given = dict(zip(("x", "routing_weights"), args, strict=False)) | kwargs
        routing_weights = given.get("routing_weights")
        if "routing_weights" in given or kwargs:
            recording.from_caller.add(name)
        if routing_weights is None and conv.routing is not None:
            routing_weights = conv.routing(given["x"])
        if routing_weights is not None:  # without any, the layer itself raises
            recording.calls[name].append(routing_weights.detach().cpu().double())

    hooks = [
        conv.register_forward_pre_hook(
            lambda conv, args, kwargs, name=name: note(name, conv, args, kwargs), with_kwargs=True
        )
        for name, conv in convs.items()
    ]
    try:
        yield recording
    finally:
        for hook in hooks:
            hook.remove()
