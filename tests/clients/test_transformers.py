"""transformers' timm wrapper on our folders: the probabilities of `parameternet predict`."""

import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

import parameternet  # noqa: F401  registers the networks
from parameternet import weights
from parameternet.models.upcycled import save_upcycled
from parameternet.prediction import Predictor
from parameternet.surgery import upcycle

transformers = pytest.importorskip("transformers")
pytest.importorskip("transformers.models.timm_wrapper")

PHOTOS = sorted((Path(__file__).parents[1] / "photos").glob("*.jpg"))


@pytest.fixture(scope="module", params=["parameternet_50m.tin200", "parameternet_300m.tin200", "upcycled"])
def folder(request, tmp_path_factory):
    target = tmp_path_factory.mktemp("folder") / request.param
    if request.param == "upcycled":
        torch.manual_seed(0)
        dense = timm.create_model("resnet10t", num_classes=7).eval()
        torch.nn.init.normal_(dense.fc.weight, std=0.5)
        save_upcycled(upcycle(dense), target, "resnet10t")
    else:
        shutil.copytree(weights.shipped("weights") / request.param, target)
    return target


def by_class(predictor, path):
    """Every class's probability, in the order of the outputs."""
    with torch.no_grad():
        x = predictor.transform(Image.open(path).convert("RGB"))[None]
        return predictor.model(x).softmax(1)[0]


def test_a_pipeline_gives_the_probabilities_of_predict(folder):
    classify = transformers.pipeline("image-classification", model=str(folder))
    predictor = Predictor(str(folder))
    for path in PHOTOS:
        expected = next(iter(predictor.predict([path])))
        found = classify(str(path), top_k=len(expected.probabilities))
        for ours, theirs in zip(expected.probabilities, found, strict=True):
            assert abs(ours - theirs["score"]) <= 1e-5
        labels = classify.model.config.id2label
        assert [row["label"] for row in found][:1] == [labels[expected.indices[0]]]


def test_auto_classes_load_the_same_network(folder, images):
    model = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    network = Predictor(str(folder)).model
    with torch.no_grad():
        assert torch.allclose(model(images).logits, network(images), atol=1e-5)
    features = transformers.AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        assert torch.allclose(features(images).last_hidden_state, network.forward_features(images), atol=1e-4)


def test_a_model_saved_by_transformers_loads_again(folder, images, tmp_path):
    model = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    assert {name: value.tolist() for name, value in again.state_dict().items()} == {
        name: value.tolist() for name, value in model.state_dict().items()
    }
    with torch.no_grad():  # products round by where weights lie in memory
        assert torch.allclose(again(images).logits, model(images).logits, atol=1e-5)


def test_the_backbone_wrapper_gives_features(images):
    config = transformers.TimmBackboneConfig(backbone="parameternet_50m", out_indices=[1, 2, 3, 4])
    backbone = transformers.AutoBackbone.from_config(config)
    assert [tuple(f.shape[2:]) for f in backbone(images).feature_maps] == [(16, 16), (8, 8), (4, 4), (2, 2)]


@pytest.mark.parametrize("name", ["parameternet_50m.tin200", "local-dir:{weights}/parameternet_50m.tin200"])
def test_a_pretrained_backbone_gives_timms_features(name, images):
    name = name.format(weights=weights.shipped("weights"))
    network = timm.create_model(name, pretrained=True, features_only=True, out_indices=(1, 2, 3, 4)).eval()
    backbone = transformers.TimmBackbone.from_pretrained(name, out_indices=[1, 2, 3, 4])
    # transformers 5.24 resets the statistics of batch norm in every network of timm.
    statistics = {f"_backbone.{key}": v for key, v in network.state_dict().items() if "running_" in key}
    assert statistics and not backbone.load_state_dict(statistics, strict=False).unexpected_keys
    with torch.no_grad():
        for ours, theirs in zip(network(images), backbone.eval()(images).feature_maps, strict=True):
            assert torch.allclose(ours, theirs, atol=1e-5)


def test_the_wrapper_gives_hidden_states(folder, images):
    model = transformers.AutoModel.from_pretrained(folder).eval()
    network = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.no_grad():
        found = model(images, output_hidden_states=True).hidden_states
        expected = network.forward_intermediates(images, intermediates_only=True)
    assert len(found) == len(expected) > 3
    for theirs, ours in zip(found, expected, strict=True):
        assert torch.allclose(theirs, ours, atol=1e-4)


def test_the_trainer_fine_tunes(tmp_path, images):
    folder = weights.shipped("weights") / "parameternet_50m.tin200"
    model = transformers.AutoModelForImageClassification.from_pretrained(
        folder, num_labels=2, ignore_mismatched_sizes=True
    )
    rows = [{"pixel_values": image, "labels": label} for image, label in zip(images, itertools.cycle([0, 1]))]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=2, learning_rate=1e-3, report_to=[],
        save_strategy="no", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    before = {name: p.clone() for name, p in model.named_parameters()}
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows)
    trained = trainer.train()
    assert trained.global_step == 3 and torch.isfinite(torch.tensor(trained.training_loss))
    moved = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    assert any(".routing." in name for name in moved)
    trainer.save_model(tmp_path / "saved")
    again = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "saved").state_dict()
    assert all(torch.equal(again[name], value) for name, value in model.state_dict().items())


def test_the_cards_example_runs(tmp_path):
    card = (weights.shipped("weights") / "parameternet_50m.tin200" / "README.md").read_text()
    [block] = [b for b in re.findall(r"^```python\n(.*?)^```$", card, re.MULTILINE | re.DOTALL) if "transformers" in b]
    shutil.copy(PHOTOS[0], tmp_path / "photo.jpg")
    (tmp_path / "path" / "to").mkdir(parents=True)
    (tmp_path / "path" / "to" / "parameternet").symlink_to(Path(__file__).parents[2])
    quiet = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", block], cwd=tmp_path, env=quiet, capture_output=True, text=True)
    assert "'label'" in done.stdout, done.stderr
