import dataclasses
import datetime
import json
import math
import re
import shutil

import pytest
import torch
import yaml
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from parameternet.training import Recipe, RecipeError, Reporter, load_recipe, run
from parameternet.training.recipe import saved_recipe


def write(tmp_path, **values):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_what_the_file_says_is_what_the_recipe_holds(tmp_path):
    r = load_recipe(write(tmp_path, model="ghostnet_050", lr=0.5, scale=[0.3, 1]))
    assert (r.model, r.lr, r.scale) == ("ghostnet_050", 0.5, [0.3, 1.0])
    assert r.epochs == Recipe().epochs


@pytest.mark.parametrize(
    ("override", "field", "value"),
    [
        ("lr=0.1", "lr", 0.1),
        ("lr=1e-3", "lr", 1e-3),  # YAML reads this one as text
        ("epochs=7", "epochs", 7),
        ("val=null", "val", None),
        ("scale=[0.5, 1]", "scale", [0.5, 1.0]),
        ("model_kwargs.num_experts=8", "model_kwargs", {"width": 1, "num_experts": 8}),
        ("opt_kwargs.a.b=true", "opt_kwargs", {"a": {"b": True}}),
        ("freeze=[conv_stem]", "freeze", ["conv_stem"]),
    ],
)
def test_overrides_replace_any_field(tmp_path, override, field, value):
    path = write(tmp_path, model_kwargs={"width": 1}, lr=3)
    assert getattr(load_recipe(path, [override]), field) == value


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"weight_decai": 1}, "unknown recipe key 'weight_decai'; closest: weight_decay"),
        ({"lr": "fast"}, "lr must be float, got 'fast'"),
        ({"epochs": 2.5}, "epochs must be int, got 2.5"),
        ({"epochs": True}, "epochs must be int"),
        ({"hflip": None}, "hflip must be float, got None"),
        ({"mean": [0.5, "x"]}, "mean must be a list of float"),
        ({"amp": "fp16"}, "amp must be one of None, float16, bfloat16, got 'fp16'"),
        ({"cache": "disk"}, "cache must be one of none, ram"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"mixup": 0.1, "batch_size": 7}, "batch_size must be even, got 7"),
        ({"sched": "plateau"}, "plateau"),
        ({"resolution_schedule": [{"until": 3}]}, "until_epoch: 10, input_size: 48"),
        (
            {
                "resolution_schedule": [
                    {"until_epoch": 5, "input_size": 32},
                    {"until_epoch": 3, "input_size": 48},
                ]
            },
            "must increase",
        ),
    ],
)
def test_errors_say_what_was_expected(tmp_path, values, message):
    with pytest.raises(RecipeError) as error:
        load_recipe(write(tmp_path, **values))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"), [("a: [", "not valid YAML"), ("- 1", "key: value"), (None, "cannot read the recipe")]
)
def test_a_file_that_is_no_recipe(tmp_path, text, message):
    path = tmp_path / "x.yaml"
    if text:
        path.write_text(text)
    with pytest.raises(RecipeError, match=message):
        load_recipe(path)


def test_a_bad_override_says_how_one_reads(tmp_path):
    with pytest.raises(RecipeError, match="key=value"):
        load_recipe(write(tmp_path), ["lr"])
    with pytest.raises(RecipeError, match="not a dictionary"):
        load_recipe(write(tmp_path, lr=1.0), ["lr.x=1"])


def test_the_resolved_recipe_reads_back_as_itself(tmp_path, recipe):
    path = tmp_path / "resolved.yaml"
    path.write_text(recipe(lr=1e-5, model_kwargs={"drop_rate": 0.1}).to_yaml())
    assert load_recipe(path) == recipe(lr=1e-5, model_kwargs={"drop_rate": 0.1})


def test_a_class_file_may_lie_beside_the_recipe(tmp_path):
    (tmp_path / "names.txt").write_text("a\nb\n")
    assert load_recipe(write(tmp_path, class_names="names.txt")).class_names == str(tmp_path / "names.txt")


def test_the_schedule_of_sizes():
    r = Recipe(
        input_size=64, resolution_schedule=[dict(until_epoch=2, input_size=32), dict(until_epoch=3, input_size=48)]
    )
    assert [r.size_at(epoch) for epoch in range(5)] == [32, 32, 48, 64, 64]


def test_only_fields_that_decide_the_result_count_as_differences():
    assert Recipe(workers=1).differences(Recipe(workers=3, val_every=2, train="elsewhere")) == []
    assert Recipe(lr=0.1).differences(Recipe(lr=0.2)) == ["lr: 0.1 -> 0.2"]


