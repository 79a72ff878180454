"""timm's model builder, with verified checkpoints and checked configs."""

import dataclasses
import inspect
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import PretrainedCfg, build_model_with_cfg
from timm.models._builder import resolve_pretrained_cfg
from timm.models._hub import save_config_for_hf
from torch import nn

from .. import weights
from ..layers import Router
from ..text import printable, without_local_paths

__all__ = [
    "build_from_config",
    "build_model",
    "build_on_meta",
    "buildable",
    "check_routers",
    "forget_tensors",
    "hub_layout",
    "model_arguments",
    "public_config",
    "router_arguments",
]

# Arguments of timm that control where weights come from and how they are loaded. A config that came with weights must
# not set them, or unverified files could replace the verified ones.
LOADING = {
    name
    for function in (timm.create_model, build_model_with_cfg)
    for name, parameter in inspect.signature(function).parameters.items()
    if parameter.kind is not inspect.Parameter.VAR_KEYWORD
} | {"features_only", "out_indices", "feature_cls"}
# Keys of pretrained_cfg that locate weights; a config that came with weights must not set them either.
PLACES = {"url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source", "custom_load"}
DESCRIBING = {field.name for field in dataclasses.fields(PretrainedCfg)} - PLACES


def build_model(
    model_cls: Callable[..., nn.Module],
    variant: str,
    pretrained: bool,
    given: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Call `timm.models.build_model_with_cfg`, but read weights for `pretrained=True` through `parameternet.weights`.

    The verified tensors go through timm's own loading (filter, input channels, classes, strictness) as a state dict.

    Args:
        given: The caller's arguments, where `kwargs` also has defaults. Default: `kwargs`.

    Raises:
        ValueError: `given` asks for other routers than the weights have.
    """
    if not pretrained:
        return build_model_with_cfg(model_cls, variant, pretrained, **kwargs)
    overlay = kwargs.pop("pretrained_cfg_overlay", None) or {}
    cfg = resolve_pretrained_cfg(variant, pretrained_cfg=kwargs.get("pretrained_cfg"), pretrained_cfg_overlay=overlay)
    if cfg.source == "local-dir" and cfg.file:
        model_arguments(weights.config(f"local-dir:{cfg.file}"))  # timm reads it without checks
    elif cfg.source == "hf-hub" and cfg.hf_hub_id:
        model_arguments(weights.config(f"hf-hub:{cfg.hf_hub_id}", kwargs.get("cache_dir")))
    if cfg.source in ("local-dir", "hf-hub"):
        cleared = {"url": "", "state_dict": None, "hf_hub_filename": None, "custom_load": False}
        cfg, overlay = dataclasses.replace(cfg, **cleared), {**cleared, **overlay}
    state_dict = overlay.get("state_dict") or weights.resolve(cfg.to_dict(), kwargs.get("cache_dir"))
    overlay = {**overlay, "source": "", "state_dict": state_dict}
    model = build_model_with_cfg(model_cls, variant, pretrained, pretrained_cfg_overlay=overlay, **kwargs)
    for module in model.modules():
        forget_tensors(module, cfg.source)
    check_routers(model, kwargs if given is None else given, variant)
    return model


def check_routers(model: nn.Module, given: Mapping[str, Any], weights_of: str) -> None:
    """Check that a network with loaded weights, to which its routers adapt, has the routers that the caller asked for.

    Args:
        given: The caller's arguments of the network, of which `routing`, `routing_norm` and `temperature` count.
        weights_of: What the weights are called in the error.

    Raises:
        ValueError: The weights have other routers.
    """
    kinds = _kinds(model)
    for name, found in kinds.items():
        if given.get(name) is not None and found and found != [given[name]]:
            raise ValueError(
                f"{name}={given[name]!r} was asked for, but the routers of {weights_of} have {name}={found[0]!r}: "
                f"leave {name} out to get them, or start from random weights"
            )
    if given.get("temperature") not in (None, 1) and kinds["routing"] == ["sigmoid"]:
        raise ValueError(
            f"temperature={given['temperature']!r} was asked for, but the routers of {weights_of} are sigmoid routers, "
            "which have no temperature: leave it out"
        )


def build_from_config(config: Mapping[str, Any], **source: Any) -> nn.Module:
    """Build the network described by a config in timm's Hub layout, and load its weights.

    Args:
        config: `architecture`, `pretrained_cfg` and optionally `model_args`, `num_classes`, `label_names` and
            `label_descriptions`; the last three are copied to the network's `pretrained_cfg`. Locations of weights in
            it are ignored.
        source: Location of the weights, as for `weights.resolve`: `state_dict=` verified tensors, `file=`, `source=`
            and `hf_hub_id=`, or `tag=`.

    Raises:
        WeightsDamaged: the config's network is not registered, or the config sets arguments that are not a network's.
    """
    architecture = config["architecture"]
    kept = {key: config[key] for key in ("num_classes", "label_names", "label_descriptions") if config.get(key)}
    described = {key: value for key, value in config["pretrained_cfg"].items() if key in DESCRIBING}
    cfg = {**described, **kept, **source, "architecture": architecture}
    model = timm.create_model(
        architecture,
        pretrained=True,
        pretrained_cfg=cfg,
        **model_arguments({**config, "pretrained_cfg": cfg}),
    )
    forget_tensors(model, cfg.get("source"))
    return model


def build_on_meta(config: Mapping[str, Any]) -> nn.Module:
    """Build a config's network in evaluation mode on the meta device, without allocating memory.

    Raises:
        WeightsDamaged: as for `model_arguments`, or the network cannot be built with these arguments.
    """
    arguments = model_arguments(config)
    with buildable(config, "the config"), torch.device("meta"):
        return timm.create_model(config["architecture"], **arguments).eval()


@contextmanager
def buildable(config: Mapping[str, Any], what: str) -> Iterator[None]:
    """Convert any error raised while building a network from an untrusted config to `WeightsDamaged`."""
    try:
        yield
    except (weights.WeightsError, OSError, ImportError):
        raise
    except Exception as error:  # networks do not validate their arguments
        arguments = printable(repr(model_arguments(config)))
        raise weights.WeightsDamaged(
            f"{what} cannot be used: {config['architecture']} with {arguments[:80]}{'…' * (len(arguments) > 80)} "
            f"cannot be built and loaded ({type(error).__name__}: {printable(str(error))[:300]})"
        ) from error


def model_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the number of classes and the `model_args` of a config, the arguments that build its network.

    Raises:
        WeightsDamaged: the architecture is not registered, the config would make timm load a file (as `checkpoint_path`
            does), or it contradicts itself.
    """
    if not timm.is_model(config["architecture"]):  # timm would also accept hf-hub:ORG/NAME and local-dir:DIR
        raise weights.WeightsDamaged(
            f"the config names the architecture {printable(config['architecture'])!r}, which timm does not know: "
            "expected one of timm.list_models(). Update timm or this package, or get the config again"
        )
    arguments = dict(config.get("model_args") or {})
    foreign = sorted(LOADING & set(arguments))
    if foreign:
        raise weights.WeightsDamaged(
            f"config.json sets {', '.join(foreign)} in model_args, but the weights may only come from the file next to "
            "it. Remove these arguments from config.json"
        )
    # The architecture's default may differ from the checkpoint's number of classes.
    classes = config.get("num_classes", config["pretrained_cfg"].get("num_classes", 1000))
    if classes != arguments.get("num_classes", classes):
        raise weights.WeightsDamaged(
            f"num_classes is {classes} in config.json, but {arguments['num_classes']!r} in its model_args: remove the "
            "one that is wrong"
        )
    source = arguments.get("source")
    if config.get("architecture") == "dynamic_timm" and source is not None and not _is_registered(source):
        raise weights.WeightsDamaged(
            f"config.json sets model_args.source to the unknown network {printable(str(source))!r}: expected one of "
            "timm.list_models()"
        )
    return {"num_classes": classes, **arguments}


def public_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return `config` without local paths; class names are kept."""
    labels = ("label_names", "label_descriptions")
    cleaned = {key: value if key in labels else without_local_paths(value) for key, value in config.items()}
    cfg = config.get("pretrained_cfg") or {}
    if "pretrained_cfg" in cleaned:
        cleaned["pretrained_cfg"] |= {key: cfg[key] for key in labels if key in cfg}
    return cleaned


def _is_registered(name: Any) -> bool:
    return isinstance(name, str) and timm.is_model(name)


def hub_layout(model: nn.Module, model_args: Mapping[str, Any], **config: Any) -> dict[str, Any]:
    """Return the config.json of a network's weights, in timm's Hub layout, which transformers reads too.

    Args:
        model: The network; its classes and features are recorded.
        model_args: Further arguments of the network.
        config: Keys to add or override: `pretrained_cfg`, `architecture`, `label_names`.
    """
    with tempfile.TemporaryDirectory() as private:
        path = Path(private) / weights.CONFIG_NAME
        save_config_for_hf(model, path, model_config=config, model_args=without_local_paths(dict(model_args)))
        written = json.loads(path.read_text("utf-8"))
    # Older releases of timm take the architecture from the network and ignore the argument.
    written |= {"architecture": config.get("architecture", written["architecture"])}
    # transformers, and timm by default, preprocess images for the training size: store the evaluation size there.
    cfg = written["pretrained_cfg"]
    for name in ("input_size", "crop_pct"):
        cfg[name] = cfg.pop(f"test_{name}", None) or cfg.get(name)
    for name in PLACES & set(cfg):
        del cfg[name]
    # transformers passes the number of classes itself, and computes in the dtype of the file by default.
    written["model_args"] = {n: v for n, v in written.get("model_args", {}).items() if n != "num_classes"}
    written["model_args"] |= router_arguments(model, written)
    return {**written, "torch_dtype": str(next(model.parameters()).dtype).removeprefix("torch.")}


def router_arguments(model: nn.Module, config: Mapping[str, Any]) -> dict[str, str]:
    """Return `routing` and `routing_norm` if the routers of `model` differ from its config's, as with older weights.

    Our loaders adapt routers to their weights, but transformers does not, so the config must name the kind.
    """
    if not timm.is_model(config["architecture"]):
        return {}
    found, default = _kinds(model), _kinds(build_on_meta(config))
    return {name: kinds[0] for name, kinds in found.items() if len(kinds) == 1 and kinds != default[name]}


def _kinds(model: nn.Module) -> dict[str, list[str]]:
    routers = [module for module in model.modules() if isinstance(module, Router)]
    return {
        "routing": sorted({router.activation for router in routers}),
        "routing_norm": sorted({router.norm for router in routers}),
    }


def forget_tensors(module: nn.Module, source: str | None) -> None:
    """Remove the loaded tensors from `pretrained_cfg`, which would keep them alive; `source` is recorded there."""
    if (getattr(module, "pretrained_cfg", None) or {}).get("state_dict"):
        kept = {**module.pretrained_cfg, "state_dict": None, "source": source}
        module.pretrained_cfg = module.default_cfg = {name: v for name, v in kept.items() if v is not None}
