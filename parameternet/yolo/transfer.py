# SPDX-License-Identifier: AGPL-3.0-or-later
"""Load weights of other networks into dynamic detectors.

YOLO("yolov8n-dynamicconv.yaml").load("yolov8n.pt")  # dense kernels, upcycled
YOLO("yolov8n-dynamicconv.yaml").load("best.safetensors")  # a classifier's, into the backbone
"""

from collections import Counter
from collections.abc import Iterable
from copy import copy
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import adapt_input_conv
from torch import Tensor, nn
from ultralytics.utils import LOGGER

from parameternet import weights
from parameternet.layers import DynamicConv, match_routers
from parameternet.models import dynamic_timm, loading
from parameternet.surgery.upcycle import rebuild, upcycle_state_dict

from .backbone import TimmBackbone, features_of

__all__ = ["is_ours", "prepare", "read", "upcycle_like"]


class MissingWeights(weights.WeightsNotFound, FileNotFoundError):
    """The file does not exist; both Ultralytics' and this package's kind of error."""


class Weights(nn.Module):
    """Tensors of a file, in place of the network in an Ultralytics checkpoint."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.tensors = {name: value.float() if value.is_floating_point() else value for name, value in tensors.items()}
        self.args = {"task": "classify"}  # otherwise Ultralytics guesses it from layers, with a warning

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        return dict(self.tensors)


def is_ours(weight: str | Path) -> bool:
    """Return whether this package reads `weight`: a source of `loading.parse_source` unknown to Ultralytics."""
    name = str(weight)
    if name.lower().endswith(".safetensors") or name.startswith(("local-dir:", "hf-hub:")):
        return True
    if Path(name).suffix.lower() in (".pt", ".pth"):
        return False
    try:
        loading.parse_source(weight)
    except weights.WeightsError:
        return False
    return True


def read(weight: str | Path) -> dict[str, Any]:
    """Read a classifier's verified weights as a checkpoint of Ultralytics.

    Args:
        weight: As for `parameternet.models.loading.parse_source`, including timm models.

    Raises:
        FileNotFoundError: there is no such file.
        parameternet.weights.WeightsDamaged: the file is invalid.
    """
    try:
        return {"model": Weights(loading.read_tensors(weight)), "train_args": {}}
    except weights.WeightsNotFound as error:
        raise MissingWeights(str(error)) from error


def upcycle_like(model: nn.Module, source: nn.Module) -> None:
    """Convert the layers of `model`, in place, that are dynamic in an upcycled `source`.

    Ultralytics' trainer rebuilds a network from its YAML, which lacks them, and loads the weights.
    """
    done = getattr(source, "upcycling", None)
    if done is None or getattr(model, "upcycling", None) is not None:
        return
    modules = dict(model.named_modules())
    if all(isinstance(modules.get(layer.name), nn.Conv2d) for layer in done.converted):
        rebuild(model, done.recipe())


def prepare(model: nn.Module, source: nn.Module, verbose: bool = True) -> nn.Module | None:
    """Return a network with `source`'s weights converted for `model`; None if nothing needs converting.

    Weights of a timm network go to its `TimmBackbone`, with any names that a checkpoint of that network may have. Where
    `model` has a dynamic convolution and `source` a dense one, the kernel is split among the experts so that they
    compute the same. A bare `DynamicConv` has neither normalisation nor activation: it gets the kernel with the
    normalisation's scale folded in, which is an initialisation but not the same function.

    Raises:
        parameternet.weights.WeightsError: nothing of `source` fits the backbone of `model`.
    """
    own = source.float().state_dict()
    place, state = _under_backbone(own, model)
    changed = upcycle_state_dict(_with_bare_kernels(state, model), model, neutral=True)
    match_routers(model, changed)  # Ultralytics drops tensors of another shape
    if isinstance(source, Weights) or any(isinstance(m, DynamicConv | TimmBackbone) for m in model.modules()):
        _check_backbone(changed, model, source, place)
    if changed.keys() == own.keys():
        return None
    if verbose:
        _tell(changed, state, model)
    return _with(source, changed)


def _check_backbone(state: dict[str, Tensor], model: nn.Module, source: nn.Module, place: str | None) -> None:
    """Raise unless a classifier's tensors cover the network at `place`, or if nothing matches the backbone."""
    rows = len((getattr(model, "yaml", None) or {}).get("backbone", ()))
    places = (f"{place}.",) if place else tuple(f"model.{row}." for row in range(rows))
    mine = {n: v for n, v in model.state_dict().items() if n.startswith(places) and v.is_floating_point()}
    fits = [name for name, value in mine.items() if name in state and state[name].shape == value.shape]
    if not mine or (fits and not place) or len(fits) == len(mine):
        return
    backbone = next((m.spec["name"] for m in model.modules() if isinstance(m, TimmBackbone)), None)
    where = getattr(source, "pt_path", None) or f"this {type(source).__name__}"
    network = Path(str(model.yaml.get("yaml_file", "the network"))).name
    cure = f"Load weights of {backbone}" if backbone else "Load a checkpoint of the same network or its static baseline"
    raise weights.WeightsError(
        f"{where} does not fit {network}, so nothing was loaded: {_misfits(state, mine)}. {cure}, or "
        "build the detector on the network of these weights: YOLO('yolov8n-<its name in timm>.yaml')"
    )


