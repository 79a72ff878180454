"""`fuse`: fold batch normalisation into the convolutions of a whole network, for inference."""

from collections import Counter
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch.fx
from timm.models import get_notrace_functions, get_notrace_modules
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..layers import DynamicConv, Router
from ..layers.altered import alteration
from ..layers.compact import EXPERT_DTYPES, SHORTEST_ROW, CompactConv
from ..layers.folding import fold_batch_norm, why_not
from ..layers.replacing import replace_layer
from .inspection import refuse_distributed, tied
from .observe import Observation, meta_copy, observe

__all__ = ["Folding", "Fusing", "fuse"]

# Limits on paths through a network, and on branches per path, before it is traced part by part.
PATHS = 16
DECISIONS = 8
READ_ONLY = frozenset({"dtype", "device", "requires_grad", "is_cuda", "layout", "ndim", "shape", "is_leaf", "is_meta"})
READ_ONLY_METHODS = frozenset({"size", "dim", "numel", "is_floating_point"})


@dataclass(frozen=True)
class Folding:
    """A batch norm of a network and whether it was folded.

    conv: The convolution before it, if there is one. left: Why it was not folded; None: it was folded into `conv`.
    """

    norm: str
    conv: str | None
    left: str | None


@dataclass(frozen=True)
class Fusing:
    """The result of `fuse`, as `model.fusing`."""

    layers: tuple[Folding, ...]

    @property
    def folded(self) -> tuple[Folding, ...]:
        """Return the batch norms that were folded."""
        return tuple(layer for layer in self.layers if layer.left is None)

    @property
    def left(self) -> tuple[Folding, ...]:
        """Return the batch norms that were not folded, with their reasons."""
        return tuple(layer for layer in self.layers if layer.left is not None)


def fuse(
    model: nn.Module,
    inplace: bool = False,
    probe: Tensor | tuple[Any, ...] | None = None,
    expert_dtype: str | None = None,
) -> nn.Module:
    """Fold batch normalisation into the preceding dynamic and static convolutions; the outputs stay the same.

    A pair is folded if torch.fx shows that the convolution's output is used only by the norm, and nothing else reads
    their tensors. A network that cannot be traced is traced part by part; then a forward pass of a copy must show that
    each pair runs only inside its part. Uncertain pairs are skipped, with the reason in `model.fusing`. Calling `fuse`
    again changes nothing. timm's `reparameterize_model` does the same for the blocks of this package.

    Args:
        model: Any network in evaluation mode, on any device.
        inplace: Change `model` itself. Otherwise a copy is changed.
        probe: An input of the network, or a tuple of its arguments. Default: an image of the size in
            `model.pretrained_cfg`, or of 224 pixels. A network with data-dependent control flow needs a probe, and is
            observed on the path that the probe takes.
        expert_dtype: Store experts as 'float16', 'bfloat16' or 'int8', with a `CompactConv` in place of each
            `DynamicConv`. This takes less memory, but no less time (docs/benchmarks.md), and changes the outputs
            slightly. It is for inference only: such layers have no gradients and cannot be exported. Depthwise kernels,
            which are small, are not converted.

    Returns:
        The fused network, `model` itself with `inplace`. Its attribute `fusing`, a `Fusing`, lists every batch norm.

    Raises:
        ValueError: The network is in training mode, or wrapped in DistributedDataParallel; an unknown expert_dtype, or
            experts that do not fit it.
    """
    if expert_dtype is not None and expert_dtype not in EXPERT_DTYPES:
        raise ValueError(f"expert_dtype must be None or one of {', '.join(EXPERT_DTYPES)}, got {expert_dtype!r}")
    training = [name or type(model).__name__ for name, module in model.named_modules() if module.training]
    if training:
        raise ValueError(
            f"only a network in evaluation mode can be fused, this one is in training mode (first: {training[0]}): "
            "call model.eval() before"
        )
    refuse_distributed(model)
    if not inplace:
        model = deepcopy(model)
    norms = {name for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
    seen = observe(model, probe) if norms else None
    layers = tuple(_candidates(model, norms, seen, probe is not None))
    for layer in layers:
        if layer.left is None and layer.conv is not None:
            conv, norm = model.get_submodule(layer.conv), model.get_submodule(layer.norm)
            replace_layer(model, layer.norm, fold_batch_norm(conv, norm))
    if expert_dtype is not None:
        model = _compact(model, expert_dtype)
    fused: Any = model
    fused.fusing = Fusing(layers)
    return model


def _compact(model: nn.Module, expert_dtype: str) -> nn.Module:
    """Replace every DynamicConv with large kernels; freeze what remains, since no gradient passes these layers."""
    convs = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, DynamicConv) and module.weight[0].numel() >= SHORTEST_ROW
    }
    for name, conv in convs.items():
        altered = alteration(conv) or (None if type(conv).forward is DynamicConv.forward else "another forward")
        if altered:
            raise ValueError(f"expert_dtype={expert_dtype!r} is not possible for {name or 'this layer'}: {altered}")
    new = {name: CompactConv(conv, expert_dtype) for name, conv in convs.items()}
    for name, compact in new.items():
        if not name:
            return compact.requires_grad_(False)
        replace_layer(model, name, compact)
    return model.requires_grad_(False)


