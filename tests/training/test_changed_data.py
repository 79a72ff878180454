"""A run never resumes on other images or labels, and reports every image that it skips."""

from __future__ import annotations

import io
import json
import shutil

import numpy as np
import pytest
import torch
from pictures import draw, pack
from PIL import Image
from stopping import Stop
from test_run import load_rows
from test_teacher import ask, network, taught, write  # noqa: F401

from parameternet.training import CheckpointError, DataError, Interrupted, Reporter, run, validate
from parameternet.training.checkpoint import load_last, save_last
from parameternet.training.distributed import Place
from parameternet.training.trainer import Trainer


class Notes(Reporter):
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


def add(folder):
    shutil.copy(folder / "red" / "red_0.png", folder / "red" / "red_9.png")


def remove(folder):
    (folder / "red" / "red_0.png").unlink()


def relabel(folder):
    (folder / "red" / "red_0.png").rename(folder / "blue" / "blue_9.png")


def rename(folder):
    (folder / "red" / "red_0.png").rename(folder / "red" / "red_00.png")


CHANGES = [
    (add, "red has 9 images instead of 8"),
    (remove, "red has 7 images instead of 8"),
    (relabel, "blue has 9 images instead of 8, red has 7 images instead of 8"),
    (rename, "red has other images"),
]


@pytest.fixture
def stopped(tmp_path, recipe):
    """A stopped run on data of its own: (the recipe, its run folder, the folder of images)."""
    for split, number in (("train", 8), ("val", 8)):
        draw(tmp_path / split, number, seed=0)
    made = recipe(train=str(tmp_path / "train"), val=str(tmp_path / "val"))
    with pytest.raises(Interrupted):
        run(made, tmp_path / "run", Stop(3))
    return made, tmp_path / "run", tmp_path


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize(("change", "text"), CHANGES)
def test_resuming_on_other_images_is_refused_and_the_difference_named(stopped, split, change, text):
    made, folder, data = stopped
    before = (folder / "last.ckpt").read_bytes()
    change(data / split)
    with pytest.raises(CheckpointError, match=f"used different images: {split}: {text}"):
        run(made, folder)
    assert (folder / "last.ckpt").read_bytes() == before


def test_resuming_on_other_classes_is_refused_and_they_are_named(stopped):
    made, folder, data = stopped
    for split in ("train", "val"):
        (data / split / "red").rename(data / split / "pink")
    with pytest.raises(CheckpointError, match=r"used different classes than .*train has now: gone red, new pink"):
        run(made, folder)


def test_a_checkpoint_of_an_earlier_version_resumes(stopped):
    made, folder, _ = stopped
    state = load_last(folder)
    del state["images"]
    save_last(folder, state)
    assert run(made, folder)["last"]["epoch"] == 2
    assert json.loads(load_last(folder)["images"])["train"]["classes"]["red"][0] == 8


def test_processes_that_find_other_images_stop_before_the_first_step(tmp_path, recipe, monkeypatch):
    def gather(self, item):
        if not isinstance(item, str):
            return [item]
        return [item, item.replace('"red": [8', '"red": [7').replace('"sha256": "', '"sha256": "0')]

    monkeypatch.setattr(Place, "gather", gather)
    text = "processes 0 and 1 find different images: train: red has 7 images instead of 8"
    with pytest.raises(DataError, match=text):
        Trainer(recipe(), tmp_path, Place(0, 1, torch.device("cpu")), Reporter())


@pytest.mark.parametrize("packed", [False, True], ids=["folder", "tar"])
def test_one_class_in_all_is_an_error(tmp_path, recipe, packed):
    draw(tmp_path / "data", 6, seed=0, classes=("red",))
    if packed:
        pack(tmp_path / "data", tmp_path / "data.tar")
    where = str(tmp_path / ("data.tar" if packed else "data"))
    with pytest.raises(DataError, match="has one class, red, but a classifier needs at least two"):
        run(recipe(train=where, val=None), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_original_layout_of_tiny_imagenet_is_trained_on(tmp_path, recipe):
    for split in ("train", "val"):
        draw(tmp_path / "flat" / split, 6, seed=0)
        for path in (tmp_path / "flat" / split).rglob("*.png"):
            images = tmp_path / split / path.parent.name / "images"
            images.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, images)
    result = run(recipe(train=str(tmp_path / "train"), val=str(tmp_path / "val"), epochs=1), tmp_path / "run")
    same = run(recipe(train=str(tmp_path / "flat/train"), val=str(tmp_path / "flat/val"), epochs=1), tmp_path / "same")
    assert load_last(tmp_path / "run")["classes"] == ["blue", "green", "red"]
    assert (result["last"]["train_loss"], result["last"]["top1"]) == (same["last"]["train_loss"], same["last"]["top1"])


