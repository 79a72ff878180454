"""Metadata of an exported file: preprocessing and the meaning of its outputs."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from parameternet.layers import DynamicConv
from parameternet.prediction import class_names

__all__ = ["config_of", "describe", "input_channels", "label_names", "pack", "read_metadata", "unpack"]

FILE_NAME = "parameternet.json"  # inside PyTorch archives
SUFFIXES = {
    ".onnx": "onnx", ".torchscript": "torchscript", ".pt2": "torch_export", ".xml": "openvino", ".param": "ncnn",
    ".tflite": "litert", ".pte": "executorch", ".mlpackage": "coreml", ".engine": "tensorrt",
}  # fmt: skip


def describe(model: nn.Module, size: tuple[int, int, int], verified: bool) -> dict[str, Any]:
    """Return a network's name, preprocessing and class names; unknown values are left out, never guessed.

    Args:
        model: A network; the values come from its `pretrained_cfg`, as in timm.
        size: Channels, height and width of the file's input.
        verified: Whether the weights are those of the checkpoint that `pretrained_cfg` names; only then is
            the checkpoint named.
    """
    facts: dict[str, Any] = {"input_size": list(size)}
    cfg = config_of(model)
    if not cfg:
        return facts
    facts["name"] = ".".join(filter(None, (cfg.get("architecture"), verified and cfg.get("tag"))))
    data = timm.data.resolve_data_config(pretrained_cfg=cfg, use_test_size=True)
    if len(data["mean"]) == len(data["std"]) == size[0]:
        facts |= {"mean": list(data["mean"]), "std": list(data["std"])}
    for key in ("interpolation", "crop_pct", "crop_mode"):
        facts[key] = data[key]
    if label_names(model) or (verified and cfg.get("label_names")):
        facts["class_names"] = class_names(cfg, model.num_classes)
    return facts


def config_of(model: nn.Module) -> dict[str, Any]:
    """Return the network's `pretrained_cfg` as a dictionary; empty if it has none."""
    cfg = getattr(model, "pretrained_cfg", None) or {}
    return dict(cfg) if isinstance(cfg, Mapping) else cfg.to_dict()


def label_names(model: nn.Module) -> list[str]:
    """Return the class names in the network's config; empty if their number is not that of the network's outputs."""
    names = list(config_of(model).get("label_names") or [])
    return names if len(names) == getattr(model, "num_classes", None) else []


@torch.no_grad()
def input_channels(model: nn.Module, height: int, width: int) -> int:
    """Return the number of the network's input channels, which may differ from that in its config (`in_chans=1`)."""
    if channels := getattr(model, "in_chans", None):
        return channels
    usual = (config_of(model).get("input_size") or [3])[0]
    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d | DynamicConv)), None)
    if first is None or first.in_channels == usual:
        return usual
    try:  # the first convolution may read something other than the image, such as patches of it
        model(torch.zeros(1, usual, height, width))
    except Exception:
        return first.in_channels
    return usual


def pack(facts: Mapping[str, Any]) -> dict[str, str]:
    """Encode metadata as one JSON string per key, for formats that store only strings."""
    return {key: json.dumps(value, ensure_ascii=False) for key, value in facts.items()}


def unpack(words: Mapping[str, str]) -> dict[str, Any]:
    """Decode strings written by `pack`; strings from other tools that are not JSON are kept as is."""
    facts = {}
    for key, text in words.items():
        try:
            facts[key] = json.loads(text)
        except ValueError:
            facts[key] = text
    return facts


def read_metadata(path: str | Path) -> dict[str, Any]:
    """Return the metadata that `export` wrote into a file or next to it.

    Returns:
        `input_size` [channels, height, width], `form`, `batch` (a number, or "free"), `dynamic_size` and `precision`
        ("float32" or "int8"). If the network specifies them, also `name`, `mean` and `std` (for channels between 0 and
        1), `interpolation`, `crop_pct`, `crop_mode`, and `class_names`, one per class.

    Raises:
        ValueError: the suffix is not that of an exported file.
    """
    import importlib

    suffix = Path(path).suffix
    if suffix not in SUFFIXES:
        raise ValueError(f"{path} does not have the suffix of an exported file; expected one of {', '.join(SUFFIXES)}")
    if not Path(path).exists():
        raise FileNotFoundError(f"no such file: {path}")
    return importlib.import_module(f"parameternet.export.{SUFFIXES[suffix]}").read(Path(path))
