"""timm's networks with dynamic convolutions in the same places as in the released ParameterNet.

timm builds the network, which is then upcycled: pointwise and depthwise convolutions of the body become dynamic; stem,
head and squeeze-and-excitation stay dense. The upcycled network has the same outputs as the dense one, so the
`in1k_upcycled` tags load timm's dense checkpoints and keep their accuracy.
"""

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import timm
import torch
from timm.data import ImageNetInfo
from timm.models import generate_default_cfgs, ghostnet, register_model
from torch import Tensor, nn

from ..layers import DynamicConv
from ..surgery.dilate import dilate
from ..surgery.upcycle import rebuild, upcycle, upcycle_state_dict
from .builder import build_model

__all__ = ["SOURCES", "Source", "by_order", "dynamic_timm", "filtered", "labels", "renamed"]


@dataclass(frozen=True)
class Source:
    """The dense network behind a dynamic one.

    name: timm's network. exclude: Layers to keep dense in addition to `upcycle`'s own rules. prepare: Changes timm's
    network before it is upcycled. top1, top5: ImageNet-1k accuracy in percent of timm's dense checkpoint at its test
    size, as measured by timm (its results/results-imagenet.csv, August 2026).
    """

    name: str
    exclude: tuple[str, ...] = ()
    prepare: Callable[[nn.Module], nn.Module] | None = None
    top1: float | None = None
    top5: float | None = None

    @property
    def entrypoint(self) -> Callable[..., nn.Module]:
        return timm.model_entrypoint(self.name.partition(".")[0])


def switch_to_deploy(model: nn.Module) -> nn.Module:
    """Merge the parallel branches of GhostNetV3 in place; timm's own `convert_to_deploy` does nothing.

    The result is the paper's network: three branches with their own experts would take three times the memory for
    kernels that add up to one.
    """
    for module in list(model.modules()):
        if hasattr(module, "switch_to_deploy"):
            with next(module.parameters()).device:  # it creates layers on the default device
                module.switch_to_deploy()
            _become_plain(module)
    return model.requires_grad_()  # it detaches the parameters that it keeps


def _become_plain(module: nn.Module) -> None:
    """Turn a merged GhostNetV3 block into one of an earlier version, which TorchScript supports."""
    if isinstance(module, ghostnet.GhostModuleV3):
        gated = module.mode == "shortcut"
        module.__class__ = ghostnet.GhostModuleV2 if gated else ghostnet.GhostModule
    else:
        module.__class__ = ghostnet.GhostBottleneck
        if module.stride == 1:
            module.conv_dw = module.bn_dw = None


# The attention of GhostNetV2 and V3 is a gate like squeeze-and-excitation, so it stays dense too.
GATE = ("*.short_conv.*",)

SOURCES = {
    "dynamic_ghostnet_050": Source("ghostnet_050"),
    "dynamic_ghostnet_100": Source("ghostnet_100", top1=73.958, top5=91.542),
    "dynamic_ghostnet_130": Source("ghostnet_130"),
    "dynamic_ghostnetv2_100": Source("ghostnetv2_100", GATE, top1=75.186, top5=92.334),
    "dynamic_ghostnetv2_130": Source("ghostnetv2_130", GATE, top1=76.746, top5=93.364),
    "dynamic_ghostnetv2_160": Source("ghostnetv2_160", GATE, top1=77.836, top5=93.948),
    "dynamic_ghostnetv3_050": Source("ghostnetv3_050", GATE, switch_to_deploy),
    "dynamic_ghostnetv3_100": Source("ghostnetv3_100", GATE, switch_to_deploy, top1=76.936, top5=93.124),
    "dynamic_ghostnetv3_130": Source("ghostnetv3_130", GATE, switch_to_deploy),
    "dynamic_ghostnetv3_160": Source("ghostnetv3_160", GATE, switch_to_deploy),
    "dynamic_efficientnetv2_b0": Source("tf_efficientnetv2_b0", top1=78.386, top5=94.034),
    "dynamic_efficientnet_lite0": Source("tf_efficientnet_lite0", top1=74.846, top5=92.180),
    "dynamic_efficientnet_lite1": Source("tf_efficientnet_lite1", top1=76.674, top5=93.232),
    "dynamic_efficientnet_lite2": Source("tf_efficientnet_lite2", top1=77.470, top5=93.756),
    "dynamic_mobilenetv3_large_100": Source("mobilenetv3_large_100", top1=75.784, top5=92.528),
}


