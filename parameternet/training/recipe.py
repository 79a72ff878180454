# ruff: noqa: RUF009 (`_field` is dataclasses.field with documentation)
"""A recipe: one YAML file that is the whole truth of a run."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import types
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from parameternet.training.errors import RecipeError, nearest

IMAGENET_MEAN = [0.485, 0.456, 0.406]
IMAGENET_STD = [0.229, 0.224, 0.225]


class Rule(NamedTuple):
    """The values that a field, or each item of a list, may have: words for the error message, and the check."""

    words: str
    holds: Callable[[Any], bool]


def _range(low: float, high: float = math.inf, *, low_open: bool = False, high_open: bool = False) -> Rule:
    """Numbers from `low` to `high`; an open end is not allowed itself."""
    if low_open or high_open or high == math.inf:
        start = f"above {low:g}" if low_open else f"at least {low:g}"
        words = start if high == math.inf else f"{start} and {'below' if high_open else 'at most'} {high:g}"
    else:
        words = f"from {low:g} to {high:g}"

    def holds(value: Any) -> bool:
        return (low < value if low_open else low <= value) and (value < high if high_open else value <= high)

    return Rule(words, holds)


def _one_of(*choices: str | None) -> Rule:
    return Rule(f"one of {', '.join(map(str, choices))}", lambda value: value in choices)


def _matching(pattern: str, words: str) -> Rule:
    return Rule(words, lambda value: re.fullmatch(pattern, value) is not None)


def _plain(value: Any) -> bool:
    """Whether a checkpoint and YAML can hold `value`: text, finite numbers, true, false, null, lists, dictionaries."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and _plain(item) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(_plain, value))
    return value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value))


_SHARE = _range(0, 1)
_SHARE_BELOW_1 = _range(0, 1, high_open=True)
# Beta(a, a) of a smaller `a` than that draws NaN.
_ALPHA = Rule("0, or from 0.001 to 100", lambda value: value == 0 or 0.001 <= value <= 100)
_COUNT = _range(1)
_SIDE = _range(1, 8192)
_POSITIVE = _range(0, low_open=True)
_NOT_NEGATIVE = _range(0)
_TEXT = Rule("printable text that is not empty", lambda value: value.isprintable() and bool(value.strip()))
_PLAIN = Rule("a dictionary of text, finite numbers, true, false, null, lists and dictionaries", _plain)
_SOURCE = Rule(
    f"{_TEXT.words}, or {_PLAIN.words}", lambda value: (_PLAIN if isinstance(value, dict) else _TEXT)[1](value)
)
_NUMBER = r"\d+(\.\d+)?"
_POLICY = _matching(
    rf"rand(-(m\d+|n\d+|p{_NUMBER}|mstd{_NUMBER}|mmax\d+|inc[01]|t(weights|3aw|3a)))*"
    rf"|augmix(-(m\d+|w\d+|d\d+|b[01]|a{_NUMBER}|mstd{_NUMBER}))*|(original|originalr|v0|v0r|3a)(-mstd{_NUMBER})?",
    "a policy of timm, e.g. rand-m7-mstd0.5-inc1, augmix-m5 or original",
)


