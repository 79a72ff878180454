"""Count the multiply-accumulates of a network: convolutions, mixing of kernels and routing separately."""

import importlib.abc
import importlib.util
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from typing import Any

import torch
from timm.layers import CondConv2d, Conv2dSame, Linear
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .layers import DynamicConv, Router
from .layers.compact import CompactConv
from .layers.static import DepthwiseConv, PooledConv

__all__ = ["Flops", "count_flops", "register_thop"]


@dataclass(frozen=True)
class Flops:
    """Multiply-accumulates of one call, without biases; a multiplication with an addition counts once.

    convolution: Every convolution; of a dynamic one, the convolution of each sample by its own kernel.
    mixing: The experts' kernels (and biases) times the routing weights: one per parameter and sample.
    routing: The linear layers of routers.
    linear: All other linear layers and products of two matrices.
    matmul: Batched matrix products, attention, and everything else that torch has a formula for.
    not_counted: Operations without a formula, with their number of calls, most calls first.
    """

    convolution: int = 0
    mixing: int = 0
    routing: int = 0
    linear: int = 0
    matmul: int = 0
    not_counted: tuple[tuple[str, int], ...] = ()

    @property
    def total(self) -> int:
        return self.convolution + self.mixing + self.routing + self.linear + self.matmul

    def as_dict(self) -> dict[str, int]:
        """Return the counts by name; the last one, `total`, is the sum of the others."""
        counts = {name: value for name, value in asdict(self).items() if name != "not_counted"}
        return {**counts, "total": self.total}


def count_flops(model: nn.Module, input_size: Sequence[int] = (3, 224, 224), batch_size: int = 1) -> Flops:
    """Count the multiply-accumulates of `model` in evaluation mode by running it on the meta device.

    The formulas are torch's own (torch.utils.flop_counter), so everything that torch can count is counted, functional
    calls included; `2 * total` equals the result of `FlopCounterMode`. Operations without a formula (normalisation,
    activations, pooling, sums) are listed in `not_counted`.

    DynamicConv and timm's CondConv2d are counted by definition, whatever the strategy: each sample's kernel is mixed
    and then applied, so a batch of 8 mixes 8 times. The strategies 'grouped' and 'batched_matmul' do exactly that, so
    `FlopCounterMode` agrees; 'wide', 'gated_inputs' and 'gated_outputs' convolve with every expert instead, and
    'shifted' multiplies elementwise, which `FlopCounterMode` does not count.

    Among other counters, ptflops with `backend="aten"` and thop agree exactly, and fvcore, which counts a trace, agrees
    to within a few percent (tests/clients/test_counters.py). torchinfo, calflops and ptflops with its default backend
    count by layer type or by function, and miss most of a dynamic convolution.

    Args:
        model: Any network that takes one batch of tensors; it is not changed. Its hooks run.
        input_size: Shape of one sample, usually (channels, height, width).
        batch_size: Samples in the call; counts are for the whole batch.

    Raises:
        ValueError: The network does not run on an input of that shape.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    floats = (p.dtype for p in model.parameters() if p.is_floating_point())
    shape, dtype = (batch_size, *input_size), next(floats, torch.get_default_dtype())
    own_device = next((p.device for p in model.parameters()), torch.device("cpu"))
    # The meta device first; a network that reads values or creates tensors on a fixed device cannot run there.
    for device in dict.fromkeys((torch.device("meta"), own_device)):
        try:
            return _count(_copy(model, device), torch.zeros(shape, dtype=dtype, device=device))
        except Exception as error:
            last = error
    raise ValueError(
        f"{type(model).__name__} did not accept an input of shape {shape} ({type(last).__name__}: {last}): set "
        "input_size to the shape of one sample that it accepts"
    ) from last


def _copy(model: nn.Module, device: torch.device) -> nn.Module:
    """Return a copy in evaluation mode: without memory on the meta device, elsewhere sharing the parameters."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        moved = parameter
        if parameter.device != device:
            moved = nn.Parameter(parameter.detach().to(device), parameter.requires_grad)
        memo[id(parameter)] = moved
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.detach().to(device, copy=True)
    return deepcopy(model, memo).eval()