def _candidates(model: nn.Module, norms: set[str], seen: Observation | None, probed: bool) -> Iterator[Folding]:
    """Return every batch norm, with its convolution and why it cannot be folded."""
    # With data-dependent control flow, one path can rule out folding, but cannot justify it.
    typical = seen is not None and (probed or not seen.decides)
    shared = set(tied(model, nn.Module))
    found = set()
    for prefix, graphs in _traceable("", _expendable(model)):
        part = prefix.removesuffix(".")
        # A hook of the network itself is not in its graph.
        whole = not part and not (model._forward_hooks or model._forward_pre_hooks)
        for norm in sorted(name for name in norms if name.startswith(prefix)):
            conv, left = _before(graphs, norm.removeprefix(prefix))
            conv = None if conv is None else prefix + conv
            found.add(norm)
            if conv is not None and left is None:
                left = why_not(model.get_submodule(conv), model.get_submodule(norm))
                if left is None and shared & {conv, norm}:
                    left = "shares itself or a tensor with another place"
                left = left or _contradicted(seen, part, conv, norm, whole, typical)
            yield Folding(norm, conv, left)
    for norm in sorted(norms - found):
        yield Folding(norm, None, "is part of a module that torch.fx cannot trace")


def _expendable(model: nn.Module) -> nn.Module:
    """Return a copy to trace: a network that stores tensors in attributes would keep torch.fx's proxies."""
    try:
        return meta_copy(model)
    except Exception:  # it copies the network's own attributes, which may raise anything
        return model


def _contradicted(seen: Observation | None, part: str, conv: str, norm: str, whole: bool, typical: bool) -> str | None:
    """Return why a forward pass rules out folding a pair that the graph of a part allows; None if it does not.

    `whole`: The part is the whole network, so its graph suffices if no forward pass is `typical`.
    """
    if not typical and not whole:
        return "no forward pass could be observed: give fuse a probe, an input of the network"
    if seen is None:
        return None
    for name, parts in ((conv, seen.used.get(conv, set()) | seen.absent.get(conv, set())), (norm, seen.read.get(norm))):
        if parts:
            return f"the {' and '.join(sorted(parts))} of {name} is read elsewhere"
    convs, norms = seen.calls.get(conv, []), seen.calls.get(norm, [])
    if not typical and not convs and not norms:
        return None
    if not convs or not norms:
        return "did not run in the forward pass that was observed: give fuse a probe, an input that reaches it"
    if any(part not in call.inside for call in (*convs, *norms)):
        return f"runs outside of {part or 'the network'}, too"
    if len(convs) != len(norms) or any(c.given != n.read or c.given is None for c, n in zip(convs, norms, strict=True)):
        return "does not read the convolution's output"
    inner = [name for name in seen.calls if name.startswith(f"{norm}.")]
    if any(norm not in call.inside for name in inner for call in seen.calls[name]):
        return f"{inner[0]} is called elsewhere"
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Graphs
# ---------------------------------------------------------------------------------------------------------------------


