"""Describe models as plain data, for `parameternet list` and `parameternet info`.

Networks are built on the meta device, so no weights are loaded.
"""

import difflib
import fnmatch
import inspect
from collections import Counter
from pathlib import Path
from typing import Any

import timm
from torch import nn

from .. import weights
from ..flops import count_flops
from ..layers import DynamicConv, Router
from . import catalogue, loading
from .builder import build_on_meta
from .loading import Source, parse_source

__all__ = ["describe", "find_names", "registered", "summarise"]


def find_names(pattern: str = "*") -> list[str]:
    """Return every checkpoint, and every architecture without one, whose name matches or contains `pattern`.

    Raises:
        UnknownWeights: No name matches; the message has the closest names.
    """
    wanted = pattern if any(sign in pattern for sign in "*?[") else f"*{pattern}*"
    known = catalogue.checkpoints()
    names: list[str] = []
    for architecture in catalogue.architectures():
        names += [name for name in known if name.partition(".")[0] == architecture] or [architecture]
    return fnmatch.filter(names, wanted) or [registered(pattern)]


def registered(name: str) -> str:
    """Return `name` if it is an architecture or checkpoint of this package.

    Raises:
        UnknownWeights: It is not; the message has the closest names.
    """
    everything = [*catalogue.architectures(), *catalogue.checkpoints()]
    if name in everything:
        return name
    near = difflib.get_close_matches(name, everything, n=3, cutoff=0.5)
    hint = f"; closest: {', '.join(near)}" if near else ""
    raise weights.UnknownWeights(f"no network {name!r}{hint}. `parameternet list` shows all names")


def summarise(name: str) -> dict[str, Any]:
    """Return name, tag, parameters, macs, input_size, top1 and location of the weights for a name from `find_names`."""
    source = parse_source(name) if name in catalogue.checkpoints() else Source(name, "architecture", name)
    config = _config(source)
    model, size = build_on_meta(config), _input_size(config)
    return {
        "name": name.partition(".")[0],
        "tag": name.partition(".")[2] or None,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "macs": count_flops(model, size).total,
        "input_size": size,
        "top1": _top1(config),
        "weights": _location(source),
    }


def describe(text: str) -> dict[str, Any]:
    """Return the description, stages, experts, and breakdown of parameters and multiply-adds of a model.

    Args:
        text: As for `loading.parse_source`; an architecture alone is described as registered, without a checkpoint.

    Raises:
        UnknownWeights, WeightsNotFound, WeightsDamaged: As for `loading.load`.
    """
    source = _source(text)
    config = _config(source)
    model, size = build_on_meta(config), _input_size(config)
    flops = count_flops(model, size)
    return {
        "name": text,
        "description": inspect.getdoc(timm.model_entrypoint(config["architecture"].partition(".")[0])) or "",
        "input_size": size,
        "num_classes": model.num_classes,
        "num_features": model.num_features,
        "head_hidden_size": model.head_hidden_size,
        "top1": _top1(config),
        "weights": _location(source),
        "stages": _stages(model, size),
        "experts": _experts(model),
        "parameters": _parameters(model),
        "macs": flops.as_dict(),
        "not_counted": dict(flops.not_counted),
    }


def _source(text: str) -> Source:
    if text in catalogue.architectures():
        return Source(text, "architecture", text)
    try:
        return parse_source(text)
    except weights.UnknownWeights:
        registered(text)  # raises with the closest names
        raise


def _config(source: Source) -> dict[str, Any]:
    """Return the config of a model; for a recorded checkpoint that is not on this machine, the registry's."""
    if source.kind == "architecture" or source.name in weights.known():
        path = weights.local(source.name) if source.name in weights.known() else None
        config = path.with_name(weights.CONFIG_NAME) if path else None
        return weights.read_config(config) if config and config.is_file() else _from_registry(source.name)
    return loading.read_config(source)


def _from_registry(name: str) -> dict[str, Any]:
    architecture = name.partition(".")[0]
    cfg = timm.get_pretrained_cfg(name if name in timm.list_pretrained(architecture) else architecture)
    return {"architecture": architecture, "pretrained_cfg": cfg.to_dict() if cfg else {}}


def _input_size(config: dict[str, Any]) -> tuple[int, int, int]:
    cfg = config["pretrained_cfg"]
    return tuple(cfg.get("test_input_size") or cfg.get("input_size") or (3, 224, 224))


def _top1(config: dict[str, Any]) -> float | None:
    return (config.get("results") or {}).get("top1")


def _location(source: Source) -> str | None:
    """Return the location of the weights: a path, a package or the Hub; None if there are none."""
    name = source.name
    if source.kind == "file":
        return _relative(source.path)
    if source.kind == "hub":
        return f"Hub: {name}"
    if source.kind == "dense":
        return f"Hub: {timm.get_pretrained_cfg(name).hf_hub_id}"
    if name in catalogue.upcycled():
        repository = catalogue.config(name)["upcycled_from"]
        package = weights.PACKAGED[repository].module if weights.packaged(repository) else None
        return f"package {package}" if package else f"Hub: {repository}"
    if name not in weights.known():
        return None
    path = weights.local(name)
    return _relative(path) if path else f"Hub: {weights.hub()}/{name}"


def _relative(path: Path) -> str:
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def _stages(model: nn.Module, size: tuple[int, int, int]) -> list[dict[str, Any]]:
    """Return the feature maps of `features_only`, one row per resolution."""
    return [
        {
            "module": tap["module"],
            "reduction": tap["reduction"],
            "channels": tap["num_chs"],
            "height": -(-size[1] // tap["reduction"]),
            "width": -(-size[2] // tap["reduction"]),
        }
        for tap in model.feature_info
    ]


def _experts(model: nn.Module) -> dict[str, Any]:
    convolutions = [module for module in model.modules() if isinstance(module, DynamicConv)]
    routers = [module for module in model.modules() if isinstance(module, Router)]
    return {
        "dynamic_convolutions": len(convolutions),
        "routers": len(routers),
        "num_experts": sorted({convolution.num_experts for convolution in convolutions}),
        "routing": sorted({router.activation for router in routers}),
    }


def _parameters(model: nn.Module) -> dict[str, int]:
    """Return parameters by kind of module; they add up to `total`."""
    split = Counter(dict.fromkeys(("expert kernels", "routers", "static convolutions", "normalisation", "linear"), 0))
    routed = {id(p) for module in model.modules() if isinstance(module, Router) for p in module.parameters()}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            split["routers" if id(parameter) in routed else _kind(module)] += parameter.numel()
    return {**split, "total": sum(split.values())}


def _kind(module: nn.Module) -> str:
    if isinstance(module, DynamicConv):
        return "expert kernels"
    if isinstance(module, nn.Conv2d):
        return "static convolutions"
    if isinstance(module, nn.Linear):
        return "linear"
    return "normalisation" if "Norm" in type(module).__name__ else "other"
