"""`parameternet info`: one network, taken apart."""

import inspect
from collections import Counter
from typing import Any

import click
import timm
from torch import nn

from parameternet import DynamicConv, Router, weights
from parameternet.cli import _networks
from parameternet.cli._output import count, echo, print_json, print_table
from parameternet.flops import count_flops
from parameternet.models import catalogue
from parameternet.models._builder import build_on_meta
from parameternet.models.loading import Source, parse_source


@click.command()
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def info(name: str, as_json: bool) -> None:
    """Stages, features, experts of NAME, and where its parameters and MACs are.

    NAME is an architecture (parameternet_150m), a checkpoint (parameternet_50m.tin200), a folder or run folder, a
    .safetensors file, local-dir:DIR, hf-hub:ORG/NAME, or a network of timm.
    """
    facts = describe(name)
    print_json(facts) if as_json else _show(facts)


def describe(name: str) -> dict[str, Any]:
    """Everything that the command says, as plain data."""
    source = _source(name)
    config = _networks.config(source)
    model, size = build_on_meta(config), _networks.input_size(config)
    flops = count_flops(model, size)
    return {
        "name": name,
        "description": inspect.getdoc(timm.model_entrypoint(config["architecture"].partition(".")[0])) or "",
        "input_size": size,
        "num_classes": model.num_classes,
        "num_features": model.num_features,
        "head_hidden_size": model.head_hidden_size,
        "top1": _networks.top1(config),
        "weights": _networks.whereabouts(source),
        "stages": stages(model, size),
        "experts": experts(model),
        "parameters": parameters(model),
        "macs": flops.as_dict(),
        "not_counted": dict(flops.not_counted),
    }


def _source(name: str) -> Source:
    """What `name` names. An architecture alone is described as the registry has it, without a checkpoint's classes."""
    if name in catalogue.architectures():
        return Source(name, "architecture", name)
    try:
        return parse_source(name)
    except weights.UnknownWeights:
        _networks.resolve(name)  # says which networks are near
        raise


def stages(model: nn.Module, size: tuple[int, int, int]) -> list[dict[str, Any]]:
    """What `features_only` gives, one row a resolution."""
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


def experts(model: nn.Module) -> dict[str, Any]:
    """Dynamic convolutions, the experts that each one mixes, and how they are routed."""
    convolutions = [module for module in model.modules() if isinstance(module, DynamicConv)]
    routers = [module for module in model.modules() if isinstance(module, Router)]
    return {
        "dynamic_convolutions": len(convolutions),
        "routers": len(routers),
        "num_experts": sorted({convolution.num_experts for convolution in convolutions}),
        "routing": sorted({"softmax" if router.softmax else "sigmoid" for router in routers}),
    }


def parameters(model: nn.Module) -> dict[str, int]:
    """Parameters by what they belong to; they add up to `total`."""
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


def _show(facts: dict[str, Any]) -> None:
    channels, height, width = facts["input_size"]
    mixed = facts["experts"]
    echo(f"{facts['name']}: {facts['description']}\n")
    rows = [
        ("input", f"{channels} x {height} x {width}"),
        ("classes", str(facts["num_classes"])),
        ("features", f"{facts['num_features']} in the last map, {facts['head_hidden_size']} before the classifier"),
        ("dynamic", _experts_in_words(mixed)),
        ("top-1", "-" if facts["top1"] is None else f"{facts['top1']:.2f} %"),
        ("weights", facts["weights"] or "none"),
    ]
    echo("\n".join(f"{key:10}{value}" for key, value in rows) + "\n")
    print_table(
        ("stage", "module", "stride", "resolution", "channels"),
        [
            (str(i), s["module"], str(s["reduction"]), f"{s['height']} x {s['width']}", str(s["channels"]))
            for i, s in enumerate(facts["stages"])
        ],
        right=("stage", "stride", "resolution", "channels"),
    )
    echo()
    _show_split("parameters", facts["parameters"])
    echo()
    _show_split("MACs an image", facts["macs"])
    echo(f"\nnot counted: {', '.join(f'{kind} x {calls}' for kind, calls in facts['not_counted'].items())}")


def _experts_in_words(mixed: dict[str, Any]) -> str:
    if not mixed["dynamic_convolutions"]:
        return "no dynamic convolutions"
    numbers = ", ".join(map(str, mixed["num_experts"]))
    return f"{mixed['dynamic_convolutions']} convolutions of {numbers} experts, {'/'.join(mixed['routing'])} routing"


def _show_split(title: str, split: dict[str, int]) -> None:
    total = split["total"] or 1
    rows = [(kind, count(number), f"{number / total:.1%}") for kind, number in split.items() if number]
    print_table((title, "number", "share"), rows, right=("number", "share"))
