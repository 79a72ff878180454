"""The formats that timmx writes: their files compute the network, or say plainly that nobody looked."""

import importlib
import importlib.util
import os
import sys

import pytest
import small
import torch
from click.testing import CliRunner
from torch import nn

from parameternet import cli
from parameternet.export import FIXED, ExportError, checking, export, mobile, read_metadata

RUN = ("ncnn", "litert", "executorch")
NEEDS = {
    "ncnn": ("timmx", "ncnn", "pnnx"),
    "litert": ("timmx", "litert_torch", "ai_edge_litert"),
    "executorch": ("timmx", "executorch"),
    "coreml": ("timmx", "coremltools"),
    "tensorrt": ("timmx", "tensorrt", "onnxscript"),
}


def needs(format):
    # Importing them all in one process takes longer than the tests.
    missing = [package for package in NEEDS[format] if importlib.util.find_spec(package) is None]
    if missing:
        pytest.skip(f"{format} needs {', '.join(missing)}")


def path_of(format, folder, name="net"):
    return folder / f"{name}{importlib.import_module(f'parameternet.export.{format}').SUFFIX}"


@pytest.mark.parametrize("form", ["computed", "constant"])
@pytest.mark.parametrize("format", RUN)
def test_a_file_computes_the_network(format, form, tmp_path, model, capfd):
    needs(format)
    made = export(model, path_of(format, tmp_path), format, form=form, batch=1)
    assert made.unchecked is None and list(made.differences) == ["batch 1, 40 x 56"]
    run = importlib.import_module(f"parameternet.export.{format}").runner(made.path)
    x = checking.noise_images(1, small.SIZE, seed=1)
    assert checking.difference(model, run, x) <= 1e-5
    other = checking.noise_images(1, small.SIZE, seed=2)
    assert checking.difference(model, lambda _: run(other.numpy()), x) > 1e-2, "all images have the same output"
    written = sorted(path.name for path in tmp_path.iterdir())
    assert written == sorted(file.name for file in made.files)
    assert made.bytes == sum(file.stat().st_size for file in made.files if file.suffix != ".json")
    facts = read_metadata(made.path)
    assert (facts["form"], facts["batch"], facts["input_size"]) == (form, 1, [3, 40, 56])
    assert facts["class_names"][0] == 'a "rose", rouge <é>' and facts["mean"] == [0.1, 0.2, 0.3]
    for file in made.files:
        for place in (b"site-packages", str(tmp_path).encode(), __file__.partition("tests")[0].encode()):
            assert place not in file.read_bytes(), f"{file.name} names {place}"
    assert not capfd.readouterr().out, "converters talk"


@pytest.mark.parametrize("form", ["computed", "constant"])
@pytest.mark.parametrize("format", ["litert", "executorch"])
def test_a_batch_of_three(format, form, tmp_path, model):
    needs(format)
    made = export(model, path_of(format, tmp_path), format, form=form, batch=3)
    assert list(made.differences) == ["batch 3, 40 x 56"]


@pytest.mark.parametrize("format", RUN)
def test_several_outputs_keep_their_order(format, tmp_path):
    needs(format)

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 6, 3)

        def forward(self, x):
            y = self.conv(x)
            return y, y.mean((2, 3))

    assert export(Two().eval(), path_of(format, tmp_path), format, batch=1, size=8).differences


def test_core_ml_is_only_converted(tmp_path, model):
    needs("coreml")
    path = tmp_path / "net.mlpackage"
    for _ in range(2):  # the second takes the place of the first
        with pytest.warns(UserWarning, match=r"net\.mlpackage was not compared with the network: Core ML runs"):
            made = export(model, path, "coreml", batch=1)
        assert made.differences == {} and made.unchecked
        assert made.bytes > 4 * sum(p.numel() for p in model.parameters())  # in 32 bits
        assert (path / "Manifest.json").is_file() and read_metadata(path)["batch"] == 1
        assert sorted(file.name for file in tmp_path.iterdir()) == ["net.mlpackage", "net.mlpackage.json"]


