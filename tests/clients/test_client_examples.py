"""The files of examples/ that need other people's libraries run on small data and print what they promise."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
COLOURS = {"blue": (40, 60, 200), "green": (40, 190, 60), "red": (200, 50, 40)}


def run(name, *arguments, cwd):
    quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "examples" / name), *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=os.environ | quiet, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def figures(text, words):
    """The numbers after `words` in `text`."""
    return [float(number) for number in re.search(words.replace("#", r"([\d.]+(?:e[+-]\d+)?)"), text).groups()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three classes of coloured images."""
    root, generator = tmp_path_factory.mktemp("colours"), np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (root / "train" / name).mkdir(parents=True)
        for index in range(8):
            pixels = np.clip(colour + generator.normal(0, 40, (28, 36, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / "train" / name / f"{index}.png")
    return root


def test_lora_learns_and_merges(folder, tmp_path):
    pytest.importorskip("peft", reason="needs the extra clients")
    printed = run("finetune_lora.py", folder, "--steps", 20, "--output", "adapter", cwd=tmp_path)
    first, last = figures(printed, "loss # at first, # at last")
    assert last < 0.5 * first
    assert figures(printed, "ParameterNet merged, largest difference #")[0] < 1e-4
    assert 0 < figures(printed, "trainable%: #")[0] < 5
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size < 1e6


def test_transformers_trainer_learns_and_reloads(folder, tmp_path):
    pytest.importorskip("transformers", reason="needs the extra clients")
    weights = ROOT / "weights" / "parameternet_50m.tin200"
    printed = run("finetune_transformers.py", folder, "--weights", weights, "--output", "tuned", cwd=tmp_path)
    before, after = figures(printed, "loss # before, # after")
    assert after < 0.5 * before
    assert figures(printed, r"classes \['blue', 'green', 'red'\], logits differ by #")[0] < 1e-5
    assert (tmp_path / "tuned" / "model.safetensors").is_file()


def test_a_segmenter_learns_shapes(tmp_path):
    pytest.importorskip("segmentation_models_pytorch", reason="needs the extra clients")
    printed = run("segmentation_smp.py", cwd=tmp_path)
    assert figures(printed, "mean IoU #")[0] > 0.5