@torch.no_grad()
def _count(model: nn.Module, x: Tensor) -> Flops:
    counter = _Counter()
    routers = {id(getattr(module, "routing_fn", None)) for module in model.modules()}  # timm's blocks call them
    for module in model.modules():
        if isinstance(module, DynamicConv | CompactConv | CondConv2d):
            _enter(module, counter.scopes, None)
            module.register_forward_hook(counter.mixed_convolution)
        elif isinstance(module, Router) or id(module) in routers:
            _enter(module, counter.scopes, "routing")
        elif isinstance(module, nn.Linear):
            _enter(module, counter.scopes, "linear")
    with counter:
        model(x)
    return Flops(**counter.counts, not_counted=tuple(counter.not_counted.most_common()))


def _enter(module: nn.Module, scopes: list[str | None], name: str | None) -> None:
    """Make `name` the innermost scope while `module` runs."""

    def leave(*_: object) -> None:
        scopes.pop()

    module.register_forward_pre_hook(lambda *_: scopes.append(name))
    module.register_forward_hook(leave)


class _Counter(TorchDispatchMode):
    """Sum torch's formulas over the operations that run under it."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        from torch.utils.flop_counter import flop_registry

        super().__init__()
        self.formulas = flop_registry
        self.counts: Counter[str] = Counter()
        self.not_counted: Counter[str] = Counter()
        # Scopes of the enclosing modules, the innermost last. None: that module is counted as a whole.
        self.scopes: list[str | None] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        packet = getattr(func, "overloadpacket", func)  # a higher-order operator has no overloads
        formula = self.formulas.get(packet)
        if formula is None and hasattr(func, "decompose"):
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        if self.scopes and self.scopes[-1] is None:
            return result
        if formula is not None:
            kind = self.scopes[-1] if self.scopes else _kind_of_product(_name(func))
            self.counts[kind] += formula(*args, **kwargs, out_val=result) // 2
        elif not _only_moves(func):
            self.not_counted[_name(func)] += 1
        return result

    def mixed_convolution(self, layer: DynamicConv | CompactConv | CondConv2d, inputs: tuple, output: Tensor) -> None:
        convolution, mixing = _mixed_convolution(layer, output)
        self.counts["convolution"] += convolution
        self.counts["mixing"] += mixing


def _mixed_convolution(layer: DynamicConv | CompactConv | CondConv2d, output: Tensor) -> tuple[int, int]:
    """Return (convolution, mixing) of a layer with this `output` and a kernel per sample."""
    kernel = layer.in_channels // layer.groups * layer.kernel_size[0] * layer.kernel_size[1]
    numbers = layer.num_experts * layer.out_channels * (kernel + (layer.bias is not None))
    return output.numel() * kernel, output.shape[0] * numbers


# Operations that only move or create data. Views are recognised by their schema.
MOVES = {
    "arange", "as_strided", "bernoulli", "cat", "channel_shuffle", "clone", "constant_pad_nd", "copy", "detach",
    "embedding", "empty", "empty_like", "empty_permuted", "empty_strided", "eye", "fill", "flip", "full",
    "full_like", "fused_sdp_choice", "gather", "im2col", "index", "index_put", "index_select", "lift_fresh",
    "linspace", "local_scalar_dense", "masked_fill", "new_empty", "new_empty_strided", "new_full", "new_ones",
    "new_zeros", "ones", "ones_like", "pixel_shuffle", "pixel_unshuffle", "rand", "randn", "reflection_pad1d",
    "reflection_pad2d", "repeat", "replication_pad1d", "replication_pad2d", "replication_pad3d", "reshape_alias",
    "resize", "roll", "scalar_tensor", "scatter", "slice_scatter", "split_with_sizes_copy", "stack", "to_copy",
    "tril", "triu", "unbind_copy", "unsafe_index", "unsafe_split", "unsafe_view", "upsample_nearest1d",
    "upsample_nearest2d", "upsample_nearest3d", "where", "zero", "zeros", "zeros_like",
}  # fmt: skip
# Aliases of operations.
KINDS = {
    "native_batch_norm": "batch_norm",
    "native_batch_norm_legit": "batch_norm",
    "native_batch_norm_legit_no_training": "batch_norm",
    "cudnn_batch_norm": "batch_norm",
    "native_layer_norm": "layer_norm",
    "native_group_norm": "group_norm",
    "max_pool2d_with_indices": "max_pool2d",
    "max_pool3d_with_indices": "max_pool3d",
    "adaptive_max_pool2d_with_indices": "adaptive_max_pool2d",
}


def _name(func: Any) -> str:
    """Shorten an operation's name: aten::hardswish_ -> hardswish; other namespaces are kept."""
    full = func._schema.name if hasattr(func, "_schema") else str(func)
    name = full.removeprefix("aten::").strip("_")
    return KINDS.get(name, name)


