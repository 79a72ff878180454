"""Where files lie on this machine stays on this machine: released, published, upcycled, exported."""

import json
import zipfile
from pathlib import Path

import checkpoints
import numpy as np
import pytest
import yaml
from click.testing import CliRunner
from PIL import Image
from server import TOKEN

from parameternet import cli, export, weights
from parameternet.hub import publish, release, write_card
from parameternet.models import loading
from parameternet.training import Recipe, checkpoint

SECRET = "customer-of-ours"  # a folder that all paths go through


@pytest.fixture
def secret(tmp_path):
    folder = tmp_path / SECRET / "disk"
    folder.mkdir(parents=True)
    return folder


def parts(path):
    """(name, content) of a file, and of what is packed inside it."""
    yield path.name, path.read_bytes()
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            yield from ((name, name.encode() + archive.read(name)) for name in archive.namelist())


def assert_private(*folders):
    """Nothing below the folders names SECRET or this checkout."""
    places = (SECRET.encode(), str(Path(__file__).parents[2]).encode(), b"site-packages")
    for path in (path for folder in folders for path in Path(folder).rglob("*") if path.is_file()):
        for name, content in parts(path):
            found = [place for place in places if place in content]
            assert not found, f"{found} in {name} of {path.name}"


def write_run(folder, root, **fields):
    """A run folder whose recipe and config name paths of the machine wherever there is a place for one."""
    folder.mkdir(parents=True)
    config = checkpoints.config(upcycled_from=f"{root}/dense.safetensors", results={"data": f"{root}/data"})
    checkpoint.save_weights(folder / loading.BEST, checkpoints.network().state_dict(), config)
    values = {"model": "parameternet_50m", "model_kwargs": checkpoints.MODEL_ARGS, "data_name": "Five", **fields}
    recipe = yaml.safe_load(Recipe().to_yaml()) | values
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "history.csv").write_text("epoch,updates,seconds\n1,5,2\n")
    return folder


def draw(folder):
    rng = np.random.default_rng(0)
    for name in checkpoints.LABELS:
        (folder / name).mkdir(parents=True)
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(folder / name / "0.png")
    return folder


FIELDS = {
    "folder": {"train": "ROOT/train", "val": "ROOT/val"},
    "dictionary": {"train": {"root": "ROOT/train", "name": "hfds//ROOT/set", "split": "train", "more": ["ROOT/a"]}},
    "wds": {"train": "wds/ROOT/shards:train-{0..9}.tar", "val": "wds//home/SECRET/shards:val.tar"},
    "hfds": {"train": "hfds/ROOT/set"},
    "home": {"train": "~/SECRET/train", "val": "~me/SECRET/val"},
    "above": {"train": "../../SECRET/train"},
    "init": {"init": "ROOT/run"},
    "local-dir": {"init": "local-dir:ROOT/run", "teacher": "local-dir:ROOT/teacher"},
    "class names": {"class_names": "ROOT/names.txt", "teacher": "ROOT/teacher.safetensors"},
    "words": {"data_name": "Five of ROOT/train", "data_terms": "See ROOT/terms.txt.", "license": "ROOT/LICENSE"},
    "Windows": {"train": r"C:\Users\SECRET\train", "val": r"\\server\SECRET\val"},
    "model_kwargs": {"model_kwargs": {**checkpoints.MODEL_ARGS, "act_layer": None}, "train": "file:///SECRET/x"},
}


def filled(value, root):
    text = json.dumps(value).replace("ROOT", str(root)).replace("SECRET", SECRET)
    return json.loads(text)


@pytest.mark.parametrize("kind", FIELDS)
def test_a_published_run_names_no_path(kind, secret, tmp_path, monkeypatch, hub):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    run = write_run(secret / "run", secret, **filled(FIELDS[kind], secret))
    publish(run, "somebody/net")
    (tmp_path / "hub").mkdir()
    for name, data in hub.files("somebody/net").items():
        (tmp_path / "hub" / name).write_bytes(data)
    assert {"recipe.yaml", "history.csv", "README.md"} <= set(hub.files("somebody/net"))
    assert_private(tmp_path / "hub")
    assert loading.load(tmp_path / "hub").verified
    assert SECRET not in write_card(run)


@pytest.mark.parametrize("kind", ["dictionary", "wds", "local-dir"])
def test_a_released_checkpoint_names_no_path(kind, secret, tmp_path):
    run = write_run(secret / "run", secret, **filled(FIELDS[kind], secret))
    release(run, "parameternet_50m.five", str(draw(secret / "val")), destination=tmp_path / "out", workers=0)
    assert_private(tmp_path / "out")
    assert loading.load(tmp_path / "out" / "parameternet_50m.five").config["results"]["images"] == 5


@pytest.mark.parametrize("form", ["{}", "local-dir:{}", "file"])
def test_an_upcycled_folder_does_not_say_where_its_source_was(form, secret, tmp_path):
    checkpoints.write(secret / "dense")
    checkpoint.save_weights(secret / "dense.safetensors", checkpoints.network().state_dict(), checkpoints.config())
    source = str(secret / "dense.safetensors") if form == "file" else form.format(secret / "dense")
    done = CliRunner().invoke(cli.main, ["upcycle", source, "-o", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert_private(tmp_path / "out")
    assert weights.config(f"local-dir:{tmp_path / 'out'}")["upcycled_from"].startswith("dense")


FORMATS = [("torchscript", ".torchscript"), ("onnx", ".onnx"), ("torch_export", ".pt2"), ("openvino", ".xml")]
NEEDS = {"onnx": ("onnx", "onnxruntime"), "openvino": ("openvino",)}


@pytest.mark.parametrize(("format", "suffix"), FORMATS)
def test_an_exported_file_names_no_path(format, suffix, secret, tmp_path):
    for package in NEEDS.get(format, ()):
        pytest.importorskip(package)
    folder = checkpoints.write(secret / "net", upcycled_from=f"{secret}/x", results={"data": f"{secret}/data"})
    (tmp_path / "out").mkdir()
    made = export.export(folder, tmp_path / "out" / f"net{suffix}", format, batch=2)
    assert made.files
    assert_private(tmp_path / "out")
