"""`fuse`: batch normalisation folded into the convolutions of a whole network, for inference."""

from collections import Counter
from collections.abc import Iterator
from copy import deepcopy

import torch.fx
from timm.models import get_notrace_functions, get_notrace_modules
from torch import nn

from ..layers import DynamicConv, Router
from ..layers.folding import fold_batch_norm
from ..layers.replacing import replace_layer

__all__ = ["fuse"]


def fuse(model: nn.Module, inplace: bool = False) -> nn.Module:
    """The same function with batch normalisation folded into every expert and static convolution that it follows.

    A pair is folded where torch.fx sees the output of the one go into the other and nowhere else; a network that
    cannot be traced is searched part by part. Whatever else there is stays as it is, so that `fuse` of a fused network
    changes nothing. timm's `reparameterize_model` does the same to the blocks of this package.

    Args:
        model: Any network in evaluation mode, on any device.
        inplace: Change `model` itself. Otherwise a copy is changed.

    Returns:
        The fused network, `model` itself with `inplace`.

    Raises:
        ValueError: The network is in training mode.
    """
    training = [name or type(model).__name__ for name, module in model.named_modules() if module.training]
    if training:
        raise ValueError(
            f"only a network in evaluation mode can be fused, this one is in training mode (first: {training[0]}): "
            "call model.eval() before"
        )
    if not inplace:
        model = deepcopy(model)
    tied = _tied(model)
    for part in _traceable(model):
        for conv_name, norm_name in _pairs(*part):
            root = part[0]
            conv, norm = root.get_submodule(conv_name), root.get_submodule(norm_name)
            if not tied & {id(conv), id(norm)}:
                replace_layer(root, norm_name, fold_batch_norm(conv, norm))
    return model


def _traceable(module: nn.Module) -> Iterator[tuple[nn.Module, torch.fx.Graph]]:
    """The largest parts of a network that torch.fx can follow, with their graphs."""
    try:
        graph = _Tracer(autowrap_functions=tuple(get_notrace_functions())).trace(module)
    except Exception:  # fx runs the network's own code, which may raise anything
        for child in module.children():
            yield from _traceable(child)
    else:
        yield module, graph


class _Tracer(torch.fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        leaf = isinstance(module, DynamicConv | Router) or type(module) in get_notrace_modules()
        return leaf or not any(True for _ in module.children()) or super().is_leaf_module(module, name)


def _pairs(root: nn.Module, graph: torch.fx.Graph) -> list[tuple[str, str]]:
    """Names (convolution, what follows it) where nobody else reads the convolution and both are called once."""
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    found = []
    for node in graph.nodes:
        before = node.args[0] if node.op == "call_module" and len(node.args) == 1 and not node.kwargs else None
        if not isinstance(before, torch.fx.Node) or before.op != "call_module" or len(before.users) > 1:
            continue
        if calls[before.target] == calls[node.target] == 1:
            found.append((before.target, node.target))
    return found


def _tied(model: nn.Module) -> set[int]:
    """Modules that stand in several places or share a parameter: what one of them folds would change the others."""
    owners: dict[int, set[int]] = {}
    places: Counter[int] = Counter()
    for _, module in model.named_modules(remove_duplicate=False):
        places[id(module)] += 1
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), set()).add(id(module))
    shared = {owner for modules in owners.values() if len(modules) > 1 for owner in modules}
    return shared | {module for module, number in places.items() if number > 1}
