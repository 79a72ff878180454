import dataclasses

import pytest
import yaml

from parameternet.training import Recipe, RecipeError, load_recipe


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
            "rising epochs",
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
