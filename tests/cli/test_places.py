"""Outputs, devices and addresses that cannot be used are rejected first, in the words of whoever gave them.

No command below has a model that exists: an error about it would show that the check came too late.
"""

import sys

import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from parameternet import cli, files
from parameternet.distributed import DEVICES, choose_device
from parameternet.export import export
from parameternet.models.upcycled import upcycle_checkpoint
from parameternet.prediction import Predictor, predict_to_file
from parameternet.training import RecipeError, run, validate
from parameternet.training.recipe import make_recipe

PHOTO = "tests/photos/cat.jpg"
WRITING = [
    (("predict", PHOTO, "--model", "nowhere", "--output"), ".csv"),
    (("predict", PHOTO, "--model", "nowhere", "--output"), ".jsonl"),
    (("predict", PHOTO, "--model", "nowhere", "--save"), ".png"),
    (("routing", "nowhere", PHOTO, "--output"), ".svg"),
    (("export", "nowhere", "--output"), ".onnx"),
    (("export", "nowhere", "--format", "torchscript", "--output"), ".torchscript"),
    (("export", "nowhere", "--untrained", "--output"), ".onnx"),
    (("card", "nowhere", "--output"), ".md"),
    (("upcycle", "nowhere", "--output"), ""),
    (("train", "nowhere.yaml", "--output"), ""),
    (("release", "tests", "nowhere.x", "--data", "nowhere", "--destination"), ""),
]
needs_proc = pytest.mark.skipif(sys.platform != "linux", reason="a folder in which nobody can write, root included")


def refused(*arguments):
    done = CliRunner().invoke(cli.main, [str(argument) for argument in arguments])
    assert done.exit_code in (1, 2), f"{done.output}\n{done.exception!r}"
    assert not isinstance(done.exception, OSError | ValueError)
    return done.stderr


@needs_proc
@pytest.mark.parametrize("arguments, suffix", WRITING)
def test_an_output_that_cannot_be_written_is_rejected_first(arguments, suffix):
    words = refused(*arguments, f"/proc/x{suffix}")
    assert f"cannot write /proc/x{suffix}: /proc is not writable" in words
    assert "/proc/." not in words  # temporary files and locks are internal


@pytest.mark.parametrize("arguments, suffix", WRITING)
def test_an_output_below_a_file_is_rejected_first(tmp_path, arguments, suffix):
    (tmp_path / "file").write_text("")
    output = tmp_path / "file" / f"x{suffix}"
    assert f"cannot write {output}: " in refused(*arguments, output)


@pytest.mark.parametrize("arguments, suffix", [case for case in WRITING if case[1]])
def test_a_folder_as_an_output_file_is_rejected_first(tmp_path, arguments, suffix):
    (tmp_path / f"x{suffix}").mkdir()
    assert f"{tmp_path / f'x{suffix}'} is a folder; give the name of a file" in refused(
        *arguments, tmp_path / f"x{suffix}"
    )


@needs_proc
def test_calls_reject_an_output_first():
    for call in (
        lambda: predict_to_file("nowhere", [PHOTO], "/proc/x.csv"),
        lambda: export("nowhere", "/proc/x.onnx"),
        lambda: upcycle_checkpoint("nowhere", "/proc/x"),
    ):
        with pytest.raises(ValueError, match=r"cannot write /proc/x\S*: /proc is not writable"):
            call()


def test_a_finished_output_is_rejected_first(tmp_path):
    (tmp_path / "x.csv").write_text("")
    with pytest.raises(ValueError, match=r"x\.csv exists; delete it"):
        predict_to_file("nowhere", [PHOTO], tmp_path / "x.csv")


def test_checks_leave_nothing(tmp_path):
    files.check_file(tmp_path / "a.csv")
    files.check_folder(tmp_path / "b" / "c")
    assert not list(tmp_path.iterdir())


@needs_proc
def test_errors_of_writing_name_the_given_path():
    with pytest.raises(OSError) as caught:
        files.write_bytes("/proc/x.csv", b"")
    assert caught.value.filename == "/proc/x.csv"
    with pytest.raises(OSError) as caught, files.lock("/proc/.x.csv.lock", "/proc/x.csv"):
        pass
    assert caught.value.filename == "/proc/x.csv"


