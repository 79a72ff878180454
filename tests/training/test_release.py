import json
import shutil
import sys

import pytest
import torch

from parameternet import files, training, weights
from parameternet.hub import release
from parameternet.hub.release import half, record
from parameternet.training import CheckpointError, load_recipe, run, validate
from parameternet.training.hub_config import class_labels


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    return tmp_path_factory.mktemp("run"), tmp_path_factory.mktemp("weights")


@pytest.fixture
def released(places, recipe, pictures, tmp_path):
    """(run folder, checkpoint folder, what `release` returned)"""
    folder, shelf = places
    if not (folder / "best.safetensors").exists():
        names = folder / "names.txt"
        names.write_text("blue\tthe sky\ngreen\tgrass\nred\ta rose\n")
        run(recipe(class_names=str(names), test_input_size=40, data_name="Colours", epochs=1), folder)
    found = release(
        folder, "test_efficientnet.colours", str(pictures / "val"), destination=shelf, records=shelf / "records.json",
        data_terms="Free.", workers=0,
    )  # fmt: skip
    return folder, shelf / "test_efficientnet.colours", found


def test_a_release_is_a_folder_in_the_hubs_layout(released):
    _, folder, _ = released
    names = {path.name for path in folder.iterdir()}
    assert names == {"model.safetensors", "config.json", "README.md", "recipe.yaml", "history.csv", "curves.png"}
    assert {path.name for path in folder.parent.iterdir()} == {folder.name, "records.json"}
    config = json.loads((folder / "config.json").read_text())
    assert (config["architecture"], config["num_classes"]) == ("test_efficientnet", 3)
    assert config["label_names"] == ["blue", "green", "red"]
    assert config["label_descriptions"]["red"] == "a rose"
    cfg = config["pretrained_cfg"]
    # Other libraries read one size: that of the evaluation.
    assert (cfg["tag"], cfg["input_size"]) == ("colours", [3, 40, 40]) and "test_input_size" not in cfg
    assert cfg["license"] == "apache-2.0"


def test_weights_are_half_precision_and_statistics_are_not(released):
    run_folder, folder, _ = released
    trained, small = weights.read(run_folder / "best.safetensors"), weights.read(folder / "model.safetensors")
    assert small.keys() == trained.keys()
    assert small["classifier.weight"].dtype == torch.float16
    assert torch.equal(small["classifier.weight"], trained["classifier.weight"].half())
    assert torch.equal(small["bn1.running_var"], trained["bn1.running_var"])
    assert small["bn1.num_batches_tracked"].dtype == torch.int64


def test_the_cards_figures_are_those_of_the_written_file(released, pictures):
    _, folder, found = released
    measured = validate(folder, str(pictures / "val"), workers=0)
    assert measured["agrees"] is True
    assert measured["top1"] == found["top1"]
    results = json.loads((folder / "config.json").read_text())["results"]
    assert (results["top1"], results["images"], results["data"]) == (measured["top1"], 15, "Colours")
    card = (folder / "README.md").read_text()
    assert f"| top-1 | {measured['top1']:.2f} % ± {measured['top1_interval']:.2f} (95 %) |" in card
    assert "## Data\n\nFree." in card
    assert "15 validation images" in card
    assert "mixup 0.2" in card


@pytest.mark.parametrize("odd", ["\x0b", "\x1c", "\x85", "\u2028"])
def test_only_line_breaks_end_a_class_name(tmp_path, odd):
    (tmp_path / "names.txt").write_text(f"a{odd}b\nc\n", "utf-8")
    assert class_labels(str(tmp_path / "names.txt"), None, 2)["label_names"] == [f"a{odd}b", "c"]


def test_the_record_is_of_the_file(released):
    _, folder, found = released
    record = json.loads((folder.parent / "records.json").read_text())["test_efficientnet.colours"]
    assert record == {
        "sha256": files.sha256(folder / "model.safetensors"),
        "bytes": (folder / "model.safetensors").stat().st_size,
    }
    assert found["sha256"] == record["sha256"]


def test_digests_of_replaced_files_stay_known(tmp_path):
    path = tmp_path / "records.json"
    for digest in ("a", "b", "b", "c"):
        record("net.x", {"sha256": digest, "bytes": 1}, path)
    record("other.x", {"sha256": "d", "bytes": 1}, path)
    assert json.loads(path.read_text()) == {
        "net.x": {"sha256": "c", "bytes": 1, "earlier": ["b", "a"]},
        "other.x": {"sha256": "d", "bytes": 1},
    }