def _field(default: Any, doc: str, rule: Rule | None = None, *, free: bool = False, length: int | None = None) -> Any:
    """A recipe field with its documentation.

    Args:
        rule: the values that it may have besides null; of a list, each item's.
        free: may change when a run is resumed, the result does not.
        length: items of a list.
    """
    metadata = {"doc": doc, "free": free, "rule": rule, "length": length}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class Recipe:
    """Everything a run depends on. `fields()` gives name, type, default and documentation of each."""

    # network
    model: str = _field("parameternet_50m", "timm name of the network", _TEXT)
    model_kwargs: dict = _field({}, "arguments of the network, e.g. {num_experts: 4}", _PLAIN)
    num_classes: int | None = _field(None, "classes; null: as many as the training data has", _COUNT)
    class_names: str | None = _field(
        None, "file with one class a line: `id<TAB>words`, or words alone", _TEXT, free=True
    )
    init: str | None = _field(
        None,
        "start from: 'pretrained' (the network's own weights), or any model: a name, a run folder, a weights folder, a "
        ".safetensors file, local-dir:DIR, hf-hub:ORG/NAME; null: random",
        _TEXT,
    )
    freeze: list[str] = _field(
        [], "parts that are not trained: names or patterns, e.g. [conv_stem, 'blocks.[0-2]']", _TEXT
    )
    drop_rate: float = _field(0.0, "dropout before the classifier", _SHARE_BELOW_1)
    drop_path_rate: float = _field(0.0, "stochastic depth", _SHARE_BELOW_1)

    # data
    train: str | dict | None = _field(
        None,
        "folder, .tar, `hfds/NAME[:split]`, `wds/FOLDER:shards`, or arguments of timm's create_dataset",
        _SOURCE,
        free=True,
    )
    val: str | dict | None = _field(
        None, "the same for validation; null: no validation, best = latest", _SOURCE, free=True
    )
    cache: str = _field(
        "none",
        "none | ram: decode every image once into memory, shared by the workers | device: onto the training device, "
        "where whole batches are augmented, by other draws than those of the other two",
        _one_of("none", "ram", "device"),
        free=True,
    )
    cache_size: int | None = _field(
        None, "cache: device: side to which images are resized and cropped first; null: they all have one size", _SIDE
    )
    input_size: int = _field(224, "side of training images, pixels", _SIDE)
    test_input_size: int | None = _field(None, "side of validation images, pixels; null: input_size", _SIDE)
    resolution_schedule: list[dict] = _field(
        [], "smaller sides first: [{until_epoch: 10, input_size: 48}, ...]; input_size after the last", _PLAIN
    )
    interpolation: str = _field(
        "bicubic",
        "bicubic | bilinear | nearest | box | hamming | lanczos | random (training only; bicubic in validation)",
        _one_of("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos", "random"),
    )
    crop_pct: float = _field(1.0, "share of the resized validation image that is kept", _range(0.1, 1))
    crop_mode: str | None = _field(None, "training crop: rrc (default), rkrc, rkrr", _one_of("rrc", "rkrc", "rkrr"))
    scale: list[float] = _field(
        [0.08, 1.0], "training crop: share of the area, from, to", _range(0, 4, low_open=True), length=2
    )
    ratio: list[float] = _field([0.75, 1.3333], "training crop: aspect ratio, from, to", _range(0.01, 100), length=2)
    hflip: float = _field(0.5, "probability of a horizontal flip", _SHARE)
    vflip: float = _field(0.0, "probability of a vertical flip", _SHARE)
    color_jitter: float | None = _field(None, "strength of colour jitter", _SHARE)
    auto_augment: str | None = _field(None, "timm's policy, e.g. rand-m7-mstd0.5-inc1", _POLICY)
    reprob: float = _field(0.0, "probability of random erasing", _SHARE)
    remode: str = _field(
        "pixel", "what random erasing fills in: const | rand | pixel", _one_of("const", "rand", "pixel")
    )
    no_aug: bool = _field(False, "no augmentation at all: resize and centre crop")
    mean: list[float] = _field(IMAGENET_MEAN, "channel means, scale 0 to 1", _SHARE, length=3)
    std: list[float] = _field(IMAGENET_STD, "channel standard deviations, scale 0 to 1", _range(0.001, 1), length=3)

    # targets
    smoothing: float = _field(0.0, "label smoothing", _SHARE_BELOW_1)
    mixup: float = _field(0.0, "mixup alpha; 0: off", _ALPHA)
    cutmix: float = _field(0.0, "cutmix alpha; 0: off", _ALPHA)
    mixup_prob: float = _field(1.0, "probability of mixing a batch", _SHARE)
    mixup_off_epoch: int = _field(0, "no mixup and cutmix from this epoch on; 0: never off", _NOT_NEGATIVE)
    teacher: str | None = _field(
        None,
        "model that knows the data's classes, named as for init: its answers to the whole images are mixed into the "
        "labels; needs cache: device",
        _TEXT,
    )
    teacher_share: float = _field(
        0.5, "share of the teacher's answers in what is taught; the labels have the rest", _SHARE
    )
    teacher_size: int | None = _field(None, "side at which the teacher sees the images, pixels; null: its own", _SIDE)
    bce: bool = _field(False, "binary cross-entropy instead of cross-entropy")

    # optimisation
    batch_size: int = _field(128, "images a step, over all processes together", _COUNT)
    val_batch_size: int | None = _field(
        None, "images a validation step and process; null: batch_size", _COUNT, free=True
    )
    accumulate: int = _field(1, "steps whose gradients are summed into one update", _COUNT)
    epochs: int = _field(100, "passes over the training data", _COUNT)
    opt: str = _field("adamw", "timm's optimiser name", _TEXT)
    lr: float = _field(1e-3, "learning rate after warm-up", _POSITIVE)
    momentum: float = _field(0.9, "momentum, or Adam's first beta", _SHARE_BELOW_1)
    weight_decay: float = _field(0.05, "weight decay; none on biases and norms", _NOT_NEGATIVE)
    opt_kwargs: dict = _field({}, "further arguments of the optimiser, e.g. {betas: [0.9, 0.99]}", _PLAIN)
    layer_decay: float | None = _field(
        None, "factor on the learning rate from each stage to the one below", _range(0, 1, low_open=True)
    )
    sched: str = _field("cosine", "timm's schedule, stepped at every update", _TEXT)
    sched_kwargs: dict = _field({}, "further arguments of timm's create_scheduler_v2", _PLAIN)
    warmup_epochs: float = _field(0.0, "epochs of linear warm-up", _NOT_NEGATIVE)
    warmup_lr: float = _field(1e-6, "learning rate at the start of warm-up", _NOT_NEGATIVE)
    min_lr: float = _field(0.0, "learning rate at the end", _NOT_NEGATIVE)
    clip_grad: float | None = _field(None, "largest norm of the gradients; null: no clipping", _POSITIVE)
    clip_mode: str = _field("norm", "norm | value | agc", _one_of("norm", "value", "agc"))
    ema_decay: float | None = _field(
        None,
        "decay of the averaged weights, warmed up; null: no averaging",
        _range(0, 1, low_open=True, high_open=True),
    )

    # execution
    amp: str | None = _field(None, "mixed precision: null | float16 | bfloat16", _one_of(None, "float16", "bfloat16"))
    channels_last: bool = _field(False, "memory format of images and weights")
    compile: bool = _field(False, "torch.compile the network")
    sync_bn: bool = _field(False, "batch statistics over all processes")
    seed: int = _field(0, "of everything random", _range(-(2**63), 2**63 - 1))
    device: str = _field("auto", "auto | cpu | cuda | cuda:1 | mps", _TEXT, free=True)
    workers: int = _field(2, "processes that read and augment, for each training process", _range(0, 1024), free=True)
    threads: int | None = _field(None, "threads of a process; null: torch's choice", _range(1, 1024), free=True)
    val_every: int = _field(1, "epochs between validations; the last epoch always has one", _COUNT, free=True)
    checkpoint_minutes: float = _field(
        10.0, "minutes between checkpoints in an epoch; 0: every update", _NOT_NEGATIVE, free=True
    )
    log_every: int = _field(50, "steps between reports and checks of the loss", _COUNT, free=True)

    # words for the card of a released checkpoint
    data_name: str | None = _field(None, "name of the data set", _TEXT, free=True)
    data_terms: str | None = _field(None, "terms under which its images may be used", _TEXT, free=True)
    license: str = _field("apache-2.0", "licence of the weights", _TEXT, free=True)

    def __post_init__(self):
        for item in dataclasses.fields(self):
            value = _typed(item.name, getattr(self, item.name), _TYPES[item.name])
            _check_range(item.name, value, item.metadata["rule"], item.metadata["length"])
            setattr(self, item.name, value)
        _check_together(self)

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
        overrides: values are YAML: `lr=0.1`, `scale=[0.3, 1]`, `val=null`, `model_kwargs.num_experts=8`. Of two for
            one key, the last holds.

    Raises:
        RecipeError: no such file, not YAML, a key that is there twice, an unknown key (the nearest one is named), a
            value of the wrong type or out of its range.
    """
    path = Path(path)
    try:
        values = _parse(path.read_text("utf-8"))
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not valid YAML: it is not UTF-8 text ({error})") from error
    except OSError as error:
        raise RecipeError(f"cannot read the recipe {path}: {error.strerror}; recipes lie in configs/train") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is not valid YAML: {error}") from error
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise RecipeError(f"{path} must hold `key: value` lines, got a {type(values).__name__}")
    for override in overrides:
        _apply(values, override)
    values["class_names"] = _beside(path, values.get("class_names"))
    return make_recipe(values)


class _Loader(yaml.SafeLoader):
    """Safe YAML in which a key that is there twice is an error; YAML would keep the last one silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        first: dict[Any, yaml.Node] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            value = self.construct_object(key)
            if value in first:
                lines = f"lines {first[value].start_mark.line + 1} and {key.start_mark.line + 1}"
                raise yaml.constructor.ConstructorError(problem=f"the key {value!r} is there twice, in {lines}")
            first[value] = key
        return super().construct_mapping(node, deep)


