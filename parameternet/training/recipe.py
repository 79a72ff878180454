# ruff: noqa: RUF009 (`_field` is dataclasses.field with documentation)
"""A recipe: one YAML file that is the whole truth of a run."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from parameternet.training.errors import RecipeError, nearest

IMAGENET_MEAN = [0.485, 0.456, 0.406]
IMAGENET_STD = [0.229, 0.224, 0.225]


def _field(default: Any, doc: str, *, free: bool = False) -> Any:
    """A recipe field with its documentation. `free`: may change when a run is resumed, the result does not."""
    metadata = {"doc": doc, "free": free}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class Recipe:
    """Everything a run depends on. `fields()` gives name, type, default and documentation of each."""

    # network
    model: str = _field("parameternet_50m", "timm name of the network")
    model_kwargs: dict = _field({}, "arguments of the network, e.g. {num_experts: 4}")
    num_classes: int | None = _field(None, "classes; null: as many as the training data has")
    class_names: str | None = _field(None, "file with one class a line: `id<TAB>words`, or words alone", free=True)
    init: str | None = _field(
        None, "start from: 'pretrained', a run folder, a weights folder or a .safetensors; null: random"
    )
    freeze: list[str] = _field([], "parts that are not trained: names or patterns, e.g. [conv_stem, 'blocks.[0-2]']")
    drop_rate: float = _field(0.0, "dropout before the classifier")
    drop_path_rate: float = _field(0.0, "stochastic depth")

    # data
    train: str | dict | None = _field(
        None, "folder, .tar, `hfds/NAME[:split]`, `wds/FOLDER:shards`, or arguments of timm's create_dataset", free=True
    )
    val: str | dict | None = _field(None, "the same for validation; null: no validation, best = latest", free=True)
    cache: str = _field(
        "none",
        "none | ram: decode every image once into memory, shared by the workers | device: onto the training device, "
        "where whole batches are augmented, by other draws than those of the other two",
        free=True,
    )
    cache_size: int | None = _field(
        None, "cache: device: side to which images are resized and cropped first; null: they all have one size"
    )
    input_size: int = _field(224, "side of training images, pixels")
    test_input_size: int | None = _field(None, "side of validation images, pixels; null: input_size")
    resolution_schedule: list[dict] = _field(
        [], "smaller sides first: [{until_epoch: 10, input_size: 48}, ...]; input_size after the last"
    )
    interpolation: str = _field("bicubic", "bilinear | bicubic | random (training only; bicubic in validation)")
    crop_pct: float = _field(1.0, "share of the resized validation image that is kept")
    crop_mode: str | None = _field(None, "training crop: rrc (default), rkrc, rkrr")
    scale: list[float] = _field([0.08, 1.0], "training crop: share of the area, from, to")
    ratio: list[float] = _field([0.75, 1.3333], "training crop: aspect ratio, from, to")
    hflip: float = _field(0.5, "probability of a horizontal flip")
    vflip: float = _field(0.0, "probability of a vertical flip")
    color_jitter: float | None = _field(None, "strength of colour jitter")
    auto_augment: str | None = _field(None, "timm's policy, e.g. rand-m7-mstd0.5-inc1")
    reprob: float = _field(0.0, "probability of random erasing")
    remode: str = _field("pixel", "what random erasing fills in: const | rand | pixel")
    no_aug: bool = _field(False, "no augmentation at all: resize and centre crop")
    mean: list[float] = _field(IMAGENET_MEAN, "channel means, scale 0 to 1")
    std: list[float] = _field(IMAGENET_STD, "channel standard deviations, scale 0 to 1")

    # targets
    smoothing: float = _field(0.0, "label smoothing")
    mixup: float = _field(0.0, "mixup alpha; 0: off")
    cutmix: float = _field(0.0, "cutmix alpha; 0: off")
    mixup_prob: float = _field(1.0, "probability of mixing a batch")
    mixup_off_epoch: int = _field(0, "no mixup and cutmix from this epoch on; 0: never off")
    teacher: str | None = _field(
        None,
        "checkpoint that knows the data's classes: its answers to the whole images are mixed into the labels; needs "
        "cache: device",
    )
    teacher_share: float = _field(0.5, "share of the teacher's answers in what is taught; the labels have the rest")
    teacher_size: int | None = _field(None, "side at which the teacher sees the images, pixels; null: its own")
    bce: bool = _field(False, "binary cross-entropy instead of cross-entropy")

    # optimisation
    batch_size: int = _field(128, "images a step, over all processes together")
    val_batch_size: int | None = _field(None, "images a validation step and process; null: batch_size", free=True)
    accumulate: int = _field(1, "steps whose gradients are summed into one update")
    epochs: int = _field(100, "passes over the training data")
    opt: str = _field("adamw", "timm's optimiser name")
    lr: float = _field(1e-3, "learning rate after warm-up")
    momentum: float = _field(0.9, "momentum, or Adam's first beta")
    weight_decay: float = _field(0.05, "weight decay; none on biases and norms")
    opt_kwargs: dict = _field({}, "further arguments of the optimiser, e.g. {betas: [0.9, 0.99]}")
    layer_decay: float | None = _field(None, "factor on the learning rate from each stage to the one below")
    sched: str = _field("cosine", "timm's schedule, stepped at every update")
    sched_kwargs: dict = _field({}, "further arguments of timm's create_scheduler_v2")
    warmup_epochs: float = _field(0.0, "epochs of linear warm-up")
    warmup_lr: float = _field(1e-6, "learning rate at the start of warm-up")
    min_lr: float = _field(0.0, "learning rate at the end")
    clip_grad: float | None = _field(None, "largest norm of the gradients; null: no clipping")
    clip_mode: str = _field("norm", "norm | value | agc")
    ema_decay: float | None = _field(None, "decay of the averaged weights, warmed up; null: no averaging")

    # execution
    amp: str | None = _field(None, "mixed precision: null | float16 | bfloat16")
    channels_last: bool = _field(False, "memory format of images and weights")
    compile: bool = _field(False, "torch.compile the network")
    sync_bn: bool = _field(False, "batch statistics over all processes")
    seed: int = _field(0, "of everything random")
    device: str = _field("auto", "auto | cpu | cuda | cuda:1 | mps", free=True)
    workers: int = _field(2, "processes that read and augment, for each training process", free=True)
    threads: int | None = _field(None, "threads of a process; null: torch's choice", free=True)
    val_every: int = _field(1, "epochs between validations; the last epoch always has one", free=True)
    checkpoint_minutes: float = _field(10.0, "minutes between checkpoints in an epoch; 0: every update", free=True)
    log_every: int = _field(50, "steps between reports and checks of the loss", free=True)

    # words for the card of a released checkpoint
    data_name: str | None = _field(None, "name of the data set", free=True)
    data_terms: str | None = _field(None, "terms under which its images may be used", free=True)
    license: str = _field("apache-2.0", "licence of the weights", free=True)

    def __post_init__(self):
        for item in dataclasses.fields(self):
            setattr(self, item.name, _checked(item.name, getattr(self, item.name), _TYPES[item.name]))
        _check_meaning(self)

    @classmethod
    def fields(cls) -> list[tuple[str, Any, str]]:
        """Name, default and documentation of each field."""
        items = dataclasses.fields(cls)
        made = [i.default_factory() if i.default is dataclasses.MISSING else i.default for i in items]
        return [(item.name, default, item.metadata["doc"]) for item, default in zip(items, made, strict=True)]

    def size_at(self, epoch: int) -> int:
        """Side of the training images in `epoch` (counted from 0), pixels."""
        for stage in self.resolution_schedule:
            if epoch < stage["until_epoch"]:
                return stage["input_size"]
        return self.input_size

    @property
    def test_size(self) -> int:
        """Side of the validation images, pixels."""
        return self.test_input_size or self.input_size

    @property
    def mixes(self) -> bool:
        """Whether mixup or cutmix is on at all."""
        return self.mixup > 0 or self.cutmix > 0

    def to_yaml(self) -> str:
        """The whole recipe as YAML, fields in their documented order."""
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False, allow_unicode=True)

    def differences(self, other: Recipe) -> list[str]:
        """Fields that decide the result and differ, as `name: mine -> other's`."""
        fixed = [item.name for item in dataclasses.fields(self) if not item.metadata["free"]]
        if "device" in (self.cache, other.cache):  # it augments by other draws
            fixed.append("cache")
        pairs = {name: (getattr(self, name), getattr(other, name)) for name in fixed}
        return [f"{name}: {mine} -> {theirs}" for name, (mine, theirs) in pairs.items() if mine != theirs]


_TYPES = typing.get_type_hints(Recipe)


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe and apply `key=value` overrides; `a.b=value` reaches into a dictionary field.

    Args:
        path: a YAML file whose keys are fields of `Recipe`.
        overrides: values are YAML: `lr=0.1`, `scale=[0.3, 1]`, `val=null`, `model_kwargs.num_experts=8`.

    Raises:
        RecipeError: no such file, not YAML, an unknown key (the nearest one is named), a value of the wrong type.
    """
    path = Path(path)
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except OSError as error:
        raise RecipeError(f"cannot read the recipe {path}: {error.strerror}; recipes lie in configs/train") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise RecipeError(f"{path} must hold `key: value` lines, got a {type(values).__name__}")
    for override in overrides:
        _apply(values, override)
    values["class_names"] = _beside(path, values.get("class_names"))
    return make_recipe(values)