@pytest.mark.filterwarnings("always:.*was not compared with the network")
def test_the_command_says_that_a_file_was_not_checked(tmp_path):
    needs("coreml")
    path = tmp_path / "net.mlpackage"
    arguments = ["export", "parameternet_50m.tin200", "--format", "coreml", "--batch", "1", "--form", "constant"]
    done = CliRunner().invoke(cli.main, [*arguments, "--output", str(path)])
    assert done.exit_code == 0, done.output
    assert "MB, not checked" in done.output and "net.mlpackage was not compared with the network" in done.output
    assert "largest relative difference" not in done.output


# What is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FIXED)
@pytest.mark.parametrize(
    "arguments, message",
    [
        ({}, "requires a fixed batch size: set batch|ncnn takes one image at a time, got batch any; give batch 1"),
        ({"batch": 1, "dynamic_size": True}, "requires a fixed image size"),
        ({"batch": 1, "form": "looped"}, "form 'looped' requires format onnx or openvino"),
        ({"batch": 1, "int8": "."}, "int8 requires format onnx or openvino"),
    ],
)
def test_what_these_files_cannot_hold(format, arguments, message, tmp_path, model):
    with pytest.raises(ValueError, match=message):
        export(model, path_of(format, tmp_path), format, **arguments)
    assert not list(tmp_path.iterdir())


def test_ncnn_has_no_batch(tmp_path, model):
    with pytest.raises(ValueError, match="ncnn takes one image at a time, got batch 3; give batch 1"):
        export(model, tmp_path / "net.param", "ncnn", batch=3)


@pytest.mark.parametrize("format", FIXED)
def test_a_missing_package_is_named_with_what_installs_it(format, tmp_path, model, monkeypatch):
    find = importlib.util.find_spec
    for package in NEEDS[format]:
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, *_, gone=package: None if name == gone else find("json")
        )
        wanted = "tensorrt" if package == "tensorrt" else r"'parameternet\[mobile\]'"
        with pytest.raises(ModuleNotFoundError, match=f"{package} is missing: pip install {wanted}") as caught:
            export(model, path_of(format, tmp_path), format, batch=1)
        assert caught.value.name == package
    assert not list(tmp_path.iterdir())


def test_the_command_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    arguments = ["export", "parameternet_50m.tin200", "--format", "litert", "--batch", "1"]
    done = CliRunner().invoke(cli.main, [*arguments, "--output", str(tmp_path / "net.tflite")])
    assert done.exit_code == 1 and "needs the package timmx: pip install 'parameternet[mobile]'" in done.output


class Sorted(nn.Module):
    """Converters refuse it, or get it wrong."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return torch.linalg.eigvals(self.conv(x)[:, 0]).real


@pytest.mark.parametrize("format", [*RUN, "coreml"])
def test_a_conversion_that_fails_leaves_what_was_there(format, tmp_path):
    needs(format)
    path = path_of(format, tmp_path)
    path.write_text("older")
    with pytest.raises(ExportError, match=r"the exporter failed with|the file does not run|the network returns"):
        export(Sorted().eval(), path, format, batch=1, size=8)
    assert [file.name for file in tmp_path.iterdir()] == [path.name] and path.read_text() == "older"


@pytest.mark.parametrize("format", RUN)
def test_a_damaged_file_is_not_kept(format, tmp_path, model, monkeypatch):
    needs(format)
    writer = importlib.import_module(f"parameternet.export.{format}")
    whole = writer.write

    def damaged(*arguments):
        whole(*arguments)
        path = arguments[1].with_suffix(".bin") if format == "ncnn" else arguments[1]
        path.write_bytes(bytes(len(path.read_bytes())))

    monkeypatch.setattr(writer, "write", damaged)
    with pytest.raises(ExportError, match=r"the file cannot be read|the file does not run|differs from the network by"):
        export(model, path_of(format, tmp_path), format, batch=1)
    assert not list(tmp_path.iterdir())


def test_timm_is_asked_again_afterwards(tmp_path, model):
    needs("ncnn")
    from timmx.export import common

    before = common.create_timm_model
    with pytest.raises(ExportError):
        export(Sorted().eval(), tmp_path / "net.param", "ncnn", batch=1, size=8)
    assert common.create_timm_model is before


def test_silence_ends(capfd):
    with mobile.silent():
        print("in Python")
        print("in Python", file=sys.stderr)
        os.system("echo in a program; echo in a program >&2")
    print("afterwards")
    assert capfd.readouterr() == ("afterwards\n", "")