class Experts(NamedTuple):
    """Arguments of every network here in addition to timm's; `recipe` is the `Upcycling.recipe` of another network."""

    dynamic: bool = True
    num_experts: int = 4
    routing: str = "softmax"
    routing_hidden: int | None = None
    routing_norm: str | None = "layer"
    recipe: dict[str, Any] | None = None


def _build(source: Source, experts: Experts, **kwargs: Any) -> nn.Module:
    """Build timm's network and upcycle it."""
    model = _dense(source, **kwargs)
    if not experts.dynamic:
        return model
    if source.prepare:
        model = source.prepare(model)
    if experts.recipe:
        return rebuild(model, experts.recipe)
    return upcycle(
        model,
        experts.num_experts,
        exclude=source.exclude,
        kinds=("pointwise", "depthwise"),
        routing=experts.routing,
        routing_hidden=experts.routing_hidden,
        routing_norm=experts.routing_norm,
        share_routers=False,  # like the released network: a router for each convolution
        inplace=True,
    )


def _dense(source: Source, output_stride: int = 32, **kwargs: Any) -> nn.Module:
    """Build timm's network, dilated by timm if it supports that, otherwise by `dilate`."""
    if output_stride == 32:
        return source.entrypoint(**kwargs)
    try:
        return source.entrypoint(output_stride=output_stride, **kwargs)
    except (TypeError, AssertionError, NotImplementedError, ValueError):  # networks raise different errors
        return dilate(source.entrypoint(**kwargs), output_stride)