def _parse(text: str) -> Any:
    """YAML text as plain data.

    Raises:
        yaml.YAMLError: not YAML, or a key that is there twice.
    """
    try:
        return yaml.load(text, _Loader)
    except (ValueError, OverflowError, RecursionError) as error:  # a date that is none, nesting without end
        raise yaml.YAMLError(str(error)) from error


def make_recipe(values: dict[str, Any]) -> Recipe:
    """A recipe from a dictionary; an unknown key is an error that names the nearest one."""
    _check_names(values)
    return Recipe(**values)


def _check_names(values: dict[str, Any]) -> None:
    unknown = [key for key in values if key not in _TYPES]
    if unknown:
        key = str(unknown[0])
        raise RecipeError(f"unknown recipe key {key!r}{nearest(key, _TYPES, n=1)}")


def saved_recipe(text: str) -> Recipe:
    """The recipe of a run, from YAML or JSON text that training wrote. Ranges are not checked: versions differ in them.

    Raises:
        RecipeError: an unknown key, or a value of the wrong type.
    """
    recipe = Recipe()
    try:
        values = json.loads(text)  # YAML would read its 1e-05 as text
    except ValueError:
        values = _parse(text)
    _check_names(values)
    for name, value in values.items():
        setattr(recipe, name, _typed(name, value, _TYPES[name]))
    return recipe


