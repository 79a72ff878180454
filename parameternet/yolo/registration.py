# SPDX-License-Identifier: AGPL-3.0-or-later
"""Register our layers with stock Ultralytics, without touching its files.

The parser looks up names in its own globals, and sets of classes decide which arguments a row gets. So we add a
*stand-in* for each of our names: a class that equals the stock class whose rules the row follows, and that builds our
layer when called. Only the parser sees it. A few functions are wrapped (`_wraps`), each once.
"""

import importlib
import threading
from collections.abc import Callable
from copy import deepcopy
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import nn
from ultralytics import __version__
from ultralytics.engine.exporter import Exporter
from ultralytics.nn import modules, tasks
from ultralytics.utils import dist
from ultralytics.utils.torch_utils import get_flops

from parameternet import files
from parameternet.export.forms import has_dynamic_convolutions, write_computed, write_constant
from parameternet.layers import Router

from . import backbone, layers, transfer, yamls

__all__ = ["gflops", "register"]

OLDEST = "8.3.200"
_LOCK = threading.RLock()
# YAML name -> (our layer, the stock class whose row it follows).
ROWS: dict[str, tuple[type[nn.Module], type[nn.Module]]] = {
    "DynamicConv": (layers.DynamicConv, modules.Conv),
    "DynamicConvBnAct": (layers.DynamicConvBnAct, modules.Conv),
    "GhostModule": (layers.GhostModule, modules.Conv),
    "GhostBottleneck_DynamicConv": (layers.GhostBottleneck, modules.Conv),
    "C2f_DynamicConv": (layers.C2f_DynamicConv, modules.C2f),
    "C2f_GhostModule_DynamicConv": (layers.C2f_GhostModule_DynamicConv, modules.C2f),
    "C3k_DynamicConv": (layers.C3k_DynamicConv, modules.C3),
    "TimmBackbone": (backbone.TimmBackbone, modules.HGStem),
    "TimmStage": (backbone.TimmStage, modules.HGStem),
}
# The parser compares C3k2 by identity (sizes m, l, x; the kind of head), so these are built as C3k2 and converted.
TWINS = {
    "C3k2_DynamicConv": layers.C3k2_DynamicConv,
    "C3k2_GhostModule_DynamicConv": layers.C3k2_GhostModule_DynamicConv,
}
# Formats whose runtimes support kernels mixed in the graph, for one image at a time.
COMPUTED = ("onnx", "openvino", "torchscript")
PICKLED = [*{layer for layer, _ in ROWS.values()}, *TWINS.values(), Router, backbone.TimmBatchNorm]


class StandIn(type):
    """A class that the parser treats as `stock` and that builds `layer`."""

    layer: type[nn.Module]
    stock: type[nn.Module]

    def __hash__(cls) -> int:
        return hash(cls.stock)

    def __eq__(cls, other: object) -> bool:
        return other is cls or other is cls.stock

    def __call__(cls, *args: Any) -> nn.Module:
        options = args[-1] if cls.layer not in (backbone.TimmBackbone, backbone.TimmStage) else None
        if isinstance(options, dict):
            return cls.layer(*args[:-1], **options)
        return cls.layer(*args)


def register() -> None:
    """Register our layers with Ultralytics; idempotent.

    Raises:
        ImportError: this Ultralytics has a layer with one of our names, or builds something else from our rows.
    """
    with _LOCK:
        if getattr(tasks.parse_model, "of_parameternet", False):
            return
        names = [*ROWS, *TWINS]
        taken = [name for name in names if hasattr(tasks, name)]
        if taken:
            raise ImportError(
                f"Ultralytics {__version__} has a layer of its own named {', '.join(taken)}: "
                "parameternet.yolo cannot be used with it"
            )
        originals = [(owner, name, getattr(owner, name)) for owner, name, _ in _wraps()]
        try:
            _install()
            _test()
        except Exception as error:
            for name in ROWS:
                vars(tasks).pop(name, None)
            for original in originals:
                setattr(*original)
            raise ImportError(
                f"parameternet.yolo does not fit Ultralytics {__version__} (tested: {OLDEST} to 8.4.190): {error}"
            ) from error


