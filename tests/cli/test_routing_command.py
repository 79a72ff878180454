"""`parameternet routing` as a person meets it."""

import json
import shutil
import sys
import tarfile
from pathlib import Path

import checkpoints
import pytest
import timm
from click.testing import CliRunner
from PIL import Image

from parameternet import DynamicConv, cli

PHOTOS = Path(__file__).parent.parent / "photos"
NAMES = {"n1": "cat.jpg", "n2": "coffee.jpg"}  # classes of the checkpoint, in words: tabby, espresso


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return checkpoints.write(tmp_path_factory.mktemp("weights") / checkpoints.NAME)


@pytest.fixture(autouse=True)
def recorded(folder, monkeypatch, tmp_path):
    checkpoints.record(monkeypatch, folder)
    monkeypatch.chdir(tmp_path)


def run(*arguments, code=0):
    done = CliRunner().invoke(cli.main, ["routing", *map(str, arguments)])
    assert done.exit_code == code, f"{done.output}\n{done.exception!r}"
    return done


def classes(folder, pictures=3):
    for name, photo in NAMES.items():
        (folder / name).mkdir(parents=True)
        for index in range(pictures):
            shutil.copy(PHOTOS / photo, folder / name / f"{index}.jpg")
    return folder


def test_photos_give_a_table_and_a_heat_map(tmp_path):
    done = run(checkpoints.NAME, PHOTOS)
    header, *rows = done.stdout.splitlines()
    assert " ".join(header.split()) == "layer experts image entropy overall entropy experts in use active"
    layers = [name for name, module in checkpoints.network().named_modules() if isinstance(module, DynamicConv)]
    assert [row.split()[0] for row in rows] == layers
    for row in rows:
        experts, picture, overall, in_use, active = map(float, row.split()[1:])
        assert experts == active == 4 and 0 < picture <= overall <= 1 and 1 < in_use <= 4
    assert done.stderr == "heat map: routing.png\n"
    with Image.open(tmp_path / "routing.png") as picture:
        assert picture.width > 2000 and picture.height > 500


def test_json_has_all_numbers_and_nothing_else(tmp_path):
    done = run(checkpoints.NAME, PHOTOS, "--json", "--output", tmp_path / "a.svg", "--batch-size", 2)
    answer = json.loads(done.stdout)
    assert answer["model"] == checkpoints.NAME and answer["images"] == 3 and answer["unreadable"] == []
    assert [row["label"] for row in answer["rows"]] == ["cat.jpg", "coffee.jpg", "rocket.jpg"]
    for layer in answer["layers"]:
        assert [len(row) for row in layer["routing_weights"] + layer["shares"]] == [4] * 6
        assert sum(layer["mean_shares"]) == pytest.approx(1)
        assert layer["num_experts"] == layer["active_experts"] == 4 and 1 < layer["experts_in_use"] < 4 + 1e-9
        assert 0 < layer["image_entropy"] < layer["overall_entropy"] + 1e-9 < 1 + 2e-9
    assert len({tuple(row) for row in answer["layers"][0]["shares"]}) == 3, "the photos differ"
    assert [path.name for path in tmp_path.iterdir()] == ["a.svg"]


def test_class_folders_and_their_tar_have_a_row_a_class(tmp_path):
    data = classes(tmp_path / "data")
    with tarfile.open(tmp_path / "data.tar", "w") as tar:
        tar.add(data, ".")
    of_folder, of_tar = (
        json.loads(run(checkpoints.NAME, path, "--json", "--per-class", 2).stdout) for path in (data, "data.tar")
    )
    assert of_folder["rows"] == [
        {"name": "n1", "label": "tabby", "images": 2, "is_class": True, "pictures": 2},
        {"name": "n2", "label": "espresso", "images": 2, "is_class": True, "pictures": 2},
    ]
    assert of_tar == of_folder
    photos = json.loads(run(checkpoints.NAME, *(PHOTOS / photo for photo in NAMES.values()), "--json").stdout)
    for layer, alone in zip(of_folder["layers"], photos["layers"], strict=True):
        assert layer["routing_weights"] == [pytest.approx(row, abs=1e-5) for row in alone["routing_weights"]]


def test_damaged_pictures_are_named_and_the_others_go_on(tmp_path):
    (tmp_path / "text.jpg").write_text("no image")
    done = run(checkpoints.NAME, "text.jpg", PHOTOS / "cat.jpg", "none.png", "--json", code=1)
    answer = json.loads(done.stdout)
    assert [row["label"] for row in answer["rows"]] == ["cat.jpg"]
    assert [found["path"] for found in answer["unreadable"]] == ["text.jpg", "none.png"]
    assert done.stderr.splitlines() == [
        "text.jpg: not an image, or of a format that Pillow does not read",
        "none.png: no such file",
        "heat map: routing.png",
    ]
    assert (tmp_path / "routing.png").is_file()


def test_a_static_network_has_no_experts_to_show(tmp_path):
    arguments = {**checkpoints.MODEL_ARGS, "dynamic": False}
    static = timm.create_model("parameternet_50m", num_classes=5, **arguments)
    checkpoints.write(tmp_path / "static", static, model_args=arguments)
    done = run(tmp_path / "static", PHOTOS, code=1)
    assert done.stderr == (
        "Error: expected a network with dynamic convolutions, but this ParameterNet has none: "
        "choose one of `parameternet list`, or make one with `parameternet upcycle`\n"
    )
    assert not (tmp_path / "routing.png").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["parameternet_50m.tin20", PHOTOS], 2, "closest: parameternet_50m.tin200"),
        ([checkpoints.NAME], 2, "Missing argument 'IMAGES...'"),
        ([checkpoints.NAME, "none.png"], 1, "could be read (the first is none.png: no such file): give image"),
        ([checkpoints.NAME, PHOTOS, "--output", "a.foo"], 2, "unsupported image format a.foo; use .png"),
        ([checkpoints.NAME, PHOTOS, "--output", "none/a.png"], 2, "the folder none does not exist"),
        ([checkpoints.NAME, PHOTOS, "--per-class", 0], 2, "0 is not in the range x>=1"),
    ],
)
def test_errors_say_what_to_do(tmp_path, arguments, code, message):
    done = run(*arguments, code=code)
    assert message in done.stderr and not done.stdout
    assert not list(tmp_path.iterdir())


def test_missing_matplotlib_names_the_install_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    done = run(checkpoints.NAME, PHOTOS / "cat.jpg", code=1)
    assert done.stdout.splitlines()[1].startswith("stem.conv")
    assert done.stderr == "Error: this needs the package matplotlib: pip install 'parameternet[plot]'\n"
