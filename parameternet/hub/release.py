"""Turn a run into a checkpoint: weights, config, card, and training record."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from parameternet import files, routing, weights
from parameternet.flops import count_flops
from parameternet.hub.card_data import public_recipe
from parameternet.hub.card_text import write_card
from parameternet.layers import DynamicConv
from parameternet.models import loading
from parameternet.models.builder import hub_layout
from parameternet.prediction import Predictor
from parameternet.training.checkpoint import BEST, claimed
from parameternet.training.errors import CheckpointError
from parameternet.training.recipe import Recipe, saved_recipe
from parameternet.training.report import Reporter
from parameternet.training.validate import validate

__all__ = ["draw_routing", "half", "record", "release", "replace_folder"]

ROUTING = "routing.png"


def release(
    run: str | Path,
    name: str,
    data: str | dict,
    *,
    destination: str | Path | None = None,
    data_name: str | None = None,
    data_terms: str | None = None,
    records: str | Path | None = None,
    reporter: Reporter | None = None,
    **measuring: Any,
) -> dict[str, Any]:
    """Write `weights/<name>/` from a run's best weights, validate the written file, and record its SHA-256.

    Weights and biases are stored in float16. Buffers keep their dtype, because small variances underflow in float16.

    Args:
        run: a run folder.
        name: `<architecture>.<tag>`; the tag names data and recipe.
        data: validation data, as for `validate`, for the figures on the card.
        destination: the folder of checkpoints; None: `weights/` of this copy of the package.
        data_name, data_terms: for the card, instead of the recipe's.
        records: the JSON file {name: {sha256, bytes}} to record the checkpoint in; None: the package's own if
            `destination` is None too, otherwise no record.
        reporter: called during validation.
        measuring: further arguments of `validate`: batch_size, workers, device, threads.

    Returns:
        The result of `validate` on the written file, and its `folder`, `sha256` and `bytes`.

    Raises:
        CheckpointError: not a run folder, a name of another architecture, or weights beyond float16's range.
        DivergedError: the loss on `data` is NaN or infinite.
        FolderInUse: another process releases the same checkpoint.
        ValueError: `destination` cannot be written.
    """
    run, folder = Path(run), Path(destination or weights.shipped("weights")) / name
    recipe = _recipe(run, data_name, data_terms)
    _check_name(name, loading.read_config(run)["architecture"])
    files.check_folder(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with claimed(folder.with_name(f".{name}.lock"), f"the checkpoint {folder}"):
        fresh = folder.with_name(f".{name}.new")  # keep the old checkpoint until the new one is complete
        _restore(folder)
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir()
        try:
            config = _write_weights(run, fresh, name, recipe)
            found = validate(fresh, data, reporter=reporter, **measuring)
            found["macs"] = _macs(fresh, found["input_size"])
            found["routing"] = draw_routing(fresh, name, data)
            found["ablation"] = measure_ablation(fresh, data, reporter=reporter, **measuring)
            _write_words(run, fresh, recipe, config, found)
            reference = name if records or destination is None else f"local-dir:{name}"
            files.write_text(fresh / "README.md", write_card(fresh, reference))
            replace_folder(folder, fresh)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
        file = folder / weights.FILE_NAME
        entry = {"sha256": files.sha256(file), "bytes": file.stat().st_size}
        if records or destination is None:
            record(name, entry, Path(records or weights.RECORDS))
    return {**found, **entry, "model": name, "folder": str(folder)}


def _recipe(run: Path, data_name: str | None, data_terms: str | None) -> Recipe:
    if not (run / BEST).is_file() or not (run / "recipe.yaml").is_file():
        raise CheckpointError(f"{run} is not a run folder with {BEST} and recipe.yaml: train first, then release it")
    recipe = public_recipe(run / "recipe.yaml")
    recipe.data_name, recipe.data_terms = data_name or recipe.data_name, data_terms or recipe.data_terms
    return recipe


def _check_name(name: str, architecture: str) -> None:
    stem, _, tag = name.partition(".")
    if stem != architecture or not re.fullmatch(r"\w+", tag):
        raise CheckpointError(
            f"a checkpoint of this run must be named {architecture}.<tag> with letters, digits and _, got {name!r}"
        )


def half(state: dict[str, Tensor], keep: set[str]) -> dict[str, Tensor]:
    """Convert floating-point tensors to float16, except the names in `keep`.

    Raises:
        CheckpointError: a value beyond float16's range, or NaN.
    """
    small = {n: t.half() if t.is_floating_point() and n not in keep else t for n, t in state.items()}
    for name, tensor in small.items():
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{name} has values that float16 cannot hold (largest {state[name].abs().max():.3g})")
    return small


def _write_weights(run: Path, folder: Path, name: str, recipe: Recipe) -> dict[str, Any]:
    network, config, _ = loading.load(run, dense=True)
    buffers = {buffer for buffer, _ in network.named_buffers()}
    weights.save(half(loading.read_tensors(run), keep=buffers), folder / weights.FILE_NAME, {"name": name})
    cfg = {**config["pretrained_cfg"], "tag": name.partition(".")[2], "license": recipe.license}
    labels = {key: config[key] for key in ("label_names", "label_descriptions") if config.get(key)}
    written = hub_layout(network, config.get("model_args") or {}, **labels, pretrained_cfg=cfg)
    files.write_json(folder / weights.CONFIG_NAME, written)
    return written


def _macs(folder: Path, input_size: tuple[int, int, int]) -> int:
    return count_flops(loading.load(folder, dense=True).model, input_size).total


def draw_routing(folder: Path, name: str, data: str | dict) -> dict[str, Any] | None:
    """Plot the routing weights of a checkpoint for ten validation images per class, to its routing.png.

    Returns:
        Figures for the card: images, dynamic layers, mean experts in use, and the layer whose routing depends most on
        the image. None without dynamic layers, or if the data is neither a folder nor a tar.
    """
    if not _is_dynamic(folder) or not isinstance(data, str) or not Path(data).exists():
        return None
    predictor = Predictor(folder, "cpu")
    found = dataclasses.replace(routing.measure(predictor, routing.find_images([data])), model=name)
    routing.draw(found, folder / ROUTING)
    most = max(found.layers, key=lambda layer: layer.overall_entropy - layer.image_entropy)
    return {
        "images": found.images,
        "layers": len(found.layers),
        "num_experts": max(layer.num_experts for layer in found.layers),
        "experts_in_use": statistics.mean(layer.experts_in_use for layer in found.layers),
        "chooses_most": most.name,
        "experts_in_use_by_an_image": most.num_experts**most.image_entropy,
    }


def measure_ablation(folder: Path, data: str | dict, **measuring: Any) -> dict[str, float] | None:
    """Measure top-1 with parts of the routing weights replaced by means: four validations.

    Returns:
        Rows of `routing.ablate` -> top-1; None without dynamic layers.
    """
    if not _is_dynamic(folder):
        return None
    return {row.routing: row.top1 for row in routing.ablate(folder, data, without_experts=False, **measuring)}


def _is_dynamic(folder: Path) -> bool:
    return any(isinstance(module, DynamicConv) for module in loading.load(folder, dense=True).model.modules())


def _write_words(run: Path, folder: Path, recipe: Recipe, config: dict[str, Any], found: dict[str, Any]) -> None:
    figures = ("top1", "top5", "top1_interval", "loss", "images", "input_size", "macs", "parameters")
    figures += ("routing", "ablation")
    config["results"] = {key: found[key] for key in figures if found[key] is not None}
    config["results"] |= {"data": recipe.data_name, "unreadable": len(found["unreadable"])}
    files.write_json(folder / weights.CONFIG_NAME, config)
    files.write_text(folder / "recipe.yaml", recipe.to_yaml())
    for document in ("history.csv", "curves.png"):
        if (run / document).is_file():
            shutil.copyfile(run / document, folder / document)
    before = _init_run(run)
    if before:  # the training record includes the run it started from
        files.write_text(folder / "init_recipe.yaml", _recipe(before, None, None).to_yaml())
        shutil.copyfile(before / "history.csv", folder / "init_history.csv")


def _init_run(run: Path) -> Path | None:
    """Return the run folder named by `init`; None if it is not a run folder, or gone."""
    init = saved_recipe((run / "recipe.yaml").read_text("utf-8")).init
    if not init or init == "pretrained":
        return None
    try:
        file = loading.parse_source(init).path
    except weights.WeightsError:
        return None
    is_run = file and file.name == BEST and (file.parent / "recipe.yaml").is_file()
    return file.parent if is_run and (file.parent / "history.csv").is_file() else None


def replace_folder(folder: Path, fresh: Path) -> None:
    """Replace `folder` by `fresh`, or leave `folder` unchanged on failure."""
    old = _old(folder)
    files.remove_leftovers(old)
    files.remove_folder(old)
    if folder.exists():
        folder.rename(old)
    try:
        fresh.rename(folder)
    except BaseException:
        _restore(folder)
        raise
    files.remove_folder(old)  # whole or not at all: `_restore` must not find half of it


def _restore(folder: Path) -> None:
    """Restore the old checkpoint after a release that was killed while replacing it."""
    if not folder.exists() and _old(folder).is_dir():
        _old(folder).rename(folder)


def _old(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def record(name: str, entry: dict[str, Any], records: Path = weights.RECORDS) -> None:
    """Record a checkpoint's SHA-256 and size, so that its name resolves and its file is verified.

    Digests of replaced files are kept, so copies of them still load.
    """
    records = Path(os.path.realpath(records))
    with claimed(records.with_name(f".{records.name}.lock"), f"the record file {records}", timeout=60):
        known = json.loads(records.read_text("utf-8")) if records.is_file() else {}
        old = known.get(name, {})
        former = [old["sha256"], *old.get("earlier", [])] if old else []
        if former := [digest for digest in former if digest != entry["sha256"]]:
            entry = {**entry, "earlier": former}
        files.write_json(records, dict(sorted((known | {name: entry}).items())))