def _install() -> None:
    for name, (layer, stock) in ROWS.items():
        namespace = {"__module__": "parameternet.yolo", "__qualname__": name, "layer": layer, "stock": stock}
        setattr(tasks, name, StandIn(name, (nn.Module,), namespace))
    for owner, name, ours in _wraps():
        setattr(owner, name, _wrapped(getattr(owner, name), ours))
    _add_thop_rules()
    if hasattr(torch.serialization, "add_safe_globals"):
        torch.serialization.add_safe_globals(PICKLED)


def _wraps() -> tuple[tuple[Any, str, Callable[..., Any]], ...]:
    """Return (owner, name, replacement) of each wrapped function; the replacement takes the original first."""
    return (
        (tasks, "parse_model", _parse_model),
        (tasks, "check_yaml", _check_yaml),
        (tasks, "torch_safe_load", _torch_safe_load),
        (tasks.BaseModel, "load", _load),
        (tasks.BaseModel, "fuse", _fuse),
        (dist, "generate_ddp_file", _generate_ddp_file),
        *((Exporter, name, _export) for name in dir(Exporter) if name.startswith("export_")),
    )


def _wrapped(original: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that calls `ours(original, ...)`."""

    @wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return ours(original, *args, **kwargs)

    wrapper.of_parameternet = True
    return wrapper


# ---------------------------------------------------------------------------------------------------------------------
# Parsing
# ---------------------------------------------------------------------------------------------------------------------


def _parse_model(original: Callable[..., Any], d: dict[str, Any], ch: int, verbose: bool = True) -> Any:
    d = deepcopy(d)
    rows = [*d["backbone"], *d["head"]]
    write_features(rows, ch)
    twins = _rename_twins(rows)
    model, save = original(d, ch, verbose)
    for index, (name, options) in twins.items():
        built = TWINS[name].rebuild(model[index], **options)
        built.np = sum(p.numel() for p in built.parameters())
        built.type = f"parameternet.yolo.{name}"
    return model, save


def write_features(rows: list[list[Any]], ch: int) -> None:
    """Write channels and indices of timm's features into the rows where the parser reads them."""
    specs: dict[int, tuple[dict[str, Any], backbone.Features]] = {}
    for index, row in enumerate(rows):
        if row[2] == "TimmBackbone":
            name, options = row[3][0], dict(row[3][1]) if len(row[3]) > 1 else {}
            asked = {key: value for key, value in options.items() if key not in ("pretrained", "out_indices")}
            found = backbone.features_of(name, ch, asked)
            picked = _strides(rows, index)
            spec = {"name": name, **options}
            if picked:
                spec["out_indices"] = sorted({found.index(stride) for stride in picked})
            specs[index] = spec, found
            row[3] = [spec, [found.channels[i] for i in spec.get("out_indices", range(len(found.channels)))]]
        elif row[2] == "TimmStage":
            source = row[0] if row[0] >= 0 else index + row[0]
            if source not in specs:
                raise ValueError(f"TimmStage in row {index} reads row {source}, which is not a TimmBackbone")
            spec, found = specs[source]
            feature = found.index(row[3][0])
            row[3] = [spec["out_indices"].index(feature), found.channels[feature]]


def _strides(rows: list[list[Any]], source: int) -> list[int]:
    """Return the strides requested by a backbone's `TimmStage` rows."""
    pickers = [(index, row) for index, row in enumerate(rows) if row[2] == "TimmStage"]
    return [row[3][0] for index, row in pickers if (row[0] if row[0] >= 0 else index + row[0]) == source]


def _rename_twins(rows: list[list[Any]]) -> dict[int, tuple[str, dict[str, Any]]]:
    """Rename rows of our C3k2 variants to C3k2; return their positions and options."""
    found = {}
    for index, row in enumerate(rows):
        if row[2] in TWINS:
            args = list(row[3])
            options = args.pop() if isinstance(args[-1], dict) else {}
            found[index] = row[2], options
            row[2], row[3] = "C3k2", args
    return found


def _check_yaml(original: Callable[..., Any], file: Any, *args: Any, **kwargs: Any) -> Any:
    own = yamls.find(str(file), lambda name: original(name, hard=False))
    return original(file, *args, **kwargs) if own is None else own


# ---------------------------------------------------------------------------------------------------------------------
# Life cycle of a model
# ---------------------------------------------------------------------------------------------------------------------


def _fuse(original: Callable[..., Any], self: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
    layers.fold(self)
    for module in self.modules():
        if isinstance(module, backbone.TimmBackbone):
            module.fold()
    return original(self, *args, **kwargs)


def _load(original: Callable[..., Any], self: nn.Module, weights: Any, verbose: bool = True) -> None:
    source = (weights.get("ema") or weights["model"]) if isinstance(weights, dict) else weights
    transfer.upcycle_like(self, source)
    prepared = transfer.prepare(self, source, verbose)
    original(self, weights if prepared is None else prepared, verbose)


def _torch_safe_load(original: Callable[..., Any], weight: Any, *args: Any, **kwargs: Any) -> Any:
    if transfer.is_ours(weight):
        return transfer.read(weight), weight
    return original(weight, *args, **kwargs)


def _generate_ddp_file(original: Callable[..., Any], trainer: Any) -> str:
    file = original(trainer)
    path = Path(file)
    files.write_text(path, f"import parameternet.yolo\n{path.read_text('utf-8')}")
    return file


def _export(original: Callable[..., Any], self: Exporter, *args: Any, **kwargs: Any) -> Any:
    """Convert dynamic convolutions to the form that the format's runtimes support; see `parameternet.export.forms`."""
    if has_dynamic_convolutions(self.model):  # exporting one format may call the exporter of another
        one_image = not self.args.dynamic and self.im.shape[0] == 1
        if self.args.format in COMPUTED and one_image and not _is_quantised(self.args):
            write_computed(self.model, tuple(self.im.shape[1:]), mix_by_conv=self.args.format == "onnx")
        else:
            write_constant(self.model)
    return original(self, *args, **kwargs)


def _is_quantised(args: Any) -> bool:
    """Return whether kernels will be quantised to int8, which requires constant kernels."""
    return bool(getattr(args, "int8", False)) or getattr(args, "quantize", None) not in (None, 16, 32)


def _add_thop_rules() -> None:
    """Count only convolutions in Ultralytics' GFLOPs.

    Some releases count on a small image and scale by area, which would multiply mixing by hundreds.
    `parameternet.count_flops` counts mixing.
    """
    try:
        rules = importlib.import_module("thop.profile").register_hooks
    except ImportError:
        return
    from parameternet.layers import DynamicConv

    for kind in (DynamicConv, layers.DynamicConv):
        rules[kind] = _count_convolution
    rules[Router] = _count_nothing


def gflops(model: nn.Module, size: int = 640) -> float:
    """Return GFLOPs as Ultralytics does: twice the multiply-adds of convolutions, for one image of that size."""
    return get_flops(model, size)


def _count_convolution(layer: nn.Module, inputs: Any, output: torch.Tensor) -> None:
    layer.total_ops += output.numel() * layer.weight[0].numel()


def _count_nothing(layer: nn.Module, inputs: Any, output: Any) -> None:
    layer.total_ops += 0


# ---------------------------------------------------------------------------------------------------------------------
# Compatibility check
# ---------------------------------------------------------------------------------------------------------------------


def _test() -> None:
    """Parse three rows and check that their channels are those of the stock layers."""
    rows = [[-1, 1, "DynamicConv", [64, 3, 2]], [-1, 3, "C2f_DynamicConv", [128, True]], [-1, 1, "Conv", [32, 1, 1]]]
    d = {"nc": 3, "depth_multiple": 0.34, "width_multiple": 0.25, "backbone": rows, "head": []}
    state = torch.get_rng_state()
    model, _ = tasks.parse_model(d, 3, verbose=False)
    torch.set_rng_state(state)
    first, second, third = model
    built = (type(first), first.in_channels, first.out_channels, type(second), second.cv1.conv.in_channels,
             len(second.m), third.conv.in_channels)  # fmt: skip
    expected = (layers.DynamicConv, 3, 16, layers.C2f_DynamicConv, 16, 1, 32)
    if built != expected:
        raise RuntimeError(f"three rows were parsed to {built}, expected {expected}")
