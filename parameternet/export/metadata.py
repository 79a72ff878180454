"""Metadata of an exported file: preprocessing and the meaning of its outputs."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
from torch import nn

from parameternet.prediction import class_names

__all__ = ["describe", "pack", "read_metadata", "unpack"]

FILE_NAME = "parameternet.json"  # inside archives of PyTorch
SUFFIXES = {
    ".onnx": "onnx", ".torchscript": "torchscript", ".pt2": "torch_export", ".xml": "openvino", ".param": "ncnn",
    ".tflite": "litert", ".pte": "executorch", ".mlpackage": "coreml", ".engine": "tensorrt",
}  # fmt: skip


def describe(model: nn.Module, size: tuple[int, int, int], verified: bool) -> dict[str, Any]:
    """Name, preprocessing and class names of a network; what it does not say of itself is left out, never invented.

    Args:
        model: Its `pretrained_cfg`, as timm's networks have it, is what is known.
        size: Channels, height and width of the input that the file is made for.
        verified: Are its weights those of the checkpoint that `pretrained_cfg` names? Only then is that name given.
    """
    facts: dict[str, Any] = {"input_size": list(size)}
    cfg = getattr(model, "pretrained_cfg", None)
    if not cfg:
        return facts
    cfg = cfg if isinstance(cfg, Mapping) else cfg.to_dict()
    facts["name"] = ".".join(filter(None, (cfg.get("architecture"), verified and cfg.get("tag"))))
    data = timm.data.resolve_data_config(pretrained_cfg=dict(cfg), use_test_size=True)
    for key in ("mean", "std"):
        facts[key] = list(data[key])
    for key in ("interpolation", "crop_pct", "crop_mode"):
        facts[key] = data[key]
    if cfg.get("label_names"):
        facts["class_names"] = class_names(cfg, model.num_classes)
    return facts


def pack(facts: Mapping[str, Any]) -> dict[str, str]:
    """One JSON text a key, for formats that keep words."""
    return {key: json.dumps(value, ensure_ascii=False) for key, value in facts.items()}


def unpack(words: Mapping[str, str]) -> dict[str, Any]:
    """The inverse of `pack`; words that others wrote stay text."""
    facts = {}
    for key, text in words.items():
        try:
            facts[key] = json.loads(text)
        except ValueError:
            facts[key] = text
    return facts


def read_metadata(path: str | Path) -> dict[str, Any]:
    """What `export` wrote into a file, or next to it.

    Returns:
        `input_size` [channels, height, width], `form`, `batch` (a number, or "free"), `dynamic_size`; of a network
        that says so also `name`, `mean` and `std` (for channels between 0 and 1), `interpolation`, `crop_pct`,
        `crop_mode`, and `class_names`, one a class.

    Raises:
        ValueError: the file's ending is none of ours.
    """
    import importlib

    suffix = Path(path).suffix
    if suffix not in SUFFIXES:
        raise ValueError(f"{path} has none of the endings of exported files: {', '.join(SUFFIXES)}")
    if not Path(path).exists():
        raise FileNotFoundError(f"no such file: {path}")
    return importlib.import_module(f"parameternet.export.{SUFFIXES[suffix]}").read(Path(path))