def make_recipe(values: dict[str, Any]) -> Recipe:
    """A recipe from a dictionary; an unknown key is an error that names the nearest one."""
    unknown = [key for key in values if key not in _TYPES]
    if unknown:
        key = str(unknown[0])
        raise RecipeError(f"unknown recipe key {key!r}{nearest(key, _TYPES, n=1)}")
    return Recipe(**values)


def _beside(recipe_path: Path, name: str | None) -> str | None:
    # A class file may lie next to the recipe that names it.
    if isinstance(name, str) and not Path(name).exists() and (recipe_path.parent / name).exists():
        return str(recipe_path.parent / name)
    return name


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals:
        raise RecipeError(f"an override reads key=value, got {override!r}")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"the value of {key} is not valid YAML: {text!r}") from error
    *outer, last = key.strip().split(".")
    for name in outer:
        inner = values.setdefault(name, {})
        if not isinstance(inner, dict):
            raise RecipeError(f"{override!r} reaches into {name}, which is {inner!r}, not a dictionary")
        values = inner
    values[last] = value


def _checked(name: str, value: Any, kind: Any) -> Any:
    """`value` as `kind`, or an error that says what was expected."""
    for option in _options(kind):
        fits, converted = _fit(value, option)
        if fits:
            return converted
    wanted = " or ".join(_spoken(option) for option in _options(kind))
    raise RecipeError(f"{name} must be {wanted}, got {value!r} ({type(value).__name__})")


