"""Small checkpoints for tests: the real architecture at a fifth of its width, with five classes."""

import hashlib
import json
from pathlib import Path

import timm
import torch

import parameternet
from parameternet import weights
from parameternet.weights import registry

NAME = "parameternet_50m.tin200"
MODEL_ARGS = {"width": 0.2}
LABELS = {"n1": "tabby", "n2": "espresso", "n3": "rocket", "n4": "teapot", "n5": "very long name of a class, " * 4}


def network(seed=0):
    torch.manual_seed(seed)
    model = timm.create_model("parameternet_50m", num_classes=5, **MODEL_ARGS)
    with torch.no_grad():
        model.classifier.weight.mul_(50)  # far from undecided, so that a wrong answer shows
        for module in model.modules():
            if isinstance(module, parameternet.DynamicConv):
                module.weight.mul_(2)  # the mean of four independent kernels has half their scale
    return model.eval()


def config(**changes):
    return {
        "architecture": "parameternet_50m",
        "num_classes": 5,
        "num_features": 192,
        "label_names": list(LABELS),
        "label_descriptions": LABELS,
        "model_args": MODEL_ARGS,
        "pretrained_cfg": {
            "num_classes": 5,
            "input_size": [3, 32, 32],
            "test_input_size": [3, 64, 64],
            "crop_pct": 1.0,
            "interpolation": "bilinear",
            "mean": [0.5, 0.4, 0.3],
            "std": [0.2, 0.3, 0.4],
            "first_conv": "stem.conv",
            "classifier": "classifier",
        },
        **changes,
    }


def write(folder, model=None, **changes):
    """A checkpoint's folder, as it stands in weights/; returns its path."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights.save((model or network()).state_dict(), folder / weights.FILE_NAME)
    (folder / weights.CONFIG_NAME).write_text(json.dumps(config(**changes)))
    return folder


def record(monkeypatch, folder, name=NAME):
    """Make the package know the checkpoint in `folder` under `name`, and look for it in the folder above."""
    data = (folder / weights.FILE_NAME).read_bytes()
    known = {name: {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}}
    records = folder.parent / "weights.json"
    records.write_text(json.dumps(known))
    monkeypatch.setattr(registry, "RECORDS", records)
    monkeypatch.setenv("PARAMETERNET_WEIGHTS", str(folder.parent))
    monkeypatch.setattr(registry, "PACKAGE", folder.parent / "none")
    return known
