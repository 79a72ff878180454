"""Inspect the convolutions of a network: stem, heads, shared inputs, and which ones cannot be replaced."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .observe import Call, Observation, merged_weights, observe

__all__ = ["Inspection", "inspect_convs", "read_elsewhere", "refuse_distributed", "tied"]

# Parts of layer names that indicate a head, in timm's networks and elsewhere.
HEADS = {"head", "conv_head", "classifier", "fc", "pre_logits", "aux", "head_dist"}


@dataclass(frozen=True)
class Inspection:
    """Names of convolutions by their role.

    stem: The first one. heads: Those with the name of a head. pooled: Those whose input is 1 x 1. tied: Those used in
    several places, or that share a weight. reads: For each one, the first convolution that reads the same tensor. odd:
    Those that cannot be replaced, because they are not only called as `conv(x)`, with the reason.
    """

    stem: str | None
    heads: frozenset[str]
    pooled: frozenset[str]
    tied: frozenset[str]
    reads: dict[str, str]
    odd: dict[str, str]


def inspect_convs(model: nn.Module, probe: Tensor | tuple[Any, ...] | None = None) -> Inspection:
    """Inspect a network and the inputs of its convolutions in an observed forward pass.

    Args:
        model: Any network; it is not changed.
        probe: An input of the network.

    Without a probe, a network with data-dependent control flow is classified by layer names, plus observations from one
    path. All convolutions of a network that cannot be run are `odd`.
    """
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    cfg = getattr(model, "pretrained_cfg", None) or {}
    seen = observe(model, probe)
    trained = observe(model, probe, training=True, numbers=False)
    some_way = seen is not None and seen.decides and probe is None
    calls = {} if seen is None or some_way else {n: seen.calls[n] for n in seen.calls if n in set(names)}
    stem = _stem(cfg, names, calls)
    classifier = cfg.get("classifier") or ()
    classifiers = {classifier} if isinstance(classifier, str) else set(classifier)
    heads = [n for n in names if HEADS & set(n.split(".")) or any(f"{n}.".startswith(f"{c}.") for c in classifiers)]
    pooled = [name for name, made in calls.items() if made and all(c.shape[-2:] == (1, 1) for c in made)]
    first: dict[Any, str] = {}
    reads = {name: first.setdefault(made[0].read, name) for name, made in calls.items() if len(made) == 1}
    odd = {name: why for name, made in calls.items() if (why := _odd(made))}
    odd |= read_elsewhere(seen) | read_elsewhere(trained)
    if callable(getattr(type(model), "fuse", None)):  # it calls the fuse of its blocks
        odd |= dict.fromkeys(merged_weights(model, ("fuse", "fuse_convs")), "the fuse of its block merges its weight")
    if seen is None:
        odd = dict.fromkeys(names, "no forward pass could be observed: give a probe, an input of the network")
    return Inspection(stem, frozenset(heads), frozenset(pooled), frozenset(tied(model)), reads, odd)


def refuse_distributed(model: nn.Module) -> None:
    """Raise ValueError if new parameters would not be synchronised."""
    for name, module in model.named_modules():
        if isinstance(module, nn.parallel.DistributedDataParallel):
            raise ValueError(
                f"{name or 'the network'} is wrapped in DistributedDataParallel, which synchronises only "
                "the parameters that it was built with: convert its `.module`, and wrap the result"
            )


def read_elsewhere(seen: Observation | None) -> dict[str, str]:
    """Return layers whose tensors or their shapes were read outside of their own calls, with the reason."""
    found: dict[str, set[str]] = {}
    for run in (seen.used, seen.shaped) if seen else ():
        for name, parts in run.items():
            found.setdefault(name, set()).update(parts)
    return {name: f"its {' and '.join(sorted(parts))} is read elsewhere" for name, parts in found.items()}


def _odd(calls: list[Call]) -> str | None:
    """Return why a DynamicConv cannot handle the calls of a layer."""
    if any(call.keywords for call in calls):
        return "is called with keyword arguments"
    if any(len(call.shape) != 4 for call in calls):
        return "reads tensors without a batch dimension"
    return None


def _stem(cfg: dict[str, Any], names: list[str], calls: dict[str, list[Call]]) -> str | None:
    named = cfg.get("first_conv")
    if isinstance(named, str) and named in names:
        return named
    return next(iter(calls), next(iter(names), None))


def tied(model: nn.Module, kind: type[nn.Module] = nn.Conv2d) -> Iterator[str]:
    """Return layers that are used in several places, or that share a tensor with another module."""
    places: Counter[int] = Counter(id(m) for _, m in model.named_modules(remove_duplicate=False))
    places.update(id(m) for owner in model.modules() for m in _modules_in(vars(owner).values(), owner))
    owners: Counter[int] = Counter(id(t) for m in model.modules() for t in _own(m))
    for name, module in model.named_modules():
        if isinstance(module, kind) and (places[id(module)] > 1 or any(owners[id(t)] > 1 for t in _own(module))):
            yield name


def _own(module: nn.Module) -> list[Tensor]:
    """Return a module's parameters, buffers, and tensors in plain attributes."""
    values = (*module._parameters.values(), *module._buffers.values(), *vars(module).values())
    return [value for value in values if isinstance(value, Tensor)]


def _modules_in(values: Iterable[Any], owner: nn.Module) -> Iterator[nn.Module]:
    """Return modules in plain attributes and lists of `owner`, which a replacement would miss."""
    for value in values:
        if isinstance(value, nn.Module):
            yield value
        elif isinstance(value, list | tuple | set):
            yield from _modules_in(value, owner)
        elif isinstance(value, dict) and value is not owner._modules:
            yield from _modules_in(value.values(), owner)
