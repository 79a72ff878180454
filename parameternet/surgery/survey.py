"""What stands where in a network: its stem, its heads, and who reads the same tensor as whom."""

from collections import Counter
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Survey", "meta_copy", "survey"]

# Parts of layer names that mean a head, in timm's networks and elsewhere.
HEADS = {"head", "conv_head", "classifier", "fc", "pre_logits", "aux", "head_dist"}


@dataclass(frozen=True)
class Survey:
    """Names of convolutions.

    stem: The one that reads the picture first. heads: What is a head by its name. pooled: Those whose input has one
    position. tied: Those that stand in several places or share a weight. reads: Of several that read the same tensor,
    the first one's name for each.
    """

    stem: str | None
    heads: frozenset[str]
    pooled: frozenset[str]
    tied: frozenset[str]
    reads: dict[str, str]


def survey(model: nn.Module, probe: Tensor | None = None) -> Survey:
    """Look at a network, and at what its convolutions read when it is run without arithmetic.

    Args:
        model: Any network; it is left as it was.
        probe: An input of the network; only its shape and dtype are used.

    A network that cannot be run without arithmetic is judged by its names alone.
    """
    with torch.inference_mode(False):  # whose tensors do not tell how often they were written to
        return _survey(model, probe)


def _survey(model: nn.Module, probe: Tensor | None) -> Survey:
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    cfg = getattr(model, "pretrained_cfg", None) or {}
    calls = _calls(model, probe if probe is not None else _picture(model, cfg))
    stem = _stem(cfg, names, calls)
    classifier = cfg.get("classifier") or ()
    classifiers = {classifier} if isinstance(classifier, str) else set(classifier)
    heads = [n for n in names if HEADS & set(n.split(".")) or any(f"{n}.".startswith(f"{c}.") for c in classifiers)]
    pooled = [name for name, seen in calls.items() if seen and all(call.positions == 1 for call in seen)]
    first: dict[Any, str] = {}
    reads = {name: first.setdefault(seen[0].tensor, name) for name, seen in calls.items() if len(seen) == 1}
    return Survey(stem, frozenset(heads), frozenset(pooled), frozenset(_tied(model)), reads)


@dataclass(frozen=True)
class _Call:
    tensor: tuple[int, int]  # which tensor, and how often it had been written to
    positions: int


def _calls(model: nn.Module, probe: Tensor) -> dict[str, list[_Call]]:
    """What each convolution read, in the order of the first calls; nothing if the network cannot be run so."""
    calls: dict[str, list[_Call]] = {}
    kept = []  # a tensor that lives on keeps its id to itself

    def note(name: str, x: Tensor) -> None:
        kept.append(x)
        calls.setdefault(name, []).append(_Call((id(x), x._version), x.shape[-2] * x.shape[-1]))

    try:
        double = meta_copy(model)
        for name, module in double.named_modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_pre_hook(lambda _, inputs, name=name: note(name, inputs[0]))
        with torch.no_grad():
            double(probe.to("meta"))
    except Exception:  # it copies and runs the network's own code, which may raise anything
        return {}
    return calls


def meta_copy(model: nn.Module) -> nn.Module:
    """A copy on the meta device in evaluation mode: its tensors, in attributes too, have shapes and no numbers."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                memo[id(parameter)] = nn.Parameter(parameter.to("meta"), requires_grad=False)
        for value in (*module._buffers.values(), *vars(module).values()):
            if isinstance(value, Tensor):
                memo[id(value)] = value.to("meta")
    return deepcopy(model, memo).eval()


def _picture(model: nn.Module, cfg: dict[str, Any]) -> Tensor:
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    channels = first.in_channels if first is not None else 3
    dtype = first.weight.dtype if first is not None else torch.float32
    return torch.empty(1, channels, *(cfg.get("input_size") or (3, 224, 224))[1:], device="meta", dtype=dtype)


def _stem(cfg: dict[str, Any], names: list[str], calls: dict[str, list[_Call]]) -> str | None:
    named = cfg.get("first_conv")
    if isinstance(named, str) and named in names:
        return named
    return next(iter(calls), next(iter(names), None))


def _tied(model: nn.Module) -> Iterator[str]:
    """Convolutions that stand in several places, or whose weight another module has, too."""
    places: Counter[int] = Counter(id(m) for _, m in model.named_modules(remove_duplicate=False))
    owners: Counter[int] = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and (places[id(module)] > 1 or owners[id(module.weight)] > 1):
            yield name