def _options(kind: Any) -> tuple:
    return typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)


def _spoken(kind: Any) -> str:
    if kind is type(None):
        return "null"
    inner = typing.get_args(kind)
    return f"a list of {inner[0].__name__}" if inner else kind.__name__


def _fit(value: Any, kind: Any) -> tuple[bool, Any]:
    if kind is float:
        return _fit_float(value)
    if typing.get_origin(kind) is list:
        return _fit_list(value, typing.get_args(kind)[0])
    # bool is a subclass of int, and `epochs: true` is a mistake
    return isinstance(value, kind) and not (kind is int and isinstance(value, bool)), value


def _fit_list(value: Any, kind: Any) -> tuple[bool, Any]:
    if not isinstance(value, (list, tuple)):
        return False, value
    fits = [_fit(item, kind) for item in value]
    return all(fit for fit, _ in fits), [item for _, item in fits]


def _fit_float(value: Any) -> tuple[bool, Any]:
    # YAML 1.1 reads 1e-3 (no point) as text.
    try:
        return not isinstance(value, bool) and value is not None, float(value)
    except (TypeError, ValueError):
        return False, value


def _check_meaning(r: Recipe) -> None:
    for name, low in [
        ("batch_size", 1),
        ("accumulate", 1),
        ("epochs", 1),
        ("input_size", 1),
        ("workers", 0),
        ("val_every", 1),
        ("log_every", 1),
    ]:
        if getattr(r, name) < low:
            raise RecipeError(f"{name} must be at least {low}, got {getattr(r, name)}")
    for name, choices in [
        ("amp", (None, "float16", "bfloat16")),
        ("cache", ("none", "ram", "device")),
        ("clip_mode", ("norm", "value", "agc")),
    ]:
        if getattr(r, name) not in choices:
            raise RecipeError(f"{name} must be one of {', '.join(map(str, choices))}, got {getattr(r, name)!r}")
    if r.sched == "plateau":
        raise RecipeError("sched: plateau steps once an epoch, on a metric; schedules here step at every update")
    if r.teacher and (r.cache != "device" or r.mixes):
        raise RecipeError("a teacher needs cache=device, and no mixup and cutmix: it is asked once, for whole images")
    if not 0 <= r.teacher_share <= 1:
        raise RecipeError(f"teacher_share is a share, from 0 to 1, got {r.teacher_share}")
    if r.mixes and r.batch_size % 2:
        raise RecipeError(f"mixup and cutmix pair images: batch_size must be even, got {r.batch_size}")
    _check_schedule(r.resolution_schedule)


def _check_schedule(stages: list[dict]) -> None:
    ends = []
    for stage in stages:
        if set(stage) != {"until_epoch", "input_size"} or not all(isinstance(v, int) for v in stage.values()):
            raise RecipeError(f"a stage of resolution_schedule reads {{until_epoch: 10, input_size: 48}}, got {stage}")
        ends.append(stage["until_epoch"])
    if ends != sorted(set(ends)):
        raise RecipeError(f"resolution_schedule must name rising epochs, got until_epoch {ends}")