def test_every_field_is_documented():
    assert all(doc for _, _, doc in Recipe.fields())
    assert len(Recipe.fields()) == len(dataclasses.fields(Recipe))


# ------------------------------------------------------------------------------------------------- every field

OUT_OF_RANGE = {
    "model": ["", " ", "a\x1b[31m"],
    "model_kwargs": [{"a": math.nan}, {"a": datetime.date(2026, 1, 1)}, {1: 2}, {"a": [{"b": math.inf}]}],
    "num_classes": [0, -1],
    "class_names": [""],
    "init": ["", "a\0b"],
    "freeze": [[""], ["a", " "]],
    "drop_rate": [-0.1, 1, 2, math.nan],
    "drop_path_rate": [-0.1, 1, math.inf],
    "train": ["", {"root": math.nan}],
    "val": ["", {1: 2}],
    "cache": ["", "disk", "RAM"],
    "cache_size": [0, -3, 10**6],
    "input_size": [0, -1, 10**6],
    "test_input_size": [0, -1, 10**6],
    "resolution_schedule": [
        [{"until_epoch": 1}],
        [{"until_epoch": True, "input_size": 16}],
        [{"until_epoch": 0, "input_size": 16}],
        [{"until_epoch": 1, "input_size": 0}],
        [{"until_epoch": 1, "input_size": 16}] * 2,
        [{"until_epoch": 101, "input_size": 16}],
        [{"until_epoch": 1.5, "input_size": 16}],
    ],
    "interpolation": ["", "cubic"],
    "crop_pct": [0, -1, 1.1, 1e-9, math.nan],
    "crop_mode": ["", "center"],
    "scale": [[0.5], [], [0.2, 0.5, 1], [0, 1], [-1, 1], [1, 0.5], [0.5, 1.5], [0.1, math.inf], [math.nan, 1]],
    "ratio": [[1], [0, 1], [-1, 1], [2, 1], [1, 1e9], [math.nan, math.nan]],
    "hflip": [-0.1, 7, math.nan],
    "vflip": [-1, 1.5, math.inf],
    "color_jitter": [-0.1, 2, math.nan],
    "auto_augment": ["", "rand-x3", "rand-foo", "rand_m3", "random", "rand-m-3", "rand-tnothing", "v1", "augmix-n3"],
    "reprob": [-0.1, 3],
    "remode": ["", "noise"],
    "mean": [[0.5], [0.5] * 4, [0.5, 0.5, math.nan], [123.7, 116.3, 103.5]],
    "std": [[0.5], [0, 1, 1], [-1, 1, 1], [58.4, 57.1, 57.4]],
    "smoothing": [-0.1, 1, 3, math.nan],
    "mixup": [-1, math.nan, math.inf],
    "cutmix": [-1, math.nan, math.inf],
    "mixup_prob": [-0.5, 1.5],
    "mixup_off_epoch": [-1, 101],
    "teacher": ["", "somewhere"],
    "teacher_share": [-0.1, 1.1, math.nan],
    "teacher_size": [0, -5],
    "batch_size": [0, -4],
    "val_batch_size": [0, -1],
    "accumulate": [0, -1],
    "epochs": [0, -1],
    "opt": [""],
    "lr": [0, -0.1, math.nan, math.inf, ".nan"],
    "momentum": [-0.1, 1, 2],
    "weight_decay": [-0.1, math.nan, math.inf],
    "opt_kwargs": [{"eps": math.nan}, {1: 2}],
    "layer_decay": [0, -1, 1.5],
    "sched": ["", "plateau"],
    "sched_kwargs": [{"a": math.inf}],
    "warmup_epochs": [-1, 101, math.nan],
    "warmup_lr": [-1e-3, math.nan],
    "min_lr": [-1e-3, 1, math.nan],
    "clip_grad": [-1, 0, math.nan, math.inf],
    "clip_mode": ["", "max"],
    "ema_decay": [-0.1, 0, 1, 2, math.nan],
    "amp": ["", "float8"],
    "seed": [2**63, -(2**63) - 1],
    "device": [""],
    "workers": [-1, 10**6],
    "threads": [0, -2, 10**6],
    "val_every": [0, -1],
    "checkpoint_minutes": [-1, math.nan, math.inf],
    "log_every": [0, -50],
    "data_name": ["", "a\nb"],
    "data_terms": [""],
    "license": [""],
}
SWITCHES = {"no_aug", "bce", "channels_last", "compile", "cuda_graph", "sync_bn", "scale_router_lr"}
NULLABLE = {name for name, default, _ in Recipe.fields() if default is None}


