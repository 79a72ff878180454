"""From a dense checkpoint to a folder that a fresh process loads."""

import json
import subprocess
import sys

import pytest
import timm
import torch
from trained import trained

from parameternet import files, weights
from parameternet.layers import DynamicConv
from parameternet.models.loading import load
from parameternet.models.upcycled import load_dense, upcycle_checkpoint
from parameternet.prediction import Predictor


@pytest.fixture(scope="module")
def dense():
    return trained("mobilenetv3_small_050", num_classes=7)


@pytest.fixture(scope="module")
def file(dense, tmp_path_factory):
    path = tmp_path_factory.mktemp("dense") / "dense.safetensors"
    weights.save(dense.state_dict(), path)
    return path


def test_upcycled_file_has_the_same_outputs_in_a_new_process(dense, file, tmp_path):
    folder = tmp_path / "dynamic"
    dynamic, compared = upcycle_checkpoint(
        str(file), folder, "mobilenetv3_small_050", num_experts=3, routing="softmax", exclude="blocks.0.*", seed=5
    )
    assert compared.difference <= 1e-5
    assert compared.parameters == tuple(sum(p.numel() for p in m.parameters()) for m in (dense, dynamic))
    assert compared.flops[1].mixing > compared.flops[0].mixing == 0
    x = torch.randn(2, 3, 64, 64)
    torch.save(x, tmp_path / "x")
    code = (
        "import sys, timm, torch, parameternet\n"
        f"model = timm.create_model('local-dir:{folder}', pretrained=True).eval()\n"
        f"y = model(torch.load('{tmp_path / 'x'}'))\n"
        f"torch.save(y.detach(), '{tmp_path / 'y'}')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    expected = dense(x).detach()
    assert torch.allclose(torch.load(tmp_path / "y"), expected, atol=1e-5 * float(expected.abs().max()))
    again = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert again.upcycling.recipe() == dynamic.upcycling.recipe()
    assert {m.num_experts for m in again.modules() if isinstance(m, DynamicConv)} == {3}
    assert Predictor(folder, "cpu").model.num_classes == 7


def test_kill_while_replacing_a_checkpoint_leaves_no_mixture(file, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def killed(path, value):
        raise Killed

    arguments = (str(file), tmp_path / "dynamic", "mobilenetv3_small_050")
    upcycle_checkpoint(*arguments)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(files, "write_json", killed)  # new weights, and the config of the old ones
        upcycle_checkpoint(*arguments, overwrite=True, seed=1)
    with pytest.raises(weights.WeightsNotFound, match=r"Put config\.json next to it"):
        load(tmp_path / "dynamic")
    upcycle_checkpoint(*arguments, overwrite=True, seed=1)
    assert load(tmp_path / "dynamic").model.num_classes == 7


def test_a_folder_is_a_source_and_keeps_names_and_preprocessing(dense, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    weights.save(dense.state_dict(), source / weights.FILE_NAME)
    config = {
        "architecture": "mobilenetv3_small_050",
        "num_classes": 7,
        "label_names": list("abcdefg"),
        "pretrained_cfg": {"num_classes": 7, "input_size": [3, 96, 96], "mean": [0.1, 0.2, 0.3], "std": [1, 1, 1],
                           "first_conv": "conv_stem", "classifier": "classifier"},
    }  # fmt: skip
    (source / weights.CONFIG_NAME).write_text(json.dumps(config))
    upcycle_checkpoint(str(source), tmp_path / "out")
    written = weights.config(f"local-dir:{tmp_path / 'out'}")
    assert written["label_names"] == list("abcdefg") and written["upcycled_from"] == "source"
    predictor = Predictor(tmp_path / "out", "cpu")
    assert predictor.labels == list("abcdefg")
    found = predictor.data_config
    assert tuple(found["mean"]) == (0.1, 0.2, 0.3) and tuple(found["input_size"]) == (3, 96, 96)


def test_a_checkpoint_is_not_overwritten_unasked(file, tmp_path):
    upcycle_checkpoint(str(file), tmp_path, "mobilenetv3_small_050")
    before = (tmp_path / weights.FILE_NAME).read_bytes()
    with pytest.raises(FileExistsError, match="already holds a checkpoint"):
        upcycle_checkpoint(str(file), tmp_path, "mobilenetv3_small_050", num_experts=2)
    assert (tmp_path / weights.FILE_NAME).read_bytes() == before
    upcycle_checkpoint(str(file), tmp_path, "mobilenetv3_small_050", overwrite=True, num_experts=2)
    assert (tmp_path / weights.FILE_NAME).read_bytes() != before


@pytest.mark.skipif(weights.packaged("timm/tf_efficientnet_lite0.in1k") is None, reason="`demo` is not installed")
def test_weights_and_config_of_two_writers_do_not_mix(file, tmp_path):
    with files.lock(tmp_path / ".lock", "x"), pytest.raises(files.Locked, match="is in use by this process"):
        upcycle_checkpoint(str(file), tmp_path, "mobilenetv3_small_050", num_experts=2)
    assert not list(tmp_path.iterdir())
    upcycle_checkpoint(str(file), tmp_path, "mobilenetv3_small_050", num_experts=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_a_name_of_timm_takes_the_weights_from_where_they_are():
    with pytest.warns(DeprecationWarning, match="use parameternet.models.loading.load"):
        model = load_dense("tf_efficientnet_lite0")
    assert model.pretrained_cfg["label_descriptions"]["n02123045"] == "tabby, tabby cat"
    package = torch.load(weights.packaged("timm/tf_efficientnet_lite0.in1k"), weights_only=True)
    assert torch.equal(model.conv_stem.weight, package["_conv_stem.weight"])


@pytest.mark.parametrize(
    ("source", "architecture", "error", "message"),
    [
        ("no_such_net", None, weights.UnknownWeights, "is not a folder, a file or the name of a model"),
        ("resnet18d_x", None, weights.UnknownWeights, "closest: resnet18d"),
        ("ghostnet_050", None, weights.WeightsNotFound, "timm has no weights for ghostnet_050"),
        ("FILE", None, weights.WeightsNotFound, r"does not say which network it is for.* there is no .*config\.json"),
        ("FILE", "resnet19", ValueError, "timm has no model 'resnet19'"),
        ("none.safetensors", "resnet18", weights.WeightsNotFound, "no such file"),
    ],
)
def test_errors_say_what_is_missing(file, source, architecture, error, message):
    with pytest.raises(error, match=message):
        load(str(file) if source == "FILE" else source, dense=True, architecture=architecture)


def test_a_damaged_file_is_refused(file, tmp_path):
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    (tmp_path / "damaged.safetensors").write_bytes(data)
    with pytest.raises(weights.WeightsDamaged):
        upcycle_checkpoint(str(tmp_path / "damaged.safetensors"), tmp_path / "out", "mobilenetv3_small_050")
    assert not (tmp_path / "out").exists()
