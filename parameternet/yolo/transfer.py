# SPDX-License-Identifier: AGPL-3.0-or-later
"""Weights of other networks into dynamic detectors.

YOLO("yolov8n-dynamicconv.yaml").load("yolov8n.pt")  # dense kernels, upcycled
YOLO("yolov8n-dynamicconv.yaml").load("best.safetensors")  # a classifier's, into the backbone
"""

from collections import Counter
from copy import copy
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn
from ultralytics.utils import LOGGER

from parameternet.layers import DynamicConv
from parameternet.surgery.upcycle import upcycle_state_dict

from .backbone import TimmBackbone

__all__ = ["prepare", "read"]


class Weights(nn.Module):
    """Tensors of a file, in the place of the network that a checkpoint of Ultralytics holds."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.tensors = {name: value.float() if value.is_floating_point() else value for name, value in tensors.items()}
        self.args = {"task": "classify"}  # else Ultralytics guesses it from layers, and warns

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        return dict(self.tensors)


def read(file: str | Path) -> dict[str, Any]:
    """A classifier's .safetensors file as a checkpoint of Ultralytics.

    Raises:
        FileNotFoundError: there is no such file.
        safetensors.SafetensorError: it is damaged.
    """
    return {"model": Weights(load_file(file)), "train_args": {}}


def prepare(model: nn.Module, source: nn.Module, verbose: bool = True) -> nn.Module | None:
    """A network whose state dict has `source`'s weights as `model` wants them; None if there is nothing to be changed.

    Weights of a network of timm go to the `TimmBackbone` that is made of it, if there is one. Where
    `model` has a dynamic convolution and `source` a dense one, the kernel is split among the experts so that they
    compute the same. A bare `DynamicConv` has neither normalisation nor activation: it gets the kernel with the
    normalisation's scale folded in, which is a start and not the same function.
    """
    own = source.float().state_dict()
    state = _under_backbone(own, model)
    changed = upcycle_state_dict(_with_bare_kernels(state, model), model, neutral=True)
    if changed.keys() == own.keys():
        return None
    if verbose:
        _tell(changed, state, model)
    return _with(source, changed)


def _with(source: nn.Module, tensors: dict[str, Tensor]) -> nn.Module:
    """`source`, whose head and names Ultralytics looks at too, with another state dict."""
    view = copy(source)
    view.state_dict = lambda: tensors
    return view


def _dynamic(model: nn.Module) -> list[tuple[str, DynamicConv]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, DynamicConv)]


def _under_backbone(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The tensors by the names that they have in `model`, if they are those of its `TimmBackbone`."""
    spoken = {_plain(name): value for name, value in state.items()}
    for place, module in model.named_modules():
        if isinstance(module, TimmBackbone):
            wanted = module.net.state_dict()
            fits = (_plain(n) in spoken and spoken[_plain(n)].shape == value.shape for n, value in wanted.items())
            if all(fits):
                return {f"{place}.net.{n}": spoken[_plain(n)] for n in wanted}
    return state


def _plain(name: str) -> str:
    # As a list of features, a network of timm has `blocks_0.` for `blocks.0.`.
    return name.replace("_", ".")


def _with_bare_kernels(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Kernels of Conv under the names of the bare layers in their places."""
    out = dict(state)
    for name, _ in _dynamic(model):
        dense = f"{name}.conv.weight"
        if dense in out and f"{name}.bn.weight" in out:
            kernel, norm = out.pop(dense), {k: out.pop(f"{name}.bn.{k}") for k in ("weight", "running_var")}
            scale = norm["weight"] / (norm["running_var"] + 1e-3).sqrt()
            out[f"{name}.weight"] = kernel * scale[:, None, None, None]
    return out


def _tell(changed: dict[str, Tensor], state: dict[str, Tensor], model: nn.Module) -> None:
    own = model.state_dict()
    fits = {name for name, value in changed.items() if name in own and own[name].shape == value.shape}
    upcycled = {n for n in fits if n not in state or state[n].shape != changed[n].shape}
    routers = {name for name in upcycled if ".routing." in name}
    counts = Counter(transferred=len(fits - upcycled), upcycled=len(upcycled - routers), left=len(set(own) - fits))
    LOGGER.info(
        f"parameternet: of {len(own)} tensors {counts['transferred']} transferred, {counts['upcycled']} upcycled "
        f"(and {len(routers)} of their routers neutral), {counts['left']} left as they were"
    )
