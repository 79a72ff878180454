import json
import shutil

import pytest
import timm
import torch
from pictures import draw

from parameternet import weights
from parameternet.training import CheckpointError, DataError, Reporter, run, validate
from parameternet.training.validate import interval, load


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return tmp_path_factory.mktemp("finished")


@pytest.fixture
def trained(finished, recipe):
    """A run of a network that knows its classes quite well."""
    if not (finished / "best.safetensors").exists():
        calm = dict(mixup=0.0, cutmix=0.0, reprob=0.0, auto_augment=None, drop_path_rate=0.0, ema_decay=None)
        run(recipe(**calm, lr=1e-2, epochs=4, mean=[0.4, 0.5, 0.6], crop_pct=0.9), finished)
    return finished


def test_a_run_is_measured_as_the_run_measured_itself(trained, pictures):
    found = validate(trained, str(pictures / "val"), workers=0)
    config = json.loads(weights.metadata(trained / "best.safetensors")["config"])
    assert found["top1"] == pytest.approx(config["results"]["top1"], abs=1e-6)
    assert found["recorded"] == config["results"]["top1"]
    assert found["agrees"] is True
    assert (found["images"], found["unreadable"], found["input_size"]) == (15, [], [3, 32, 32])
    assert found["crop_pct"] == 0.9


def test_folder_tar_workers_and_batch_sizes_give_the_same_figure(trained, pictures):
    one = validate(trained, str(pictures / "val"), workers=0, batch_size=15)
    other = validate(trained / "best.safetensors", str(pictures / "val.tar"), workers=2, batch_size=4)
    assert (one["top1"], one["top5"]) == (other["top1"], other["top5"])
    assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)


def test_the_counts_are_those_of_a_plain_loop(trained, pictures):
    model, config = load(trained)
    cfg = timm.data.resolve_data_config(pretrained_cfg=config["pretrained_cfg"], use_test_size=True)
    data = timm.data.create_dataset("", root=str(pictures / "val"))
    data.transform = timm.data.create_transform(**cfg)
    with torch.no_grad():
        hits = [model.eval()(image[None]).argmax().item() == label for image, label in data]
    assert validate(trained, str(pictures / "val"), workers=0)["top1"] == pytest.approx(100 * sum(hits) / 15)


def test_a_wrong_record_is_told(trained, pictures, tmp_path):
    config = json.loads(weights.metadata(trained / "best.safetensors")["config"])
    config["results"]["top1"] = config["results"]["top1"] / 2 + 5
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights.save(weights.read(trained / "best.safetensors"), tmp_path / "model.safetensors")
    assert validate(tmp_path, str(pictures / "val"), workers=0)["agrees"] is False
    assert validate(tmp_path, str(pictures / "train"), workers=0)["agrees"] is None  # other images: no claim


def test_a_part_of_the_classes_keeps_its_labels(trained, pictures, tmp_path):
    draw(tmp_path, 5, seed=1, classes=("red",))
    whole = validate(trained, str(pictures / "val"), workers=0)
    part = validate(trained, str(tmp_path), workers=0)
    assert part["images"] == 5
    assert whole["top1"] > 60
    assert part["top1"] >= 60  # label 0 in the folder is the network's class 2


def test_classes_that_the_network_does_not_know_are_named(trained, tmp_path):
    (tmp_path / "violet").mkdir()
    draw(tmp_path / "more", 1, seed=0, classes=("red",))
    shutil.copytree(tmp_path / "more" / "red", tmp_path / "violet", dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "more")
    with pytest.raises(DataError, match=r"classes do not include violet of the data's"):
        validate(trained, str(tmp_path), workers=0)


def test_unreadable_images_are_named_and_not_counted(trained, tmp_path):
    draw(tmp_path, 2, seed=1)
    (tmp_path / "green" / "green_1.png").write_bytes(b"?")
    found = validate(trained, str(tmp_path), workers=1)
    assert (found["images"], found["unreadable"]) == (5, ["green/green_1.png"])
    for path in tmp_path.rglob("*.png"):
        path.write_bytes(b"?")
    with pytest.raises(DataError, match="no image of"):
        validate(trained, str(tmp_path), workers=0, reporter=Reporter())


@pytest.mark.parametrize("name", ["ghostnet_0500", "no/such/folder"])
def test_unknown_model_is_an_error(pictures, name):
    with pytest.raises(CheckpointError, match="is not a folder, a file"):
        validate(name, str(pictures / "val"))


def test_pickles_and_weights_without_a_config_are_refused(trained, tmp_path, pictures):
    torch.save({}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="other formats are rejected"):
        validate(tmp_path / "x.pth", str(pictures / "val"))
    weights.save(weights.read(trained / "best.safetensors"), tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"Put config\.json next to it"):
        validate(tmp_path, str(pictures / "val"))


def test_a_damaged_file_is_refused(trained, tmp_path, pictures):
    content = bytearray((trained / "best.safetensors").read_bytes())
    content[-100] ^= 1
    (tmp_path / "best.safetensors").write_bytes(content)
    with pytest.raises(weights.WeightsError, match="not those that were saved"):
        validate(tmp_path / "best.safetensors", str(pictures / "val"))


def test_the_interval_is_wilsons():
    assert interval(50, 10_000) == pytest.approx(0.98, rel=1e-3)  # that of the normal approximation
    # Half of 0.796 to 1, the textbook's interval for 15 of 15.
    assert interval(100, 15) == interval(0, 15) == pytest.approx(10.2, abs=0.01)


def test_an_architecture_alone_means_its_checkpoint_with_its_class_names():
    _, config = load("dynamic_efficientnet_lite0")
    assert config == load("dynamic_efficientnet_lite0.in1k_upcycled")[1]
    assert len(config["label_names"]) == 1000
