"""timm's builder, with checkpoints that are verified before they reach a network."""

import inspect
import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import timm
from timm.models import build_model_with_cfg
from timm.models._builder import resolve_pretrained_cfg
from timm.models._hub import save_config_for_hf
from torch import nn

from .. import weights

__all__ = ["build_from_config", "build_model", "hub_layout", "model_arguments"]

# What timm takes beside a network's own arguments: where weights come from and how they are loaded. A config that came
# with weights must not say so, or a file that nobody verified would take their place.
LOADING = {
    name
    for function in (timm.create_model, build_model_with_cfg)
    for name, parameter in inspect.signature(function).parameters.items()
    if parameter.kind is not inspect.Parameter.VAR_KEYWORD
}


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
    model = timm.create_model(
        config["architecture"],
        pretrained=True,
        pretrained_cfg=cfg,
        **model_arguments({**config, "pretrained_cfg": cfg}),
    )
    _forget_tensors(model, cfg.get("source"))
    return model


def model_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """The number of classes and the `model_args` of a config in timm's Hub layout: what its network is built with.

    Raises:
        WeightsDamaged: the config would have timm load something, as `checkpoint_path` does.
    """
    arguments = dict(config.get("model_args") or {})
    foreign = sorted(LOADING & set(arguments))
    if foreign:
        raise weights.WeightsDamaged(
            f"config.json asks for {', '.join(foreign)} in model_args, which are not arguments of a network: its "
            "weights come from the file beside it and from nowhere else. Remove them from config.json"
        )
    # An architecture's own default may differ from the checkpoint's classes.
    classes = config.get("num_classes", config["pretrained_cfg"].get("num_classes", 1000))
    return {"num_classes": classes, **arguments}


def hub_layout(model: nn.Module, model_args: Mapping[str, Any], **config: Any) -> dict[str, Any]:
    """The config.json of a network's weights, in timm's Hub layout, which transformers reads too.

    Args:
        model: The network; its classes and features are recorded.
        model_args: What the network is built with besides.
        config: Further keys, and those that are to differ: `pretrained_cfg`, `architecture`, `label_names`.
    """
    with tempfile.TemporaryDirectory() as private:
        path = Path(private) / weights.CONFIG_NAME
        save_config_for_hf(model, path, model_config=config, model_args=dict(model_args))
        written = json.loads(path.read_text("utf-8"))
    # Older releases of timm take the architecture from the network, whatever they are told.
    written |= {"architecture": config.get("architecture", written["architecture"])}
    # transformers, and timm unless told, prepare images for the size of training: here it is that of the evaluation.
    cfg = written["pretrained_cfg"]
    for name in ("input_size", "crop_pct"):
        cfg[name] = cfg.pop(f"test_{name}", None) or cfg.get(name)
    # transformers passes the number of classes itself, and computes in the dtype of the file unless it is told one.
    written["model_args"] = {n: v for n, v in written.get("model_args", {}).items() if n != "num_classes"}
    return {**written, "torch_dtype": str(next(model.parameters()).dtype).removeprefix("torch.")}


def _forget_tensors(module: nn.Module, source: str | None) -> None:
    """The configuration outlives the loading; the tensors in it need not. The source says where they came from."""
    if (getattr(module, "pretrained_cfg", None) or {}).get("state_dict"):
        kept = {**module.pretrained_cfg, "state_dict": None, "source": source}
        module.pretrained_cfg = module.default_cfg = {name: v for name, v in kept.items() if v is not None}