def test_the_table_of_bad_values_has_every_field():
    assert OUT_OF_RANGE.keys() | SWITCHES == {name for name, _, _ in Recipe.fields()}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in OUT_OF_RANGE for value in OUT_OF_RANGE[name]])
def test_values_out_of_range_are_named_with_their_field(name, value):
    with pytest.raises(ValueError, match=rf"\b{name}\b") as error:
        Recipe(**{name: value})
    assert isinstance(error.value, RecipeError)
    assert len(str(error.value)) < 300


@pytest.mark.parametrize("name", [name for name, _, _ in Recipe.fields()])
@pytest.mark.parametrize("value", [b"1", {1}, print, 1j, [[]], None, True, [math.nan], 10**400], ids=repr)
def test_values_of_another_type_are_named_with_their_field(name, value):
    if (value is None and name in NULLABLE) or (value is True and name in SWITCHES):
        return
    if value == 10**400 and type(dict((n, d) for n, d, _ in Recipe.fields())[name]) is int and name not in OUT_OF_RANGE:
        return
    if value == 10**400 and name in ("num_classes", "val_batch_size", "batch_size", "accumulate", "epochs", "val_every",
                                     "log_every"):  # fmt: skip
        return  # whole numbers have no end
    with pytest.raises(RecipeError, match=rf"\b{name}\b"):
        Recipe(**{name: value})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(epochs=5, warmup_epochs=50), "warmup_epochs must be at most epochs, got 50, and epochs is 5"),
        (dict(warmup_epochs=1, lr=1e-3, warmup_lr=1), "warmup_lr must be at most lr"),
        (dict(lr=0.1, min_lr=0.2), "min_lr must be at most lr"),
        (dict(sched="none", warmup_epochs=1), "no warmup: set warmup_epochs=0"),
        (dict(epochs=5, mixup_off_epoch=6), "mixup_off_epoch must be at most epochs"),
        (dict(clip_mode="agc", clip_grad=5), "clip_grad must be at most 1 with clip_mode agc"),
        (dict(scale=[0.5, 2]), "scale must be at most 1 with crop_mode rrc"),
    ],
)
def test_fields_that_contradict_each_other(values, message):
    with pytest.raises(RecipeError, match=message):
        Recipe(**values)
    Recipe(crop_mode="rkrr", scale=[0.5, 2])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr: 0.1\nepochs: 3\nlr: 0.2\n", "duplicate key 'lr' in lines 1 and 3"),
        ("model_kwargs:\n  a: 1\n  a: 2\n", "duplicate key 'a' in lines 2 and 3"),
        ("model_kwargs: {a: 1, 'a': 2}\n", "duplicate key 'a'"),
        ("resolution_schedule: [{until_epoch: 1, until_epoch: 2, input_size: 3}]", "duplicate key 'until_epoch'"),
        ("data_name: 2026-99-99", "not valid YAML"),
    ],
)
def test_a_duplicate_key_is_an_error(tmp_path, text, message):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=message):
        load_recipe(path)


def test_a_file_that_is_not_utf8_is_said(tmp_path):
    (tmp_path / "x.yaml").write_bytes(b"data_name: caf\xe9")
    with pytest.raises(RecipeError, match="not UTF-8"):
        load_recipe(tmp_path / "x.yaml")


def test_last_override_wins_but_duplicate_keys_are_rejected(tmp_path):
    path = write(tmp_path, lr=1.0)
    assert load_recipe(path, ["lr=2", "lr=3"]).lr == 3
    with pytest.raises(RecipeError, match=r"model_kwargs .*duplicate key 'a'"):
        load_recipe(path, ["model_kwargs={a: 1, a: 2}"])


def test_a_merged_mapping_may_be_overridden(tmp_path):
    (tmp_path / "x.yaml").write_text("opt_kwargs: &a {eps: 1.0, foreach: true}\nmodel_kwargs: {<<: *a, eps: 2.0}\n")
    assert load_recipe(tmp_path / "x.yaml").model_kwargs == {"eps": 2.0, "foreach": True}


# ------------------------------------------------------------------------------ any value trains, or is refused


class FirstStep(Exception):
    pass


class UntilFirstStep(Reporter):
    def step(self, *_):
        raise FirstStep


