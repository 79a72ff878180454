"""Collect the facts for a model card from the config, the weights file, and the files of the training run."""

from __future__ import annotations

import csv
import dataclasses
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from safetensors import safe_open
from timm.data import resolve_data_config
from timm.models import is_model_pretrained

from parameternet import weights
from parameternet.flops import count_flops
from parameternet.models import catalogue, loading
from parameternet.models.builder import build_on_meta, public_config
from parameternet.text import without_local_paths
from parameternet.training.recipe import Recipe, saved_recipe

__all__ = [
    "COMPARISONS",
    "CardData",
    "Comparison",
    "Dense",
    "Results",
    "Run",
    "Usage",
    "WeightsFile",
    "describe",
    "gather",
    "public_recipe",
]

# `<name>.md` and `<name>.png` in a checkpoint's folder, both from benchmarks/compare.py, and their heading
COMPARISONS = {"claim": "What experts are worth", "transfer": "Transfer"}


@dataclass(frozen=True)
class Dense:
    """The dense checkpoint behind an upcycled one: its name, and its Hub repository if it has one."""

    name: str
    repository: str | None


@dataclass(frozen=True)
class Results:
    """Measurements on the validation images of `data`; accuracies in percent, None if not measured."""

    parameters: int
    macs: int
    data: str | None = None
    images: int | None = None
    unreadable: int = 0
    top1: float | None = None
    top5: float | None = None
    top1_interval: float | None = None
    routing: dict[str, Any] | None = None  # from `release.draw_routing`
    ablation: dict[str, float] | None = None  # from `release.measure_ablation`


@dataclass(frozen=True)
class WeightsFile:
    """The weights file: size in bytes, and the dtypes of its tensors."""

    bytes: int
    dtypes: tuple[str, ...]


@dataclass(frozen=True)
class Usage:
    """How examples load the checkpoint and prepare its input: side in pixels, interpolation, crop.

    transformers: The folder, or the Hub repository and revision, for transformers; None if it cannot load it.
    """

    reference: str
    by_name: bool
    size: int
    interpolation: str
    crop_pct: float
    transformers: tuple[str, str | None] | None = None


@dataclass(frozen=True)
class Run:
    """A training run: its recipe without local paths, epochs completed, updates and hours."""

    recipe: Recipe
    epochs: int
    updates: int
    hours: float


@dataclass(frozen=True)
class Comparison:
    """A benchmark's table in Markdown, with its heading and image."""

    heading: str
    text: str
    image: str


@dataclass(frozen=True)
class CardData:
    """The content of a card. runs: The run named by `init`, if known, then the checkpoint's own."""

    name: str
    architecture: str
    num_classes: int
    license: str | None
    data_terms: str | None
    recipe: Recipe | None
    usage: Usage
    results: Results
    dense: Dense | None
    file: WeightsFile | None
    runs: tuple[Run, ...]
    comparisons: tuple[Comparison, ...]


def gather(source: str | Path, reference: str | None = None) -> CardData:
    """Collect the facts for the card of a checkpoint.

    Args:
        source: As for `parameternet.models.loading.parse_source`. In a folder, recipe.yaml, history.csv and comparisons
            are read too, if they exist.
        reference: How examples load the checkpoint, in timm's form: `hf-hub:ORG/NAME`. None: by its name if it is
            registered, otherwise from its folder.

    Raises:
        WeightsNotFound, WeightsDamaged: no such checkpoint, or its config or weights are invalid.
    """
    name, config, folder = describe(source)
    recipe = _recipe(folder)
    return CardData(
        name=name,
        architecture=config["architecture"],
        num_classes=config["num_classes"],
        license=config["pretrained_cfg"].get("license") or (recipe and recipe.license),
        data_terms=recipe and recipe.data_terms,
        recipe=recipe,
        usage=_usage(name, config, reference or _reference(source, name)),
        results=_results(config),
        dense=_dense(config.get("upcycled_from")),
        file=_file(_weights_file(source)),
        runs=_runs(folder),
        comparisons=tuple(filter(None, (_comparison(folder, name) for name in COMPARISONS))),
    )


