"""Create the config of trained weights in timm's Hub format: model, preprocessing and class names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from parameternet.models.builder import router_arguments
from parameternet.text import address_error, printable
from parameternet.training.errors import DataError
from parameternet.training.recipe import Recipe


def data_config(r: Recipe) -> dict[str, Any]:
    """Return the preprocessing for validation, as arguments of timm's `create_transform`."""
    interpolation = "bicubic" if r.interpolation == "random" else r.interpolation
    return dict(
        input_size=(3, r.test_size, r.test_size),
        interpolation=interpolation,
        mean=tuple(r.mean),
        std=tuple(r.std),
        crop_pct=r.crop_pct,
        crop_mode="center",
    )


def class_labels(path: str | None, classes: list[str] | None, num_classes: int) -> dict[str, Any]:
    """Return `label_names` (ids, in the order of the outputs) and, if known, `label_descriptions` (names by id).

    Args:
        path: a file with one line per class, `id<TAB>name`, or names alone in the order of the outputs; None if there
            is none.
        classes: ids of the data, in the order of their labels.

    Raises:
        DataError: the classes in the file and in the data differ.
    """
    if path is None:
        return {"label_names": classes} if classes else {}
    try:
        text = Path(path).read_text("utf-8")
    except OSError as error:
        raise DataError(f"class_names: {address_error(path) or f'cannot read {path}: {error.strerror}'}") from error
    lines = [line.split("\t", 1) for line in text.split("\n") if line.strip()]
    ids = [line[0] for line in lines]
    if len(ids) != num_classes:
        raise DataError(
            f"class_names {path} has {len(ids)} lines, but the network has {num_classes} classes: give one line per "
            "class"
        )
    if any(len(line) == 1 for line in lines):  # names alone
        names = classes or ids
        return {"label_names": names, "label_descriptions": dict(zip(names, ids, strict=True))}
    if classes and sorted(ids) != sorted(classes):
        odd = sorted(set(classes) - set(ids))
        raise DataError(
            f"class_names {path} is missing classes of the data: {printable(', '.join(odd[:5]))}; its first column "
            "must contain the names of the class folders"
        )
    return {"label_names": classes or ids, "label_descriptions": dict(lines)}


def hub_config(model: nn.Module, r: Recipe, labels: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
    """Return the config of a run's weights, in timm's Hub format."""
    own = model.pretrained_cfg
    pretrained_cfg = {
        **data,
        "num_classes": model.num_classes,
        "input_size": (3, r.input_size, r.input_size),
        "first_conv": own.get("first_conv"),
        "classifier": own.get("classifier"),
        "pool_size": None,
    }
    if r.test_size != r.input_size:
        pretrained_cfg["test_input_size"] = data["input_size"]
    config = {
        "architecture": own.get("architecture") or r.model.split(".")[0],
        "num_classes": model.num_classes,
        "num_features": model.num_features,
        **labels,
        # transformers passes num_classes together with these arguments, so it must not be among them.
        "model_args": {name: value for name, value in r.model_kwargs.items() if name != "num_classes"},
        "pretrained_cfg": pretrained_cfg,
    }
    config["model_args"] |= router_arguments(model, config)
    return config
