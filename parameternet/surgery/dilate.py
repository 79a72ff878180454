"""Replace the strides of the last stages by dilation, for dense prediction."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import DynamicConv
from ..layers.altered import replaced_method
from ..layers.functional import pair
from .observe import meta_copy

__all__ = ["OUTPUT_STRIDES", "dilate"]

OUTPUT_STRIDES = (8, 16, 32)
WINDOWS = (nn.Conv2d, DynamicConv, nn.MaxPool2d, nn.AvgPool2d)
SIDE = 256  # of the probe image: divisible by every reduction up to 64, and larger than any dilated kernel


@dataclass(frozen=True)
class _Sides:
    """Heights of a layer's input and output for an image of `SIDE`."""

    read: int
    given: int


@torch.no_grad()
def dilate(model: nn.Module, output_stride: int) -> nn.Module:
    """Limit the reduction of a network's last feature map to `output_stride`, in place.

    Strides beyond it are replaced by 1, and the layers that follow are dilated by the same factor. At every `stride`-th
    position they compute the same as before, except for operations on the whole map (routers, squeeze-and-excitation,
    pooling). Parameters keep their names. Source: DeepLab, arXiv:1606.00915.

    Args:
        model: A network of `torch.nn.Conv2d`, `DynamicConv` and pooling layers that takes images of any size.
        output_stride: 8, 16 or 32.

    Returns:
        `model`, with the reductions in its `feature_info` updated.

    Raises:
        ValueError: The output stride is not supported, or the network cannot be dilated; it is left unchanged.
    """
    if output_stride not in OUTPUT_STRIDES:
        raise ValueError(f"output_stride must be one of {', '.join(map(str, OUTPUT_STRIDES))}, got {output_stride}")
    before = _sides(model)
    strides = {name: _stride(side, output_stride) for name, side in before.items()}
    undo = {name: _settings(model.get_submodule(name)) for name in before}
    try:
        for name, stride in strides.items():
            layer: Any = model.get_submodule(name)
            if stride is not None:
                _check_own_method(name, layer)
                layer.stride = (stride, stride)
        for name, side in _sides(model).items():
            _widen(name, model.get_submodule(name), side.read // before[name].read)
        _check_features(model, output_stride)
    except (ValueError, RuntimeError) as error:
        for name, settings in undo.items():
            vars(model.get_submodule(name)).update(settings)
        raise ValueError(f"this {type(model).__name__} cannot have output_stride={output_stride}: {error}") from error
    for info in _feature_info(model):
        info["reduction"] = min(info["reduction"], output_stride)
    return model


def _sides(model: nn.Module) -> dict[str, _Sides]:
    """Return input and output heights of every layer with a window, in the order of first calls."""
    found: dict[str, _Sides] = {}
    double = meta_copy(model)
    names: dict[nn.Module, str] = {
        module: name for name, module in double.named_modules() if isinstance(module, WINDOWS)
    }

    def note(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        found.setdefault(names[module], _Sides(inputs[0].shape[2], output.shape[2]))

    for module in names:
        module.register_forward_hook(note)
    double(_probe(double))
    return found


def _probe(model: nn.Module) -> Tensor:
    first: Any = next((m for m in model.modules() if isinstance(m, WINDOWS) and hasattr(m, "in_channels")), None)
    dtype = next(model.parameters()).dtype
    return torch.empty(1, 3 if first is None else first.in_channels, SIDE, SIDE, device="meta", dtype=dtype)


def _check_features(model: nn.Module, output_stride: int) -> None:
    if not hasattr(model, "forward_features"):
        return
    double: Any = meta_copy(model)
    shape = tuple(double.forward_features(_probe(double)).shape)
    rows = SIDE // output_stride
    if len(shape) == 4 and shape[2] != rows:
        raise ValueError(f"an image of {SIDE} rows gives a last feature map of shape {shape}, expected {rows} rows")


def _stride(side: _Sides, output_stride: int) -> int | None:
    """Return the stride that keeps the map at `output_stride`; None if the layer's own stride does."""
    finest = SIDE // output_stride
    if side.given >= finest or side.given == side.read or side.given <= 1:
        return None
    return max(1, side.read // finest)


def _widen(name: str, layer: Any, factor: int) -> None:
    """Dilate the window of a layer by `factor`."""
    window = pair(layer.kernel_size)
    if factor <= 1 or window == (1, 1):
        return
    _check_own_method(name, layer)
    if isinstance(layer, nn.AvgPool2d):
        raise ValueError(f"average pooling ({name}) cannot be dilated")
    if getattr(layer, "padding_mode", "zeros") != "zeros":
        raise ValueError(f"{name} pads with {layer.padding_mode}")
    layer.dilation = tuple(factor * d for d in pair(layer.dilation))
    if not isinstance(layer.padding, str):  # a string means padding that is computed on every call
        layer.padding = tuple(factor * p for p in pair(layer.padding))


def _check_own_method(name: str, layer: nn.Module) -> None:
    replaced = replaced_method(layer)
    if replaced:
        raise ValueError(f"{name} may not do what its class does: {replaced}")


def _settings(layer: nn.Module) -> dict[str, Any]:
    return {name: vars(layer)[name] for name in ("stride", "padding", "dilation") if name in vars(layer)}


def _feature_info(model: nn.Module) -> list[dict[str, Any]]:
    info = getattr(model, "feature_info", [])
    return list(getattr(info, "info", info))
