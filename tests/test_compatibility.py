"""Files of 0.1.0 still load, compute what they computed, and resume; fixtures/0.1.0/make.py made them."""

import csv
import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

from parameternet import DynamicConv
from parameternet.models import loading
from parameternet.training import load_recipe, run, validate
from parameternet.training.checkpoint import load_last

FIXTURES = Path(__file__).parent / "fixtures" / "0.1.0"
LAYERS = json.loads((FIXTURES / "layers" / "arguments.json").read_text())
IMAGES = [f"train={FIXTURES / 'images/train'}", f"val={FIXTURES / 'images/val'}"]


def close(found, recorded):
    return torch.allclose(found, recorded, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_a_state_dict_of_a_dynamic_conv_computes_the_same(name):
    tensors = load_file(FIXTURES / "layers" / f"{name}.safetensors")
    conv = DynamicConv(**LAYERS[name])
    state = {key.removeprefix("state."): value for key, value in tensors.items() if key.startswith("state.")}
    conv.load_state_dict(state)
    assert conv.state_dict().keys() == state.keys()
    with torch.no_grad():
        assert close(conv(tensors["input"]), tensors["output"])


@pytest.mark.parametrize("folder", ["finished", "upcycled"])
def test_a_run_folder_and_an_upcycled_folder_compute_the_same(folder):
    tensors = load_file(FIXTURES / f"{folder}.outputs.safetensors")
    model = loading.load(FIXTURES / folder).model.eval()
    with torch.no_grad():
        assert close(model(tensors["input"]), tensors["output"])


def test_timm_builds_an_upcycled_folder():
    tensors = load_file(FIXTURES / "upcycled.outputs.safetensors")
    model = timm.create_model(f"local-dir:{FIXTURES / 'upcycled'}", pretrained=True).eval()
    with torch.no_grad():
        assert close(model(tensors["input"]), tensors["output"])


def test_a_finished_run_is_measured_as_recorded():
    found = validate(FIXTURES / "finished", str(FIXTURES / "images/val"), workers=0, device="cpu")
    assert (found["images"], found["agrees"]) == (15, True)


def test_a_finished_run_is_not_trained_further(tmp_path):
    shutil.copytree(FIXTURES / "finished", tmp_path / "run")
    before = (tmp_path / "run" / "last.ckpt").read_bytes()
    run(load_recipe(tmp_path / "run" / "recipe.yaml", IMAGES), tmp_path / "run")
    assert (tmp_path / "run" / "last.ckpt").read_bytes() == before


def test_a_stopped_run_resumes_and_ends_as_the_finished_one(tmp_path):
    shutil.copytree(FIXTURES / "stopped", tmp_path / "run")
    assert json.loads(load_last(tmp_path / "run")["progress"])["updates"] == 8
    run(load_recipe(tmp_path / "run" / "recipe.yaml", IMAGES), tmp_path / "run")
    ours, theirs = load_last(tmp_path / "run"), load_last(FIXTURES / "finished")
    for part in ("model", "ema"):
        assert ours[part].keys() == theirs[part].keys()
        for name, tensor in theirs[part].items():
            assert close(ours[part][name], tensor), f"{part} {name}"
    for mine, recorded in zip(rows(tmp_path / "run"), rows(FIXTURES / "finished"), strict=True):
        assert mine.keys() == recorded.keys()
        for name in ("epoch", "updates", "lr", "train_loss", "val_loss", "top1", "images"):
            assert float(mine[name]) == pytest.approx(float(recorded[name]), rel=1e-4), name


def rows(folder):
    with open(folder / "history.csv", newline="") as lines:
        return list(csv.DictReader(lines))