def test_published_recipe_contains_no_local_paths(released):
    _, folder, _ = released
    recipe = load_recipe(folder / "recipe.yaml")
    assert (recipe.train, recipe.val, recipe.class_names) == ("train", "val", "names.txt")
    assert recipe.data_terms == "Free."


def test_timm_reads_the_folder(released):
    import timm

    _, folder, _ = released
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert model.num_classes == 3
    assert torch.equal(model.classifier.weight, weights.read(folder / "model.safetensors")["classifier.weight"].float())


@pytest.mark.parametrize("name", ["test_resnet.x", "test_efficientnet", "test_efficientnet.", "test_efficientnet.a/b"])
def test_a_name_of_something_else_is_refused(released, pictures, name):
    with pytest.raises(CheckpointError, match=r"named test_efficientnet\.<tag>"):
        release(released[0], name, str(pictures / "val"))


def test_only_run_folders_are_released(tmp_path, pictures):
    with pytest.raises(CheckpointError, match="is not a run folder"):
        release(tmp_path, "a.b", str(pictures / "val"))


def test_a_failed_release_leaves_the_old_one(released, monkeypatch, pictures):
    run_folder, folder, _ = released
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    module = sys.modules["parameternet.hub.release"]
    monkeypatch.setattr(module, "validate", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        release(run_folder, folder.name, str(pictures / "val"), destination=folder.parent)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert not list(folder.parent.glob(".*"))


def test_what_float16_cannot_hold_is_refused():
    with pytest.raises(CheckpointError, match="w has values that float16 cannot hold"):
        half({"w": torch.tensor([1e6])}, keep=set())
    kept = half({"v": torch.tensor([1e-9]), "n": torch.tensor(3)}, keep={"v"})
    assert (kept["v"].dtype, kept["n"].dtype) == (torch.float32, torch.int64)


def test_the_card_tells_of_the_run_that_this_one_started_from(tmp_path, recipe, pictures):
    plain = dict(model="parameternet_50m", epochs=1, drop_path_rate=0.0, ema_decay=None)
    run(recipe(**plain, model_kwargs={"dynamic": False}), tmp_path / "static")
    run(recipe(**plain, lr=1e-4, init=str(tmp_path / "static")), tmp_path / "dynamic")
    release(tmp_path / "dynamic", "parameternet_50m.colours", str(pictures / "val"), destination=tmp_path, workers=0)
    folder = tmp_path / "parameternet_50m.colours"
    assert load_recipe(folder / "init_recipe.yaml").model_kwargs == {"dynamic": False}
    assert (folder / "init_history.csv").read_text() == (tmp_path / "static" / "history.csv").read_text()
    card = (folder / "README.md").read_text()
    assert "Averaged over 15 validation images, a layer uses" in card and "![Routing weights by layer" in card
    assert (folder / "routing.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((folder / "config.json").read_text())["results"]
    assert [*results["ablation"]] == ["own", "mean weights", "mean shares", "mean sum"]
    assert results["ablation"]["own"] == results["top1"] and "| the image's own | " in card
    first, then = (
        card.index("First its static baseline"),
        card.index("Then this network, whose experts started as parts"),
    )
    assert first < card.index("from random weights") < then < card.index("1 epoch (6 updates) from static")
    assert str(tmp_path) not in card


def test_release_accepts_old_recipes_with_values_out_of_range(places, released, tmp_path, pictures):
    old = tmp_path / "run"
    shutil.copytree(places[0], old)
    recipe = (old / "recipe.yaml").read_text()
    (old / "recipe.yaml").write_text(recipe.replace("warmup_epochs: 0.5", "warmup_epochs: 50.0"))
    assert "warmup_epochs: 50.0" in (old / "recipe.yaml").read_text()
    found = release(old, "test_efficientnet.old", str(pictures / "val"), destination=tmp_path, workers=0)
    assert found["top1"] == released[2]["top1"]


def test_the_former_name_warns_and_is_the_same_function():
    with pytest.warns(DeprecationWarning, match=r"training\.release is deprecated, use parameternet\.hub\.release"):
        assert training.release is release
