"""Measure top-1 with parts of the routing weights replaced by their mean over the data set."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from parameternet.layers.recording import Recording, dynamic_layers, record_routing_weights, replace_routing_weights
from parameternet.models import loading
from parameternet.training import validate

__all__ = ["Ablated", "ablate"]

Replace = Callable[[Tensor], Tensor]


class Ablated(NamedTuple):
    """Top-1 in percent, and the difference in points from the network's own routing weights."""

    routing: str
    top1: float
    difference: float


def ablate(
    model: str | Path, data: str | Path | dict[str, Any], without_experts: bool = True, **measuring: Any
) -> list[Ablated]:
    """Measure top-1 with the routing weights of every layer replaced, in one process.

    The shares of an image are its routing weights divided by their sum. The sum scales the whole kernel, which a single
    expert could do too; only the shares choose among experts. Rows of the result:

    - own: nothing is replaced.
    - mean weights: every image gets the mean routing weights of the data set.
    - mean shares: every image keeps its own sum. The drop shows the value of choosing experts.
    - mean sum: every image keeps its own shares. The drop shows the value of scaling the kernel per image.
    - without expert N: its weight is 0, and the others are scaled to the same sum.

    Args:
        model, data, measuring: As in `training.validate`.
        without_experts: Also measure the rows `without expert N`.

    Raises:
        ValueError: No dynamic layer.
        CheckpointError, WeightsError, DataError, DivergedError: As `training.validate`.
    """
    loaded = loading.load(model, dense=True).model
    experts = max(conv.num_experts for conv in dynamic_layers(loaded).values())
    recordings: list[Recording] = []
    own = validate(model, data, around=partial(_keep, recordings), **measuring)["top1"]
    weights = {name: recordings[0].samples(name) for name, calls in recordings[0].calls.items() if calls}
    rows = [Ablated("own", own, 0.0)]
    for name, replacements in _replacements(weights, experts if without_experts else 1).items():
        top1 = validate(model, data, around=partial(_replaced, replacements), **measuring)["top1"]
        rows.append(Ablated(name, top1, top1 - own))
    return rows


@contextmanager
def _keep(recordings: list[Recording], network: nn.Module) -> Iterator[None]:
    with record_routing_weights(network) as recording:
        recordings.append(recording)
        yield


def _replaced(replacements: dict[str, Replace], network: nn.Module) -> Any:
    return replace_routing_weights(network, lambda name, routing_weights: replacements[name](routing_weights))


def _replacements(weights: dict[str, Tensor], experts: int) -> dict[str, dict[str, Replace]]:
    """Return row -> layer -> function of routing weights (B, E)."""
    mean = {name: rows.mean(0) for name, rows in weights.items()}
    shares = {name: _shares(rows).mean(0) for name, rows in weights.items()}
    rows = {
        "mean weights": {name: partial(_constant, mean[name]) for name in weights},
        "mean shares": {name: partial(_with_shares, shares[name]) for name in weights},
        "mean sum": {name: partial(_with_sum, mean[name].sum()) for name in weights},
    }
    if experts > 1:
        for expert in range(experts):
            rows[f"without expert {expert + 1}"] = dict.fromkeys(weights, partial(_without, expert))
    return rows


def _shares(routing_weights: Tensor) -> Tensor:
    total = routing_weights.sum(1, keepdim=True)
    return torch.where(total > 0, routing_weights / total, 1 / routing_weights.shape[1])


def _constant(mean: Tensor, routing_weights: Tensor) -> Tensor:
    return mean.to(routing_weights).expand_as(routing_weights)


def _with_shares(shares: Tensor, routing_weights: Tensor) -> Tensor:
    return shares.to(routing_weights) * routing_weights.sum(1, keepdim=True)


def _with_sum(total: Tensor, routing_weights: Tensor) -> Tensor:
    return _shares(routing_weights) * total.to(routing_weights)


def _without(expert: int, routing_weights: Tensor) -> Tensor:
    if not 0 <= expert < routing_weights.shape[1] or routing_weights.shape[1] == 1:
        return routing_weights  # a layer with fewer experts
    kept = routing_weights.clone()
    kept[:, expert] = 0
    return _shares(kept) * routing_weights.sum(1, keepdim=True)
