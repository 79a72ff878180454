# ruff: noqa: RUF009 (`setting` is dataclasses.field with documentation)
"""Recipes: one YAML file with every setting of a run."""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from parameternet.deprecation import moved
from parameternet.text import address_error
from parameternet.training.conditions import check_together
from parameternet.training.errors import RecipeError, nearest
from parameternet.training.fields import (
    COUNT,
    FRACTION,
    FRACTION_BELOW_1,
    MIXING,
    NOT_NEGATIVE,
    PLAIN,
    POLICY,
    POSITIVE,
    SIZE,
    SOURCE,
    TEXT,
    check_rule,
    number,
    one_of,
    setting,
    typed,
)
from parameternet.training.recipe_yaml import apply_override, parse_yaml

__getattr__ = moved(__name__, {"Rule": "parameternet.training.fields:Rule"})

IMAGENET_MEAN = [0.485, 0.456, 0.406]
IMAGENET_STD = [0.229, 0.224, 0.225]


@dataclass
class Recipe:
    """Every setting of a run. `fields()` lists names, defaults and documentation."""

    # network
    model: str = setting("parameternet_50m", "timm name of the network", TEXT)
    model_kwargs: dict = setting({}, "arguments of the network, e.g. {num_experts: 4}", PLAIN)
    num_classes: int | None = setting(None, "number of classes; null: from the training data", COUNT)
    class_names: str | None = setting(
        None, "file with one class per line: `id<TAB>name`, or the name alone", TEXT, free=True
    )
    init: str | None = setting(
        None,
        "initial weights: 'pretrained' (the network's own), or any model: a name, a run folder, a weights folder, a "
        ".safetensors file, local-dir:DIR, hf-hub:ORG/NAME; null: random",
        TEXT,
    )
    freeze: list[str] = setting(
        [],
        "frozen parts: names or patterns, e.g. [conv_stem, 'blocks.[0-2]'] or ['*.routing']; docs/finetuning.md has "
        "patterns of experts, routers and norms",
        TEXT,
    )
    drop_rate: float = setting(0.0, "dropout before the classifier", FRACTION_BELOW_1)
    drop_path_rate: float = setting(0.0, "stochastic depth rate", FRACTION_BELOW_1)

    # data
    train: str | dict | None = setting(
        None,
        "folder, .tar, `hfds/NAME[:split]`, `wds/FOLDER:shards`, or arguments of timm's create_dataset",
        SOURCE,
        free=True,
    )
    val: str | dict | None = setting(
        None, "the same for validation; null: no validation, the latest weights are the best", SOURCE, free=True
    )
    cache: str = setting(
        "none",
        "none | ram: decode every image once into memory, shared by the workers | device: keep images on the training "
        "device and augment whole batches there, with different random numbers than the other two",
        one_of("none", "ram", "device"),
        free=True,
    )
    cache_size: int | None = setting(
        None,
        "for cache: device, size to which images are resized and cropped; null: all have the same size",
        SIZE,
    )
    input_size: int = setting(224, "size of training images in pixels", SIZE)
    test_input_size: int | None = setting(None, "size of validation images in pixels; null: input_size", SIZE)
    resolution_schedule: list[dict] = setting(
        [], "sizes for the first epochs: [{until_epoch: 10, input_size: 48}, ...], then input_size", PLAIN
    )
    interpolation: str = setting(
        "bicubic",
        "bicubic | bilinear | nearest | box | hamming | lanczos | random (training only; bicubic in validation)",
        one_of("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos", "random"),
    )
    crop_pct: float = setting(1.0, "fraction of the resized validation image kept by the center crop", number(0.1, 1))
    crop_mode: str | None = setting(None, "training crop: rrc (default) | rkrc | rkrr", one_of("rrc", "rkrc", "rkrr"))
    scale: list[float] = setting(
        [0.08, 1.0], "training crop: fraction of the area, [from, to]", number(0, 4, low_open=True), length=2
    )
    ratio: list[float] = setting([0.75, 1.3333], "training crop: aspect ratio, [from, to]", number(0.01, 100), length=2)
    hflip: float = setting(0.5, "probability of a horizontal flip", FRACTION)
    vflip: float = setting(0.0, "probability of a vertical flip", FRACTION)
    color_jitter: float | None = setting(None, "strength of color jitter", FRACTION)
    auto_augment: str | None = setting(None, "timm policy, e.g. rand-m7-mstd0.5-inc1", POLICY)
    reprob: float = setting(0.0, "probability of random erasing", FRACTION)
    remode: str = setting("pixel", "fill of random erasing: const | rand | pixel", one_of("const", "rand", "pixel"))
    no_aug: bool = setting(False, "no augmentation: resize and center crop only")
    mean: list[float] = setting(IMAGENET_MEAN, "channel means, for values from 0 to 1", FRACTION, length=3)
    std: list[float] = setting(
        IMAGENET_STD, "channel standard deviations, for values from 0 to 1", number(0.001, 1), length=3
    )

    # targets
    smoothing: float = setting(0.0, "label smoothing", FRACTION_BELOW_1)
    mixup: float = setting(0.0, "mixup alpha; 0: off", MIXING)
    cutmix: float = setting(0.0, "cutmix alpha; 0: off", MIXING)
    mixup_prob: float = setting(1.0, "probability of mixup or cutmix for a batch", FRACTION)
    mixup_off_epoch: int = setting(0, "epoch from which mixup and cutmix are off; 0: never", NOT_NEGATIVE)
    teacher: str | None = setting(
        None,
        "distillation: a model that has the data's classes, named as for init; its predictions on whole images are "
        "mixed into the labels; needs cache: device",
        TEXT,
    )
    teacher_share: float = setting(
        0.5, "weight of the teacher's predictions in the targets; the labels have the rest", FRACTION
    )
    teacher_size: int | None = setting(None, "size of the teacher's images in pixels; null: its own", SIZE)
    bce: bool = setting(False, "binary cross-entropy instead of cross-entropy")

    # optimization
    batch_size: int = setting(128, "images per step, over all processes", COUNT)
    val_batch_size: int | None = setting(
        None, "images per validation step and process; null: batch_size", COUNT, free=True
    )
    accumulate: int = setting(1, "steps of gradient accumulation per update", COUNT)
    epochs: int = setting(100, "epochs to train", COUNT)
    opt: str = setting("adamw", "timm name of the optimizer", TEXT)
    lr: float = setting(1e-3, "learning rate after warmup", POSITIVE)
    momentum: float = setting(0.9, "momentum, or Adam's first beta", FRACTION_BELOW_1)
    weight_decay: float = setting(0.05, "weight decay; not applied to biases and norms", NOT_NEGATIVE)
    opt_kwargs: dict = setting({}, "further arguments of the optimizer, e.g. {betas: [0.9, 0.99]}", PLAIN)
    layer_decay: float | None = setting(
        None, "factor of the learning rate from each stage to the one below", number(0, 1, low_open=True)
    )
    scale_router_lr: bool = setting(False, "train routers with routing_norm none at lr / sqrt(in_channels)")
    sched: str = setting("cosine", "timm name of the learning rate schedule, stepped at every update", TEXT)
    sched_kwargs: dict = setting({}, "further arguments of timm's create_scheduler_v2", PLAIN)
    warmup_epochs: float = setting(0.0, "epochs of linear warmup", NOT_NEGATIVE)
    warmup_lr: float = setting(1e-6, "learning rate at the start of warmup", NOT_NEGATIVE)
    min_lr: float = setting(0.0, "learning rate at the end", NOT_NEGATIVE)
    clip_grad: float | None = setting(None, "threshold of gradient clipping; null: no clipping", POSITIVE)
    clip_mode: str = setting("norm", "norm | value | agc", one_of("norm", "value", "agc"))
    ema_decay: float | None = setting(
        None,
        "EMA decay, with warmup; null: no EMA",
        number(0, 1, low_open=True, high_open=True),
    )

    # execution
    amp: str | None = setting(None, "mixed precision: null | float16 | bfloat16", one_of(None, "float16", "bfloat16"))
    channels_last: bool = setting(False, "memory format of images and weights", free=True)
    compile: bool = setting(False, "use torch.compile")
    cuda_graph: bool = setting(
        False,
        "record forward and backward as a CUDA graph: faster where launching kernels takes longer than running them",
    )
    sync_bn: bool = setting(False, "synchronize batch norm statistics over all processes")
    seed: int = setting(0, "random seed", number(-(2**63), 2**63 - 1))
    device: str = setting("auto", "auto | cpu | cuda | cuda:1 | mps", TEXT, free=True)
    workers: int = setting(2, "data loading workers per training process", number(0, 1024), free=True)
    threads: int | None = setting(None, "CPU threads per process; null: torch's default", number(1, 1024), free=True)
    val_every: int = setting(1, "epochs between validations; the last epoch is always validated", COUNT, free=True)
    checkpoint_minutes: float = setting(
        10.0, "minutes between checkpoints within an epoch; 0: every update", NOT_NEGATIVE, free=True
    )
    log_every: int = setting(50, "steps between log lines and checks of the loss", COUNT, free=True)

    # model card of a released checkpoint
    data_name: str | None = setting(None, "name of the dataset", TEXT, free=True)
    data_terms: str | None = setting(None, "terms of use of its images", TEXT, free=True)
    license: str = setting("apache-2.0", "license of the weights", TEXT, free=True)

    def __post_init__(self):
        for item in dataclasses.fields(self):
            value = typed(item.name, getattr(self, item.name), _TYPES[item.name])
            check_rule(item.name, value, item.metadata["rule"], item.metadata["length"])
            setattr(self, item.name, value)
        check_together(self)

    @classmethod
    def fields(cls) -> list[tuple[str, Any, str]]:
        """Return name, default and documentation of each field."""
        items = dataclasses.fields(cls)
        made = [i.default_factory() if i.default is dataclasses.MISSING else i.default for i in items]
        return [(item.name, default, item.metadata["doc"]) for item, default in zip(items, made, strict=True)]

    def size_at(self, epoch: int) -> int:
        """Return the size of training images in `epoch` (from 0), in pixels."""
        for stage in self.resolution_schedule:
            if epoch < stage["until_epoch"]:
                return stage["input_size"]
        return self.input_size

    @property
    def test_size(self) -> int:
        """Size of validation images, in pixels."""
        return self.test_input_size or self.input_size

    @property
    def mixes(self) -> bool:
        """Whether mixup or cutmix is used."""
        return self.mixup > 0 or self.cutmix > 0

    def to_yaml(self) -> str:
        """Return all fields as YAML."""
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False, allow_unicode=True)

    def differences(self, other: Recipe) -> list[str]:
        """Return the fields that differ and change the result, as `name: own -> other's`."""
        fixed = [item.name for item in dataclasses.fields(self) if not item.metadata["free"]]
        if "device" in (self.cache, other.cache):  # which uses different random numbers
            fixed.append("cache")
        pairs = {name: (getattr(self, name), getattr(other, name)) for name in fixed}
        return [f"{name}: {mine} -> {theirs}" for name, (mine, theirs) in pairs.items() if mine != theirs]


