"""Observe a forward pass of a copy: the calls of each layer, and other uses of its tensors."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

__all__ = ["HARMLESS", "SHAPES", "Call", "Observation", "default_probe", "merged_weights", "meta_copy", "observe"]

_Probe = Tensor | tuple[Any, ...]


def _getters(*names: str) -> frozenset[Any]:
    return frozenset(getattr(torch.Tensor, name).__get__ for name in names)


# Functions of a tensor that do not depend on its values; the first ones do not depend on its shape either.
HARMLESS = _getters(
    "dtype", "device", "requires_grad", "is_cuda", "is_meta", "layout", "ndim", "is_leaf", "grad_fn"
) | {
    torch.Tensor.dim,
    torch.Tensor.is_floating_point,
    torch.is_floating_point,
    torch.Tensor.is_complex,
    torch.is_complex,
    torch.Tensor.ndimension,
}
SHAPES = _getters("shape") | {torch.Tensor.size, torch.Tensor.numel, torch.numel, torch.Tensor.__len__}

# Functions that make control flow depend on a tensor's values, and those that write into their first argument.
NUMBERS = frozenset(
    getattr(torch.Tensor, name)
    for name in ("__bool__", "__float__", "__int__", "__index__", "__contains__", "item", "tolist", "numpy", "nonzero")
) | {torch.nonzero, torch.equal, torch.Tensor.equal, torch.allclose, torch.Tensor.allclose, torch.unique}
WRITES = frozenset({torch.Tensor.__setitem__, torch.Tensor.copy_})

_Version = tuple[int, int]  # the tensor and its version


@dataclass(frozen=True)
class Call:
    """One call of a layer. inside: Names of the enclosing modules and its own."""

    read: _Version | None
    given: _Version | None
    shape: tuple[int, ...]
    keywords: bool
    inside: frozenset[str]


@dataclass
class Observation:
    """Observations of a forward pass.

    calls: Calls by layer, in the order of first calls. The next four map a layer to those of its tensors (`weight`)
    that were used outside of its own calls. used: Passed to a function. shaped: Their shape was read. read: Read by
    name, for any use. absent: Read by name, and None. decides: Control flow depended on values of the input, so other
    inputs may take other paths.
    """

    calls: dict[str, list[Call]] = field(default_factory=dict)
    used: dict[str, set[str]] = field(default_factory=dict)
    shaped: dict[str, set[str]] = field(default_factory=dict)
    read: dict[str, set[str]] = field(default_factory=dict)
    absent: dict[str, set[str]] = field(default_factory=dict)
    decides: bool = False


def observe(
    model: nn.Module, probe: _Probe | None = None, training: bool = False, numbers: bool = True
) -> Observation | None:
    """Run a copy of `model` and observe it; return None if it cannot be run.

    The copy runs on the meta device, where tensors have shapes but no values. A network that needs values runs as a
    copy on its own device instead.

    Args:
        model: Any network; it is not changed.
        probe: An input of the network, or a tuple of its arguments; None: an image of its default size.
        training: Run the copy in training mode.
        numbers: If the meta device fails, run a copy on the network's own device.
    """
    with torch.inference_mode(False):  # inference tensors have no version counter
        given = default_probe(model) if probe is None else probe
        given = given if isinstance(given, tuple) else (given,)
        try:
            return _watched(meta_copy(model).train(training), [_to_meta(x) for x in given])
        except Exception:  # copying and running the network's own code may raise any error
            if not numbers:
                return None
        try:
            tensor = next(iter(model.parameters()), torch.empty(0))
            return _watched(deepcopy(model).train(training), [_with_numbers(x, tensor.device) for x in given])
        except Exception:
            return None


def _with_numbers(x: Any, device: torch.device) -> Any:
    if not isinstance(x, Tensor):
        return deepcopy(x)
    if not x.is_meta:
        return x.detach().clone()
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(device, x.dtype)


@torch.no_grad()
def merged_weights(model: nn.Module, methods: tuple[str, ...]) -> set[str]:
    """Return layers whose tensors are used by the given methods of enclosing modules."""
    try:
        double = meta_copy(model)
    except Exception:  # copying the network's own attributes may raise any error
        return set()
    watch = _Watch(double, [])
    for name, module in list(double.named_modules()):
        for method in methods:
            if name and callable(getattr(type(module), method, None)):
                with suppress(Exception), watch:  # uses before an error still count
                    getattr(module, method)()
    return set(watch.seen.used)


def _to_meta(x: Any) -> Any:
    return torch.empty_like(x, device="meta") if isinstance(x, Tensor) else x


@torch.no_grad()
def _watched(model: nn.Module, inputs: list[Any]) -> Observation:
    watch = _Watch(model, inputs)
    with ExitStack() as stack:
        if hasattr(torch.compiler, "set_stance"):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(watch.attributes())
        stack.enter_context(watch)
        model(*inputs)
    return watch.seen


class _Watch(TorchFunctionMode):
    """Hook every module of a network and every torch function that receives one of their tensors."""

    def __init__(self, model: nn.Module, inputs: list[Any]) -> None:
        super().__init__()
        self.derived = WeakIdKeyDictionary()  # tensors computed from the input
        self._derive(inputs)
        self.seen = Observation()
        self.stack: list[str] = []
        self.started: list[tuple[_Version | None, tuple[int, ...], bool]] = []
        self.kept: list[Tensor] = []  # a living tensor's id is unique
        self.names = {id(module): name for name, module in model.named_modules()}
        self.owners: dict[int, list[tuple[str, str]]] = {}
        for name, module in model.named_modules():
            for part, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None:
                    self.owners.setdefault(id(tensor), []).append((name, part))
            module.register_forward_pre_hook(self._start, prepend=True, with_kwargs=True)
            module.register_forward_hook(self._end, with_kwargs=True)

    def _version(self, x: Any) -> _Version | None:
        if not isinstance(x, Tensor):
            return None
        self.kept.append(x)
        return id(x), x._version

    def _start(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else None
        self.stack.append(self.names[id(module)])
        self.started.append((self._version(x), tuple(x.shape) if isinstance(x, Tensor) else (), bool(kwargs)))
        self.seen.calls.setdefault(self.names[id(module)], [])  # in the order in which they began

    def _end(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        read, shape, keywords = self.started.pop()
        call = Call(read, self._version(output), shape, keywords, frozenset(self.stack))
        self.seen.calls[self.stack.pop()].append(call)
        if any(tensor in self.derived for tensor in _tensors((args, kwargs))):
            self._derive(output)  # autograd functions are not reported

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in HARMLESS:
            for tensor in _tensors((args, kwargs)):
                for name, part in self.owners.get(id(tensor), ()):
                    self._note(self.seen.shaped if func in SHAPES else self.seen.used, name, part)
        result = func(*args, **(kwargs or {}))
        if any(tensor in self.derived for tensor in _tensors((args, kwargs))):
            self.seen.decides |= func in NUMBERS
            self._derive((result, args[:1] if func in WRITES or _is_in_place(func) else ()))
        return result

    def _derive(self, values: Any) -> None:
        for tensor in _tensors(values):
            self.derived[tensor] = True

    def _note(self, found: dict[str, set[str]], name: str, part: str) -> None:
        if name not in self.stack:
            found.setdefault(name, set()).add(part)

    @contextmanager
    def attributes(self) -> Iterator[None]:
        """Record reads of a layer's bias that no torch function call shows."""
        original = nn.Module.__getattr__

        def read(module: nn.Module, attribute: str) -> Any:
            value = original(module, attribute)
            if id(module) in self.names and (value is None or isinstance(value, Tensor)):
                name = self.names[id(module)]
                self._note(self.seen.read, name, attribute)
                if value is None:
                    self._note(self.seen.absent, name, attribute)
            return value

        nn.Module.__getattr__ = read  # type: ignore[method-assign]
        try:
            yield
        finally:
            nn.Module.__getattr__ = original  # type: ignore[method-assign]