def _create(variant: str, source: Source, pretrained: bool, feature_cfg: dict[str, Any], **kwargs: Any) -> nn.Module:
    given = {name: kwargs.pop(name) for name in Experts._fields if name in kwargs}
    experts = Experts(**given)

    def build(**own: Any) -> nn.Module:
        return _build(source, experts, **own)

    def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        return _as_dynamic(state_dict, model, source)

    return build_model(
        build,
        variant,
        pretrained,
        given,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=feature_cfg,
        **kwargs,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints: timm's dense ones, those of other packages, and our own
# ---------------------------------------------------------------------------------------------------------------------


def _as_dynamic(state_dict: dict[str, Tensor], model: nn.Module, source: Source) -> dict[str, Tensor]:
    """Convert a state dict of the dense or the dynamic network for the dynamic `model`."""
    state_dict = renamed(state_dict, model, source)
    return state_dict if _is_dynamic(state_dict) else upcycle_state_dict(state_dict, model)


def renamed(state_dict: dict[str, Tensor], model: nn.Module, source: Source) -> dict[str, Tensor]:
    """Rename a state dict of the dense or the dynamic network to the names of `model`; dense kernels stay dense."""
    state_dict = by_order(state_dict, source.name)
    if _is_dynamic(state_dict):
        return state_dict
    of_timm = getattr(sys.modules[source.entrypoint.__module__], "checkpoint_filter_fn", None)
    if of_timm:
        state_dict = of_timm(state_dict, model)
    dynamic = any(isinstance(module, DynamicConv) for module in model.modules())
    if dynamic and source.prepare and not set(state_dict) <= set(model.state_dict()):
        state_dict = _prepared(state_dict, source)
    return state_dict


def filtered(state_dict: dict[str, Tensor], model: nn.Module, architecture: str | None) -> dict[str, Tensor]:
    """Rename a state dict of any release of a network, or of its dense source; see `renamed`.

    Args:
        model: The network, or the timm network inside it.
        architecture: Its registered name, if it has one.
    """
    name = (architecture or "").partition(".")[0]
    if name in SOURCES:
        return renamed(state_dict, model, SOURCES[name])
    module = timm.model_entrypoint(name).__module__ if timm.is_model(name) else type(model).__module__
    prepare = getattr(sys.modules[module], "checkpoint_filter_fn", None)
    return prepare(dict(state_dict), model) if prepare else dict(state_dict)


def _is_dynamic(state_dict: dict[str, Tensor]) -> bool:
    return any(".routing." in name for name in state_dict)


def by_order(state_dict: dict[str, Tensor], architecture: str) -> dict[str, Tensor]:
    """Rename the tensors in the Lite networks' packages to timm's names; their order is the same."""
    if "_conv_stem.weight" not in state_dict:
        return state_dict
    with torch.device("meta"):
        names = timm.model_entrypoint(architecture)().state_dict()
    return dict(zip(names, state_dict.values(), strict=True))


@torch.no_grad()
def _prepared(state_dict: dict[str, Tensor], source: Source) -> dict[str, Tensor]:
    """Return the dense network's tensors after `source.prepare`."""
    classifier = state_dict["classifier.weight"]
    with torch.device("cpu"):
        dense = source.entrypoint(num_classes=len(classifier))
    dense.load_state_dict(state_dict)
    return source.prepare(dense).state_dict()


# ---------------------------------------------------------------------------------------------------------------------
# timm's registry
# ---------------------------------------------------------------------------------------------------------------------


def _cfg(source: Source) -> dict[str, Any]:
    """Return timm's own config of a source: the Hub location of its dense weights, and its preprocessing."""
    return asdict(replace(timm.get_pretrained_cfg(source.name), architecture=None, tag=None, url=""))


def _default_cfgs() -> dict[str, dict[str, Any]]:
    found = {name: _cfg(source) for name, source in SOURCES.items()}
    tagged = {f"{n}.{'in1k_upcycled' if cfg['hf_hub_id'] else 'untrained'}": cfg for n, cfg in found.items()}
    return {**tagged, "dynamic_timm.upcycled": _cfg(Source("resnet18"))}


default_cfgs = generate_default_cfgs(_default_cfgs())


def labels() -> dict[str, Any]:
    """Return `label_names` and `label_descriptions` of ImageNet-1k, as in configs of timm's Hub layout."""
    info = ImageNetInfo("imagenet-1k")
    names = info.label_names()
    return {"label_names": names, "label_descriptions": {name: info.label_name_to_description(name) for name in names}}


def _entrypoint(name: str, source: Source) -> Callable[..., nn.Module]:
    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return _create(name, source, pretrained, {"flatten_sequential": True}, **kwargs)

    create.__name__ = create.__qualname__ = name
    create.__module__ = __name__
    create.__doc__ = (
        f"timm's {source.name} with dynamic convolutions: `num_experts`, `routing`, `routing_hidden`, `routing_norm`."
    )
    return create


for _name, _source in SOURCES.items():
    globals()[_name] = register_model(_entrypoint(_name, _source))
    __all__.append(_name)


@register_model
def dynamic_timm(pretrained: bool = False, source: str = "resnet18", **kwargs: Any) -> nn.Module:
    """Build any timm network, `source` (with or without a tag), with dynamic convolutions.

    `pretrained=True` reads the source's dense weights; `recipe` selects the layers, see `Upcycling.recipe`.
    """
    if not kwargs.get("pretrained_cfg"):
        kwargs["pretrained_cfg"] = {**_cfg(Source(source)), "architecture": "dynamic_timm", "tag": "upcycled"}
    # The only kind of feature extraction that all timm networks support.
    return _create("dynamic_timm", Source(source), pretrained, {"feature_cls": "getter"}, **kwargs)