def corrupt_avif():
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(buffer, "AVIF")
    data = buffer.getvalue()
    start = data.index(b"mdat") + 4
    return data[:start] + bytes(20) + data[start + 20 :]


def test_skipped_files_are_named_and_counted_in_training_and_validation(tmp_path, recipe):
    for split in ("train", "val"):
        draw(tmp_path / split, 4, seed=0)
        (tmp_path / split / "red" / "bad.jpg").write_bytes(corrupt_avif())  # the same name in both
        (tmp_path / split / ".thumbs").mkdir()
        (tmp_path / split / "pink").mkdir()
    reporter = Notes()
    result = run(recipe(train=str(tmp_path / "train"), val=str(tmp_path / "val"), epochs=2), tmp_path / "run", reporter)
    why = "cannot be read: Failed to decode frame 0"
    assert [note.split(": Decoding")[0] for note in reporter.notes] == [
        "train: hidden files and folders skipped (1): .thumbs",
        "train: class folders without images left out (1): pink",
        "val: hidden files and folders skipped (1): .thumbs",
        "val: class folders without images left out (1): pink",
        f"skipped an unreadable image: red/bad.jpg ({why}",
        f"skipped an unreadable image: val: red/bad.jpg ({why}",
    ]
    assert (result["last"]["images"], load_rows(tmp_path / "run")[-1]["unreadable"]) == (12, "2")
    measured = Notes()
    found = validate(tmp_path / "run", str(tmp_path / "val"), workers=0, reporter=measured)
    assert (found["images"], found["unreadable"]) == (12, ["red/bad.jpg"])
    assert [note.split(": ", 1)[1] for note in measured.notes[:2]] == [
        "hidden files and folders skipped (1): .thumbs",
        "class folders without images left out (1): pink",
    ]


# Teachers ------------------------------------------------------------------------------------------------------------


def paint(folder):
    Image.new("RGB", (36, 28), "yellow").save(folder / "red" / "red_0.png")


@pytest.mark.parametrize("change", [relabel, rename, paint, None], ids=lambda change: getattr(change, "__name__", ""))
def test_a_teachers_answers_are_kept_for_the_same_images_only(taught, tmp_path, change):  # noqa: F811
    draw(tmp_path / "train", 8, seed=0)
    asked = []
    ask(taught(), tmp_path, tmp_path / "run", asked)
    if change:
        change(tmp_path / "train")
    again = []
    _, found = ask(taught(), tmp_path, tmp_path / "run", again)
    _, fresh = ask(taught(), tmp_path, tmp_path / "other")
    assert asked and torch.equal(found, fresh)
    assert bool(again) == (change in (relabel, paint))


@pytest.mark.parametrize("what", ["weights", "config"])
def test_another_teacher_under_the_same_name_is_asked(taught, pictures, tmp_path, what):  # noqa: F811
    _, first = ask(taught(), pictures, tmp_path / "run")
    other = network()
    with torch.no_grad():
        other.get_classifier().weight.mul_(-1 if what == "weights" else 1)
    names = ["red", "yellow", "blue", "green"] if what == "weights" else ["blue", "yellow", "red", "green"]
    write(tmp_path / "teacher.safetensors", other, names)
    _, second = ask(taught(), pictures, tmp_path / "run")
    assert not torch.equal(first, second)


def test_answers_outlive_their_teacher(taught, pictures, tmp_path):  # noqa: F811
    """A run whose teacher is gone resumes."""
    _, first = ask(taught(), pictures, tmp_path / "run")
    (tmp_path / "teacher.safetensors").unlink()
    assert torch.equal(ask(taught(), pictures, tmp_path / "run")[1], first)