_TYPES = typing.get_type_hints(Recipe)


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe and apply `key=value` overrides; `a.b=value` sets a key of a dictionary field.

    Args:
        path: a YAML file whose keys are fields of `Recipe`.
        overrides: values are YAML: `lr=0.1`, `scale=[0.3, 1]`, `val=null`, `model_kwargs.num_experts=8`. The last
            override of a key wins.

    Raises:
        RecipeError: no such file, not YAML, a duplicate key, an unknown key (the message suggests the closest one), a
            value of the wrong type or out of range.
    """
    given, path = str(path), Path(path)
    try:
        values = parse_yaml(path.read_text("utf-8"))
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not valid YAML: it is not UTF-8 text ({error})") from error
    except OSError as error:
        why = address_error(given) or f"cannot read the recipe {path}: {error.strerror}"
        raise RecipeError(f"{why}; examples are in configs/train") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is not valid YAML: {error}") from error
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise RecipeError(f"{path} must contain `key: value` lines, got a {type(values).__name__}")
    for override in overrides:
        apply_override(values, override)
    values["class_names"] = _beside(path, values.get("class_names"))
    return make_recipe(values)


def make_recipe(values: dict[str, Any]) -> Recipe:
    """Create a recipe from a dictionary; the error for an unknown key suggests the closest one."""
    _check_names(values)
    return Recipe(**values)


def _check_names(values: dict[str, Any]) -> None:
    unknown = [key for key in values if key not in _TYPES]
    if unknown:
        key = str(unknown[0])
        raise RecipeError(f"unknown recipe key {key!r}{nearest(key, _TYPES, n=1)}")


def saved_recipe(text: str) -> Recipe:
    """Read the recipe of a run, in YAML or JSON as written by training.

    Ranges are not checked, because they differ between versions.

    Raises:
        RecipeError: unknown key, or a value of the wrong type.
    """
    recipe = Recipe()
    try:
        values = json.loads(text)  # YAML would read its 1e-05 as text
    except ValueError:
        values = parse_yaml(text)
    _check_names(values)
    for name, value in values.items():
        setattr(recipe, name, typed(name, value, _TYPES[name]))
    return recipe


def allowed(name: str) -> str:
    """Describe the values that a field may have besides null."""
    metadata = Recipe.__dataclass_fields__[name].metadata
    rule, length = metadata["rule"], metadata["length"]
    return f"{f'{length} numbers, each ' if length else ''}{rule.words}" if rule else "true or false"


def _beside(recipe_path: Path, name: str | None) -> str | None:
    # A class file may be next to its recipe.
    if isinstance(name, str) and not Path(name).exists() and (recipe_path.parent / name).exists():
        return str(recipe_path.parent / name)
    return name
