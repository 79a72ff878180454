"""From a dense checkpoint, wherever it is, to a folder with a dynamic one in the Hub's layout."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from .. import files, weights
from ..surgery.compare import Comparison, compare
from ..surgery.upcycle import upcycle
from . import dynamic_timm
from ._builder import build_from_config, hub_layout

__all__ = ["load_dense", "save_upcycled", "upcycle_checkpoint"]


def load_dense(source: str, architecture: str | None = None) -> nn.Module:
    """A network of timm with weights that were verified as far as that is possible, in evaluation mode.

    Args:
        source: A name that timm knows (`resnet18`, `resnet18.a1_in1k`), `hf-hub:ORG/NAME`, a folder in the Hub's layout
            (`local-dir:DIR` or just the folder), or a .safetensors file.
        architecture: timm's name of the network, for a file that has no config beside it.

    Raises:
        WeightsError: no such weights, or not the right ones.
        ValueError: a name that timm does not know, or nothing that says which network a file is of.
    """
    path = Path(source.removeprefix("local-dir:")).expanduser()
    if source.startswith("hf-hub:"):
        config = weights.config(source)
        cfg = {"source": "hf-hub", "hf_hub_id": source.removeprefix("hf-hub:")}
    elif path.suffix == ".safetensors":
        config, cfg = _config_of(path, architecture), {"file": str(path)}
    elif path.is_dir():
        config, cfg = weights.config(f"local-dir:{path}"), {"source": "local-dir", "file": str(path)}
    else:
        config = _registered(source)
        cfg = {"hf_hub_id": config["pretrained_cfg"]["hf_hub_id"]}
    state_dict = dynamic_timm.by_order(weights.resolve(cfg), config["architecture"])
    return build_from_config(config, state_dict=state_dict).eval()


def _registered(name: str) -> dict[str, Any]:
    """What timm's registry says of one of its own networks, in the form of a config.json."""
    architecture = name.partition(".")[0]
    if not timm.is_model(architecture):
        raise ValueError(f"{name!r} is no folder, no .safetensors file, no hf-hub:ORG/NAME and no network of timm")
    cfg = timm.get_pretrained_cfg(name)
    if not cfg.hf_hub_id:
        raise weights.WeightsNotFound(f"timm has no weights of {name} on the Hub; give a file or a folder of your own")
    config = {
        "architecture": architecture,
        "num_classes": cfg.num_classes,
        "pretrained_cfg": {**cfg.to_dict(), "url": ""},
    }
    of_imagenet = cfg.num_classes == 1000 and "in1k" in (cfg.tag or "")
    return {**config, **(dynamic_timm.labels() if of_imagenet else {})}


def _config_of(path: Path, architecture: str | None) -> dict[str, Any]:
    if architecture is None and path.with_name(weights.CONFIG_NAME).is_file():
        return weights.config(f"local-dir:{path.parent}")
    words = weights.metadata(path).get("config")
    if architecture is None and words:
        return json.loads(words)
    if not architecture or not timm.is_model(architecture):
        given = f"timm knows no {architecture!r}" if architecture else "there is no config.json beside it"
        raise ValueError(f"{path} does not say which network it is of, and {given}: name one of timm.list_models()")
    classifier = f"{timm.get_pretrained_cfg(architecture).classifier}.weight"
    tensors = weights.read(path)
    cfg = timm.get_pretrained_cfg(architecture).to_dict()
    classes = len(tensors[classifier]) if classifier in tensors else cfg["num_classes"]
    return {"architecture": architecture, "num_classes": classes, "pretrained_cfg": {**cfg, "num_classes": classes}}


def upcycle_checkpoint(
    source: str, folder: str | Path, architecture: str | None = None, overwrite: bool = False, **options: Any
) -> tuple[nn.Module, Comparison]:
    """Load a dense checkpoint, upcycle it, and write it as a folder that `timm.create_model("local-dir:FOLDER")` loads.

    Args:
        source, architecture: As of `load_dense`.
        folder: model.safetensors and config.json go there.
        overwrite: Replace a checkpoint that is in `folder` already.
        options: As of `upcycle`.

    Returns:
        The dynamic network with its `upcycling`, and what changed; the difference is on noise of the network's size.

    Raises:
        FileExistsError: `folder` holds a checkpoint.
    """
    folder = Path(folder)
    if (folder / weights.FILE_NAME).exists() and not overwrite:
        raise FileExistsError(
            f"{folder} holds a checkpoint already: choose another folder, or ask for it to be replaced"
        )
    dense = load_dense(source, architecture)
    dynamic = upcycle(dense, **options)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, *dense.pretrained_cfg["input_size"], generator=generator)
    compared = compare(dense, dynamic, x)
    # Where it lay on this machine is nobody's business.
    save_upcycled(dynamic, folder, Path(source).name if Path(source).exists() else source)
    return dynamic, compared


def save_upcycled(model: nn.Module, folder: str | Path, upcycled_from: str) -> None:
    """Write an upcycled network of timm in the Hub's layout, with the recipe that builds it again.

    Args:
        model: A network that `upcycle` returned; its `pretrained_cfg` names timm's architecture.
        folder: Made if it is not there.
        upcycled_from: Words for the config: where the dense weights are from.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    cfg = model.pretrained_cfg
    labels = {key: cfg[key] for key in ("label_names", "label_descriptions") if cfg.get(key)}
    config = hub_layout(
        model,
        {"source": cfg["architecture"], "recipe": model.upcycling.recipe()},
        **labels,
        architecture="dynamic_timm",
        pretrained_cfg=_plain(cfg),
        upcycled_from=upcycled_from,
    )
    with files.lock(folder / ".lock", str(folder)):  # weights and config of two writers must not mix
        weights.save(model.state_dict(), folder / weights.FILE_NAME, {"upcycled_from": upcycled_from})
        files.write_json(folder / weights.CONFIG_NAME, config)


def _plain(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Of a configuration what is true of the upcycled weights: not where the dense ones are."""
    gone = ("url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source", "label_names", "label_descriptions")
    kept = {key: value for key, value in cfg.items() if value is not None and key not in gone}
    return {**kept, "architecture": "dynamic_timm", "tag": "upcycled"}