def allowed(name: str) -> str:
    """The values that a field may have besides null, in words."""
    metadata = Recipe.__dataclass_fields__[name].metadata
    rule, length = metadata["rule"], metadata["length"]
    return f"{f'{length} numbers, each ' if length else ''}{rule.words}" if rule else "true or false"


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
        value = _parse(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"the value of {key} is not valid YAML: {text!r} ({error})") from error
    *outer, last = key.strip().split(".")
    for name in outer:
        inner = values.setdefault(name, {})
        if not isinstance(inner, dict):
            raise RecipeError(f"{override!r} reaches into {name}, which is {inner!r}, not a dictionary")
        values = inner
    values[last] = value


def _typed(name: str, value: Any, kind: Any) -> Any:
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
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return False, value
    try:
        return True, float(value)
    except (ValueError, OverflowError):
        return False, value


def _check_range(name: str, value: Any, rule: Rule | None, length: int | None) -> None:
    """Hold `value`, or each item of a list, against the field's rule.

    Raises:
        RecipeError: with the field, the value and what is allowed.
    """
    items = value if isinstance(value, list) else [value]
    if length is not None and len(items) != length:
        raise RecipeError(f"{name} must have {length} numbers, got {value!r}")
    for item in items:
        if item is None:
            continue
        if isinstance(item, float) and not math.isfinite(item):
            raise RecipeError(f"{name} must be a finite number, got {value!r}")
        if rule and not rule.holds(item):
            raise RecipeError(f"{name} must be {rule.words}, got {value!r}")