_NUMBERS = st.one_of(
    st.sampled_from([-1, 0, 1, 2, 3, 5, 24, 10**30, True, -0.5, 0.0, 0.05, 0.3, 0.999, 1.0, 1.5, 7.0, 1e30, 1e-30]),
    st.sampled_from([math.nan, math.inf, -math.inf]),
    st.floats(0, 1),
)
_WORDS = st.sampled_from(
    ["", " ", "none", "random", "rrc", "ram", "device", "bilinear", "lanczos", "rand-m3", "rand-m9-n3-mstd0.5-inc1",
     "augmix-m2", "original", "v0r", "3a", "cosine", "step", "sgd", "lion", "const", "rand", "norm", "value", "agc",
     "bfloat16", "float16", "test_efficientnet", "test_vit", "pretrained?", "cpu", "1e-3", "a\0", "\ud800", "/no/such"]
)  # fmt: skip
_PLAIN = st.one_of(st.none(), _NUMBERS, _WORDS)
_NAMES = st.sampled_from(
    ["", "a", "eps", "betas", "stem_size", "in_chans", "act_layer", "until_epoch", "input_size", "k"]
)
_DICTS = st.dictionaries(_NAMES, st.one_of(_PLAIN, st.lists(_NUMBERS, max_size=2)), max_size=2)
_ANY = st.one_of(
    _PLAIN, st.lists(_NUMBERS, max_size=4), st.lists(_WORDS, max_size=2), _DICTS, st.lists(_DICTS, max_size=2)
)
_SIDES = st.integers(1, 40)


def _kind(name: str, kind: object) -> st.SearchStrategy:
    """Values of a field's own type, so that many examples reach the network."""
    own = {
        "model_kwargs": _DICTS,
        "opt_kwargs": _DICTS,
        "sched_kwargs": _DICTS,
        "scale": st.lists(st.floats(0.01, 1), min_size=2, max_size=2).map(sorted),
        "ratio": st.lists(st.floats(0.01, 100), min_size=2, max_size=2).map(sorted),
        "mean": st.lists(st.floats(0, 1), min_size=3, max_size=3),
        "std": st.lists(st.floats(0, 1), min_size=3, max_size=3),
        "freeze": st.lists(st.sampled_from(["conv_stem", "blocks.*", "classifier", "*", "nothing", ""]), max_size=2),
        "resolution_schedule": st.lists(
            st.fixed_dictionaries({"until_epoch": st.integers(0, 3), "input_size": _SIDES}), max_size=2
        ),
    }
    by_type = {"bool": st.booleans(), "int": _SIDES, "float": _NUMBERS, "str": _WORDS}
    return own[name] if name in own else next(found for word, found in by_type.items() if word in str(kind))


_USED = {item.name: _kind(item.name, item.type) for item in dataclasses.fields(Recipe)}


@st.composite
def changes(draw):
    """One or two fields with any values."""
    names = draw(st.lists(st.sampled_from(sorted(_USED)), min_size=1, max_size=2, unique=True))
    return {name: draw(_USED[name] if draw(st.integers(0, 4)) else _ANY) for name in names}


@given(changes())
@settings(deadline=None, max_examples=250, suppress_health_check=list(HealthCheck))
def test_any_field_value_trains_or_is_rejected_before_writing(tmp_path, recipe, changed):
    assume(changed.get("compile") is not True)  # compiling takes a minute, and decides nothing here
    assume(not isinstance(changed.get("workers"), int) or changed["workers"] < 4 or changed["workers"] > 1024)
    folder = tmp_path / "run"
    shutil.rmtree(folder, ignore_errors=True)
    plain = dict(mixup=0.0, cutmix=0.0, warmup_epochs=0.0)
    try:
        run(recipe(**{**plain, **changed}), folder, UntilFirstStep())
    except FirstStep:
        pass
    except ValueError as error:
        named = [name for name in changed if re.search(rf"\b{name}\b", str(error))]
        assert named, f"{type(error).__name__}: {error}"
        assert not folder.exists(), list(folder.iterdir())
    finally:
        torch.set_num_threads(1)


def test_a_saved_recipe_is_the_same_from_yaml_and_from_json(recipe):
    r = recipe(lr=1e-5, weight_decay=1e-30, model_kwargs={"a": 1e-7, "b": [None, True, "x"]})
    r.warmup_epochs = 50.0  # an earlier version had no ranges
    assert saved_recipe(json.dumps(dataclasses.asdict(r))).differences(r) == []
    assert saved_recipe(r.to_yaml()) == r