def _misfits(state: dict[str, Tensor], mine: dict[str, Tensor]) -> str:
    """Describe mismatched shapes and names, with examples."""
    parts = []
    reshaped = [name for name in mine if name in state and state[name].shape != mine[name].shape]
    if reshaped:
        there, here = (tuple(tensors[reshaped[0]].shape) for tensors in (state, mine))
        parts.append(f"have other shapes: {len(reshaped)}, such as {reshaped[0]}, {there} there and {here} here")
    missing = [name for name in mine if name not in state]
    if missing:
        given = sorted(name for name, value in state.items() if value.is_floating_point())
        parts.append(f"are missing: {len(missing)}, such as {missing[0]}; there are {', '.join(given[:2])}, ...")
    return f"of the backbone's {len(mine)} tensors, {' and '.join(parts)}"


def _with(source: nn.Module, tensors: dict[str, Tensor]) -> nn.Module:
    """Return `source` with another state dict; Ultralytics also reads its head and names."""
    view = copy(source)
    view.state_dict = lambda: tensors
    return view


def _dynamic(model: nn.Module) -> list[tuple[str, DynamicConv]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, DynamicConv)]


def _under_backbone(state: dict[str, Tensor], model: nn.Module) -> tuple[str | None, dict[str, Tensor]]:
    """Rename a classifier's tensors to their names in the `TimmBackbone` of `model`, and find its place.

    Returns:
        (place, tensors), or (None, `state`) if no name occurs in the backbone.
    """
    for place, module in model.named_modules():
        if isinstance(module, TimmBackbone) and not any(name.startswith(f"{place}.net.") for name in state):
            own = {_plain(name): name for name in _with_temperatures(module.net.state_dict())}
            given = {_plain(name): value for name, value in _as_checkpoint(state, module).items()}
            found = {f"{place}.net.{own[name]}": value for name, value in given.items() if name in own}
            if any(value.is_floating_point() for value in found.values()):
                return f"{place}.net", found
    return None, state


def _with_temperatures(names: Iterable[str]) -> list[str]:
    """Add the buffer that sigmoid routers get when they are switched to softmax."""
    routers = [name.removesuffix("weight") for name in names if name.endswith("routing.weight")]
    return [*names, *(f"{router}temperature" for router in routers)]


def _as_checkpoint(state: dict[str, Tensor], backbone: TimmBackbone) -> dict[str, Tensor]:
    """Apply timm's checkpoint filters for the backbone's network: names of other releases, and input channels."""
    name, options = backbone.spec["name"], {**backbone.spec}
    options = {key: value for key, value in options.items() if key not in ("name", "pretrained", "out_indices")}
    options = features_of(name, backbone.c1, options).options
    with torch.device("meta"):
        network = timm.create_model(name, in_chans=backbone.c1, **options)
    try:
        state = dynamic_timm.filtered(state, network, name)
    except (KeyError, RuntimeError, ValueError):  # of another network; the check of names and shapes reports it
        return state
    stems = network.pretrained_cfg.get("first_conv") or ()
    stems = [f"{stem}.weight" for stem in ([stems] if isinstance(stems, str) else stems)]
    wide = {n: state[n] for n in stems if n in state and state[n].ndim == 4 and state[n].shape[1] == 3 != backbone.c1}
    return state | {n: adapt_input_conv(backbone.c1, value) for n, value in wide.items()}


def _plain(name: str) -> str:
    # With features as a list, a timm network has `blocks_0.` instead of `blocks.0.`.
    return name.replace("_", ".")


def _with_bare_kernels(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Rename kernels of `Conv` to the bare layers that replace them."""
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
