"""timm's builder, with checkpoints that are verified before they reach a network."""

from collections.abc import Callable, Mapping
from typing import Any

import timm
from timm.models import build_model_with_cfg
from timm.models._builder import resolve_pretrained_cfg
from torch import nn

from .. import weights

__all__ = ["build_from_config", "build_model"]


def build_model(model_cls: Callable[..., nn.Module], variant: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    """`timm.models.build_model_with_cfg`, except that `pretrained=True` reads through `parameternet.weights`.

    timm reads whatever file it finds; here the content is held against its recorded digest first, and handed to
    timm's own loading (filter, other input channels, other classes, strictness) as a state dict.
    """
    if not pretrained:
        return build_model_with_cfg(model_cls, variant, pretrained, **kwargs)
    overlay = kwargs.pop("pretrained_cfg_overlay", None) or {}
    cfg = resolve_pretrained_cfg(variant, pretrained_cfg=kwargs.get("pretrained_cfg"), pretrained_cfg_overlay=overlay)
    if not overlay.get("state_dict"):
        state_dict = weights.resolve(cfg.to_dict(), kwargs.get("cache_dir"))
        overlay = {**overlay, "source": "", "state_dict": state_dict}
    model = build_model_with_cfg(model_cls, variant, pretrained, pretrained_cfg_overlay=overlay, **kwargs)
    for module in model.modules():
        _forget_tensors(module, cfg.source)
    return model


def build_from_config(config: Mapping[str, Any], **source: Any) -> nn.Module:
    """The network that a config in timm's Hub layout describes, with its weights.

    Args:
        config: `architecture`, `pretrained_cfg` and, where they matter, `model_args`, `num_classes`, `label_names` and
            `label_descriptions`; the latter three end in the network's `pretrained_cfg`.
        source: Where the weights are, as `weights.resolve` reads it: `state_dict=` verified tensors, `file=`,
            `source=` and `hf_hub_id=`, or `tag=`.
    """
    kept = {key: config[key] for key in ("num_classes", "label_names", "label_descriptions") if config.get(key)}
    cfg = {**config["pretrained_cfg"], **kept, **source, "architecture": config["architecture"]}
    # An architecture's own default may differ from the checkpoint's classes.
    arguments = {"num_classes": cfg["num_classes"], **(config.get("model_args") or {})}
    model = timm.create_model(config["architecture"], pretrained=True, pretrained_cfg=cfg, **arguments)
    _forget_tensors(model, cfg.get("source"))
    return model


def _forget_tensors(module: nn.Module, source: str | None) -> None:
    """The configuration outlives the loading; the tensors in it need not. The source says where they came from."""
    if (getattr(module, "pretrained_cfg", None) or {}).get("state_dict"):
        kept = {**module.pretrained_cfg, "state_dict": None, "source": source}
        module.pretrained_cfg = module.default_cfg = {name: v for name, v in kept.items() if v is not None}