def _check_together(r: Recipe) -> None:
    """Conditions between fields. Each is (what must hold, the sentence where it does not)."""
    epochs = f"epochs is {r.epochs}"
    conditions = [
        (r.scale[0] <= r.scale[1], f"scale reads [from, to], and must not fall, got {r.scale}"),
        (r.ratio[0] <= r.ratio[1], f"ratio reads [from, to], and must not fall, got {r.ratio}"),
        (
            r.scale[1] <= 1 or r.crop_mode not in (None, "rrc"),
            f"scale must be at most 1 with crop_mode rrc, which crops a share of the area, got {r.scale}",
        ),
        (r.warmup_epochs <= r.epochs, f"warmup_epochs must be at most epochs, got {r.warmup_epochs:g}, and {epochs}"),
        (
            not r.warmup_epochs or r.warmup_lr <= r.lr,
            f"warmup_lr must be at most lr, where warm-up ends, got {r.warmup_lr:g}, and lr is {r.lr:g}",
        ),
        (r.min_lr <= r.lr, f"min_lr must be at most lr, got {r.min_lr:g}, and lr is {r.lr:g}"),
        (
            r.sched != "none" or not r.warmup_epochs,
            f"sched: none keeps one learning rate and has no warm-up: set warmup_epochs=0, got {r.warmup_epochs:g}",
        ),
        (
            r.sched != "plateau",
            "sched: plateau steps once an epoch, on a metric; schedules here step at every update",
        ),
        (
            r.mixup_off_epoch <= r.epochs,
            f"mixup_off_epoch must be at most epochs, got {r.mixup_off_epoch}, and {epochs}",
        ),
        (
            not r.teacher or (r.cache == "device" and not r.mixes),
            "a teacher needs cache=device, and no mixup and cutmix: it is asked once, for whole images",
        ),
        (
            not r.mixes or r.batch_size % 2 == 0,
            f"mixup and cutmix pair images: batch_size must be even, got {r.batch_size}",
        ),
        (
            r.clip_mode != "agc" or r.clip_grad is None or r.clip_grad <= 1,
            f"clip_grad must be at most 1 with clip_mode agc, a share of the weight's norm, got {r.clip_grad}",
        ),
    ]
    for holds, sentence in conditions:
        if not holds:
            raise RecipeError(sentence)
    _check_schedule(r.resolution_schedule, r.epochs)


def _check_schedule(stages: list[dict], epochs: int) -> None:
    ends = []
    for stage in stages:
        if set(stage) != {"until_epoch", "input_size"} or any(type(value) is not int for value in stage.values()):
            raise RecipeError(f"a stage of resolution_schedule reads {{until_epoch: 10, input_size: 48}}, got {stage}")
        if not _SIDE.holds(stage["input_size"]):
            raise RecipeError(f"resolution_schedule: input_size must be {_SIDE.words}, got {stage}")
        ends.append(stage["until_epoch"])
    if ends != sorted(set(ends)) or min(ends, default=1) < 1 or max(ends, default=1) > epochs:
        raise RecipeError(
            f"resolution_schedule must name rising epochs, from 1 to epochs ({epochs}), got until_epoch {ends}"
        )