def describe(source: str | Path) -> tuple[str, dict[str, Any], Path | None]:
    """Return (name, config, folder) of a checkpoint; folder is None unless it holds only this checkpoint.

    Raises:
        WeightsNotFound, WeightsDamaged: as for `gather`.
    """
    found = loading.parse_source(source)
    loading.refuse_dense(found)
    if found.kind == "architecture":
        raise weights.UnknownWeights(weights.unknown(found.name, catalogue.checkpoints()))
    config = public_config(loading.read_config(found))
    cfg, architecture = config["pretrained_cfg"], config["architecture"]
    config = {"num_classes": cfg.get("num_classes", 1000), **config}
    if found.kind == "checkpoint":
        return found.name, config, weights.find(found.name).parent if found.name in weights.known() else None
    says_little = not cfg.get("tag") or architecture == "dynamic_timm"  # may be any network
    tagged = f"{architecture}.{cfg.get('tag')}"
    if found.kind == "hub":
        return found.name.partition("@")[0].rpartition("/")[2] if says_little else tagged, config, None
    folder = found.path.parent if found.path.name in (weights.FILE_NAME, loading.BEST) else None
    name = found.path.resolve().parent.name if folder else found.path.stem
    return name if says_little else tagged, config, folder


def public_recipe(path: Path) -> Recipe:
    """Return the recipe of a run, without local paths.

    Raises:
        RecipeError: an unknown key, or a value of the wrong type.
    """
    recipe = saved_recipe(path.read_text("utf-8"))
    for field in dataclasses.fields(recipe):
        setattr(recipe, field.name, without_local_paths(getattr(recipe, field.name)))
    return recipe


def _recipe(folder: Path | None, prefix: str = "") -> Recipe | None:
    path = folder and folder / f"{prefix}recipe.yaml"
    return public_recipe(path) if path and path.is_file() else None


def _runs(folder: Path | None) -> tuple[Run, ...]:
    own, before = _run(folder), _run(folder, "init_")
    return tuple(filter(None, (before, own))) if own else ()


def _run(folder: Path | None, prefix: str = "") -> Run | None:
    recipe, path = _recipe(folder, prefix), folder and folder / f"{prefix}history.csv"
    rows = list(csv.DictReader(io.StringIO(path.read_text("utf-8")))) if path and path.is_file() else []
    if not recipe or not rows:
        return None
    return Run(recipe, len(rows), int(rows[-1]["updates"]), sum(float(row["seconds"]) for row in rows) / 3600)


def _reference(source: str | Path, name: str) -> str:
    found = loading.parse_source(source)
    if found.kind == "hub":
        return f"hf-hub:{found.name}"
    return name if is_model_pretrained(name) else f"local-dir:{name}"


def _usage(name: str, config: dict[str, Any], reference: str) -> Usage:
    data = _data_config(config)
    size, interpolation, crop_pct = data["input_size"][-1], data["interpolation"], data["crop_pct"]
    return Usage(reference, reference == name, size, interpolation, crop_pct, _for_transformers(reference))


def _for_transformers(reference: str) -> tuple[str, str | None] | None:
    scheme, _, place = reference.rpartition(":")
    if scheme == "hf-hub":
        repository, _, revision = place.partition("@")
        return repository, revision or None
    if scheme == "local-dir":
        return place, None
    return (f"path/to/parameternet/weights/{place}", None) if place in weights.known() else None


def _data_config(config: dict[str, Any]) -> dict[str, Any]:
    return resolve_data_config(pretrained_cfg=config["pretrained_cfg"], use_test_size=True)


def _results(config: dict[str, Any]) -> Results:
    """Return the recorded figures; count parameters and multiply-adds if they are missing."""
    known = {field.name for field in dataclasses.fields(Results)}
    found = {key: value for key, value in (config.get("results") or {}).items() if key in known and value is not None}
    if not {"parameters", "macs"} <= found.keys():
        network = build_on_meta(config)
        found["parameters"] = sum(p.numel() for p in network.parameters())
        found["macs"] = count_flops(network, _data_config(config)["input_size"]).total
    return Results(**found)


def _dense(upcycled_from: str | None) -> Dense | None:
    source = (upcycled_from or "").removeprefix("hf-hub:").partition("@")[0]
    if not upcycled_from:
        return None
    if source.count("/") == 1:
        return Dense(source, source)
    of_timm = timm.is_model(source.partition(".")[0])
    return Dense(upcycled_from, timm.get_pretrained_cfg(source).hf_hub_id if of_timm else None)


def _weights_file(source: str | Path) -> Path | None:
    """Return the weights file of a checkpoint, if it is on this machine."""
    found = loading.parse_source(source)
    return weights.local(found.name) if found.name in weights.known() else found.path


def _file(path: Path | None) -> WeightsFile | None:
    if path is None or not path.is_file():
        return None
    names = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
    with safe_open(path, "pt") as file:
        kinds = {file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118  not a mapping
    return WeightsFile(path.stat().st_size, tuple(names[kind] for kind in names if kind in kinds))


def _comparison(folder: Path | None, name: str) -> Comparison | None:
    path = folder and folder / f"{name}.md"
    if not path or not path.is_file():
        return None
    return Comparison(COMPARISONS[name], path.read_text("utf-8").strip(), f"{name}.png")