def _only_moves(func: Any) -> bool:
    return getattr(func, "is_view", False) or _name(func) in MOVES or _name(func).startswith("prim::")


def _kind_of_product(name: str) -> str:
    if "convolution" in name or "conv2d" in name:
        return "convolution"
    return "linear" if name in ("mm", "addmm", "scaled_mm") else "matmul"


# thop, and ultralytics-thop, which is imported by the same name
# ---------------------------------------------------------------


def register_thop() -> None:
    """Let `thop.profile` count our layers and timm's CondConv2d networks without `custom_ops`.

    `import parameternet` calls this. Both packages look up layers by type in a table and count unknown layers as zero.
    Our rules are added now if thop is loaded, otherwise when it is imported. thop is not imported here and need not be
    installed. Existing rules and `custom_ops` are left alone.

    thop then reports our convolution + mixing + routing + linear, in multiply-accumulates for the whole batch, plus the
    results of its own rules: in our networks four per input element of a BatchNorm, and one per input or output element
    of the last pooling. Before ultralytics-thop 2.2 `profile_origin` counts only layers without children, so it misses
    every DynamicConv, which contains a router; use `profile`.
    """
    if "thop.profile" in sys.modules:
        _add_rules(sys.modules["thop.profile"].register_hooks)
    elif not any(isinstance(finder, _WaitsForThop) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WaitsForThop())


def _add_rules(table: dict[type, Callable]) -> None:
    for kind, rule in THOP_RULES.items():
        table.setdefault(kind, rule)


class _WaitsForThop(importlib.abc.MetaPathFinder):
    """Import hook that finds nothing itself, but adds our rules once thop's table exists."""

    def __init__(self) -> None:
        self.asks_the_others = False

    def find_spec(self, fullname, path=None, target=None):
        if fullname != "thop.profile" or self.asks_the_others:
            return None
        self.asks_the_others = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self.asks_the_others = False
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_add(module) -> None:
                execute(module)
                _add_rules(getattr(module, "register_hooks", {}))

            spec.loader.exec_module = execute_and_add
        return spec


def _thop_convolution(layer: nn.Conv2d, inputs: tuple, output: Tensor) -> None:
    layer.total_ops += output.numel() * layer.weight[0].numel()


def _thop_mixed_convolution(layer: DynamicConv | CompactConv | CondConv2d, inputs: tuple, output: Tensor) -> None:
    layer.total_ops += sum(_mixed_convolution(layer, output))
    # Some versions add the counts of children to those of a layer with a rule, others do not. So the router's count is
    # moved to its layer, where both count it once.
    router = getattr(layer, "routing", None)
    if router is not None:
        layer.total_ops += router.total_ops
        router.total_ops = router.total_ops * 0


def _thop_routing(layer: Router, inputs: tuple, output: Tensor) -> None:
    hidden = 0 if layer.hidden is None else layer.hidden.weight.numel()
    layer.total_ops += output.shape[0] * (layer.weight.numel() + hidden)


def _thop_linear(layer: nn.Linear, inputs: tuple, output: Tensor) -> None:
    layer.total_ops += output.numel() * layer.in_features


# Most versions compare types exactly, so subclasses of torch's layers in our networks need rules too.
THOP_RULES = {
    DynamicConv: _thop_mixed_convolution,
    CompactConv: _thop_mixed_convolution,
    CondConv2d: _thop_mixed_convolution,
    Router: _thop_routing,
    DepthwiseConv: _thop_convolution,
    PooledConv: _thop_convolution,
    Conv2dSame: _thop_convolution,
    Linear: _thop_linear,
}