def _traceable(prefix: str, module: nn.Module) -> Iterator[tuple[str, list[torch.fx.Graph]]]:
    """Return the largest parts of a network that torch.fx can trace: name prefixes and graphs."""
    # torch.fx traces the `forward` of the root's class.
    graphs = None if "forward" in vars(module) else _graphs(module)
    if graphs is not None:
        yield prefix, graphs
        return
    for name, child in module.named_children():
        yield from _traceable(f"{prefix}{name}.", child)


def _graphs(module: nn.Module) -> list[torch.fx.Graph] | None:
    """Return the graph of every path through a module, for all branches; None if it cannot be traced."""
    graphs: list[torch.fx.Graph] = []
    ways: list[tuple[bool, ...]] = [()]
    while ways:
        if len(graphs) + len(ways) > PATHS:
            return None
        begun = ways.pop()
        tracer = _Tracer(begun)
        try:
            graphs.append(tracer.trace(module))
        except AssertionError:
            pass  # the network itself raises on this path
        except Exception:  # fx runs the network's own code, which may raise any error
            return None
        taken = tracer.taken
        ways += [(*taken[:i], not taken[i]) for i in range(len(begun), len(taken))]
    return graphs or None


class _Tracer(torch.fx.Tracer):
    """Trace one path through a network: `begun` has its first branch decisions; all later ones are True."""

    proxy_buffer_attributes = True

    def __init__(self, begun: tuple[bool, ...] = ()) -> None:
        super().__init__(autowrap_functions=tuple(get_notrace_functions()))
        self.begun = begun
        self.taken: list[bool] = []

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        leaf = isinstance(module, DynamicConv | Router) or type(module) in get_notrace_modules()
        return leaf or not any(True for _ in module.children()) or super().is_leaf_module(module, name)

    def to_bool(self, obj: torch.fx.Proxy) -> bool:
        if len(self.taken) == DECISIONS:
            return super().to_bool(obj)  # raises
        self.taken.append(self.begun[len(self.taken)] if len(self.taken) < len(self.begun) else True)
        return self.taken[-1]


def _before(graphs: list[torch.fx.Graph], norm: str) -> tuple[str | None, str | None]:
    """Return the convolution whose output is used only by `norm` on every path, or why there is none."""
    convs: set[str] = set()
    for graph in graphs:
        for node in graph.nodes:
            if node.op == "call_module" and node.target == norm:
                before = node.args[0] if len(node.args) == 1 and not node.kwargs else None
                if not isinstance(before, torch.fx.Node) or before.op != "call_module":
                    return None, "does not follow a convolution"
                convs.add(str(before.target))
                if len(before.users) > 1:
                    return str(before.target), "the output of the convolution is used elsewhere"
    if len(convs) != 1:
        return None, "follows several convolutions" if convs else "is not called as a layer"
    (conv,) = convs
    for graph in graphs:
        calls = Counter(str(node.target) for node in graph.nodes if node.op == "call_module")
        if (calls[conv], calls[norm]) not in ((1, 1), (0, 0)):
            return conv, "the convolution or the norm is called several times or without the other"
        inner = [target for target in calls if target.startswith(f"{norm}.")]
        if inner:
            return conv, f"{inner[0]} is called elsewhere"
        for node in graph.nodes:
            owner, _, part = str(node.target).rpartition(".") if node.op == "get_attr" else ("", "", "")
            if owner == norm or (owner == conv and _uses_values(node)):  # folding removes the norm's tensors
                return conv, f"the {part} of {owner} is read elsewhere"
    return conv, None


def _uses_values(tensor: torch.fx.Node) -> bool:
    """Return whether a graph reads more of a tensor than its dtype, device and shape."""

    def harmless(user: torch.fx.Node) -> bool:
        if user.op == "call_function" and user.target is getattr:
            return user.args[1] in READ_ONLY
        return user.op == "call_method" and user.target in READ_ONLY_METHODS

    return not all(harmless(user) for user in tensor.users)