# Devices -------------------------------------------------------------------------------------------------------------

COMMANDS = [
    ("predict", PHOTO, "--model", "nowhere"),
    ("predict", PHOTO, "--model", "nowhere", "--output", "/tmp/x.csv"),
    ("routing", "nowhere", PHOTO),
    ("routing", "nowhere", PHOTO, "--ablate"),
    ("val", "nowhere", "--data", "nowhere"),
    ("release", "tests", "nowhere.x", "--data", "nowhere"),
    ("app", "nowhere"),
]
UNKNOWN = ["gpu", "quantum", "CUDA", "cuda:x", "cuda:1000", "meta:x", ""]
CALLS = {
    "Predictor": lambda device: Predictor("nowhere", device),
    "predict_to_file": lambda device: predict_to_file("nowhere", [PHOTO], "x.csv", device=device),
    "validate": lambda device: validate("nowhere", "nowhere", device=device),
    "choose_device": choose_device,
}


@pytest.mark.parametrize("device", UNKNOWN)
@pytest.mark.parametrize("arguments", COMMANDS, ids=lambda words: f"{words[0]}{len(words)}")
def test_commands_say_which_devices_there_are(arguments, device):
    words = refused(*arguments, "--device", device)
    assert f"device {device!r} cannot be used: " in words
    assert f"use {DEVICES}" in words and "xpu" not in words
    assert "nowhere" not in words


@pytest.mark.parametrize("device", UNKNOWN)
@pytest.mark.parametrize("name", CALLS)
def test_calls_say_which_devices_there_are(name, device):
    with pytest.raises(ValueError, match=f"device '{device}' cannot be used: [^\n]{{0,40}}; use {DEVICES}$"):
        CALLS[name](device)


def test_recipes_say_which_devices_there_are(tmp_path):
    recipe = make_recipe({"model": "parameternet_50m", "train": "nowhere", "device": "gpu"})
    with pytest.raises(RecipeError, match=f"device 'gpu' cannot be used: .*use {DEVICES}$"):
        run(recipe, tmp_path / "run")


@pytest.mark.parametrize("device", [None, "auto"])
def test_no_device_is_auto(device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert choose_device(device) == torch.device("cpu")


# Addresses -----------------------------------------------------------------------------------------------------------

ADDRESSES = ["http://example.org/x", "https://example.org/x.tar", "s3://bucket/x", "HTTPS://example.org/x.safetensors"]
READING = [
    ("predict", PHOTO, "--model"),
    ("predict", "--output", "/tmp/x.csv", "--model", "parameternet_50m.tin200"),
    ("val", "--data", "nowhere"),
    ("val", "parameternet_50m.tin200", "--data"),
    ("info",),
    ("card",),
    ("export",),
    ("export", "parameternet_50m.tin200", "--int8"),
    ("upcycle", "-o", "/tmp/x"),
    ("train",),
    ("release", "--data", "nowhere", "a.b"),
    ("publish", "--to", "a/b", "--dry-run"),
    ("app",),
    ("app", "--detector"),
]


@pytest.mark.parametrize("address", ADDRESSES)
@pytest.mark.parametrize("arguments", READING, ids=" ".join)
def test_an_address_is_to_be_downloaded_first(arguments, address):
    if arguments == ("app",):
        pytest.importorskip("gradio")
    if arguments[0] == "release":
        arguments = ("release", address, "a.b", "--data", "nowhere")
        words = refused(*arguments)
    else:
        words = refused(*arguments, address)
    assert f"{address} is a URL, and URLs are not supported: download it and give the path" in words.replace("\n", " ")


@pytest.mark.parametrize("field", ["train", "val", "init", "teacher"])
def test_an_address_in_a_recipe_is_to_be_downloaded_first(tmp_path, field):
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(tmp_path / "images" / name / "a.png")
    changes = {"cache": "device", "mixup": 0, "cutmix": 0} if field == "teacher" else {}
    values = {"model": "parameternet_50m", "train": str(tmp_path / "images"), "batch_size": 1, "workers": 0, **changes}
    with pytest.raises((ValueError, RuntimeError), match=r"http://example\.org/x is a URL"):
        run(make_recipe({**values, field: "http://example.org/x"}), tmp_path / "run")
