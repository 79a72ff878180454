"""Convert a dense checkpoint from any source to a dynamic one, as a folder in the Hub layout."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import files, weights
from ..surgery.compare import Comparison, compare
from ..surgery.upcycle import upcycle
from . import loading
from .builder import hub_layout

__all__ = ["load_dense", "save_upcycled", "upcycle_checkpoint"]


def load_dense(source: str, architecture: str | None = None) -> nn.Module:
    """Deprecated name of `parameternet.models.loading.load(source, dense=True, architecture=...).model`."""
    warnings.warn("load_dense: use parameternet.models.loading.load(source, dense=True)", DeprecationWarning, 2)
    return loading.load(source, dense=True, architecture=architecture).model


def upcycle_checkpoint(
    source: str, folder: str | Path, architecture: str | None = None, overwrite: bool = False, **options: Any
) -> tuple[nn.Module, Comparison]:
    """Load a dense checkpoint, upcycle it, and write it as a folder that `timm.create_model("local-dir:FOLDER")` loads.

    Args:
        source: As for `loading.parse_source`, including timm models.
        architecture: timm's name of the network, for a file that has no config.
        folder: Where to write model.safetensors and config.json.
        overwrite: Replace an existing checkpoint in `folder`.
        options: As in `upcycle`.

    Returns:
        The dynamic network with its `upcycling`, and a comparison with the dense one; outputs are compared on noise.

    Raises:
        FileExistsError: `folder` already holds a checkpoint.
        ValueError: `folder` cannot be written.
    """
    folder = Path(folder)
    files.check_folder(folder)
    if (folder / weights.FILE_NAME).exists() and not overwrite:
        raise FileExistsError(
            f"{folder} already holds a checkpoint: choose another folder, or pass overwrite=True (--overwrite)"
        )
    dense, config, _ = loading.load(source, dense=True, architecture=architecture)
    dynamic = upcycle(dense, **options)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, *dense.pretrained_cfg["input_size"], generator=generator)
    compared = compare(dense, dynamic, x)
    found = loading.parse_source(source)
    # Only the file's name, to keep local paths out of the config.
    save_upcycled(dynamic, folder, found.path_name or found.name, config.get("model_args"))
    return dynamic, compared


def save_upcycled(
    model: nn.Module, folder: str | Path, upcycled_from: str, model_args: Mapping[str, Any] | None = None
) -> None:
    """Write an upcycled timm network in the Hub layout, with the recipe that rebuilds it.

    Args:
        model: A network that `upcycle` returned; its `pretrained_cfg` names timm's architecture.
        folder: Created if it does not exist.
        upcycled_from: Origin of the dense weights, as text for the config.
        model_args: Further arguments that the dense network was built with; older releases of timm do not record them.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    cfg = model.pretrained_cfg
    labels = {key: cfg[key] for key in ("label_names", "label_descriptions") if cfg.get(key)}
    config = hub_layout(
        model,
        {**(model_args or {}), "source": cfg["architecture"], "recipe": model.upcycling.recipe()},
        **labels,
        architecture="dynamic_timm",
        pretrained_cfg=_plain(cfg),
        upcycled_from=upcycled_from,
    )
    with files.lock(folder / ".lock", str(folder)):  # do not mix the weights and config of two writers
        # Weights are not usable without a config, so a process killed in between cannot leave a mismatched pair.
        (folder / weights.CONFIG_NAME).unlink(missing_ok=True)
        weights.save(model.state_dict(), folder / weights.FILE_NAME, {"upcycled_from": upcycled_from})
        files.write_json(folder / weights.CONFIG_NAME, config)


def _plain(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parts of a config that apply to the upcycled weights, without the location of the dense ones."""
    gone = ("url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source", "label_names", "label_descriptions")
    kept = {key: value for key, value in cfg.items() if value is not None and key not in gone}
    return {**kept, "architecture": "dynamic_timm", "tag": "upcycled"}
