"""`parameternet export` from the command line."""

import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from parameternet import cli
from parameternet.export import read_metadata
from parameternet.prediction import Predictor

COFFEE = Path(__file__).parent.parent / "photos" / "coffee.jpg"


def run(*arguments, code=0):
    done = CliRunner().invoke(cli.main, list(map(str, arguments)))
    assert done.exit_code == code, f"{done.output}\n{done.exception!r}"
    return done.output


def test_exported_shipped_checkpoint_has_the_same_outputs(tmp_path):
    pytest.importorskip("onnx"), pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    path = tmp_path / "net.onnx"
    words = run("export", "parameternet_50m.tin200", "--output", path)
    assert f"{path}: onnx, computed kernels, any batch" in words
    for batch in (1, 3, 8):
        assert f"batch {batch}, 64 x 64" in words
    facts = read_metadata(path)
    assert facts["name"] == "parameternet_50m.tin200" and len(facts["class_names"]) == 200
    predictor = Predictor("parameternet_50m.tin200")
    image = predictor.transform(Image.open(COFFEE).convert("RGB"))[None].numpy()
    logits = onnxruntime.InferenceSession(path).run(None, {"input": image})[0]
    assert facts["class_names"][int(logits.argmax())] == predictor.predict(COFFEE, topk=1)[0].labels[0] == "espresso"


def test_a_file_that_differs_ends_with_code_1(tmp_path, monkeypatch):
    from parameternet.export import torchscript

    monkeypatch.setattr(torchscript, "write", lambda model, path, plan: path.touch())
    monkeypatch.setattr(torchscript, "runner", lambda path: lambda x: [np.zeros((len(x), 200), np.float32)])
    path = tmp_path / "net.torchscript"
    words = run("export", "parameternet_50m.tin200", "--format", "torchscript", "--output", path, code=1)
    assert "differs from the network by" in words and not path.exists()


def test_random_weights_only_when_asked_for():
    assert "parameternet_150m has no checkpoint; --untrained" in run("export", "parameternet_150m", code=2)
    assert "no network 'parameternet_5m'; closest" in run("export", "parameternet_5m", "--untrained", code=2)
    assert "no weights are recorded for parameternet_5m" in run("export", "parameternet_5m", code=2)


@pytest.mark.parametrize("format", ["onnx", "openvino"])
def test_missing_package_names_the_install_command(tmp_path, monkeypatch, format):
    monkeypatch.setitem(sys.modules, format, None)
    path = tmp_path / f"net{'.onnx' if format == 'onnx' else '.xml'}"
    words = run("export", "parameternet_50m.tin200", "--format", format, "--output", path, code=1)
    assert f"needs the package {format}: pip install 'parameternet[export]'" in words and not path.exists()


def test_eight_bits_want_enough_images(tmp_path):
    path = tmp_path / "net.onnx"
    words = run("export", "parameternet_50m.tin200", "--int8", COFFEE.parent, "--output", path, code=1)
    assert "calibration needs at least 200 images" in words and not path.exists()
    assert "does not exist" in run("export", "parameternet_50m.tin200", "--int8", tmp_path / "nowhere", code=2)