def _is_in_place(func: Any) -> bool:
    name = getattr(func, "__name__", "")
    return name.endswith("_") and not name.endswith("__")


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, Mapping):
        for value in values.values():
            yield from _tensors(value)
    elif isinstance(values, tuple | list):
        for value in values:
            yield from _tensors(value)


def meta_copy(model: nn.Module) -> nn.Module:
    """Copy a network to the meta device in evaluation mode, including tensors in attributes."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                memo[id(parameter)] = nn.Parameter(parameter.to("meta"), requires_grad=False)
        for value in (*module._buffers.values(), *vars(module).values()):
            if isinstance(value, Tensor):
                memo[id(value)] = value.to("meta")
    return deepcopy(model, memo).eval()


def default_probe(model: nn.Module) -> Tensor:
    """Return an image on the meta device, of the network's default size or 224 pixels."""
    cfg = getattr(model, "pretrained_cfg", None) or {}
    layers: Iterator[Any] = (m for m in model.modules() if hasattr(m, "in_channels") and hasattr(m, "weight"))
    first = next(layers, None)
    channels = first.in_channels if first is not None else 3
    dtype = first.weight.dtype if first is not None else torch.float32
    return torch.empty(1, channels, *(cfg.get("input_size") or (3, 224, 224))[1:], device="meta", dtype=dtype)
