"""Checkpoints are the right ones or they are refused; nothing here reaches beyond this machine."""

import copy
import hashlib
import importlib.util
import itertools
import json
import pickle
import random
import re
import warnings
from pathlib import Path

import huggingface_hub
import pytest
import safetensors.torch
import timm
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import parameternet  # noqa: F401  registers the networks
from parameternet import weights
from parameternet.models.builder import build_from_config
from parameternet.prediction import Predictor
from parameternet.weights import registry

NAME = "parameternet_50m.tin200"
CFG = {"architecture": "parameternet_50m", "tag": "tin200"}
CLOSED = "http://127.0.0.1:9"


def tensors():
    generator = torch.Generator().manual_seed(0)
    return {
        "stem.weight": torch.randn(4, 3, 3, 3, generator=generator).half(),
        "head.weight": torch.randn(5, 4, generator=generator),
        "head.bias": torch.randn(5, generator=generator).bfloat16(),
        "bn.num_batches_tracked": torch.tensor(7),
        "empty": torch.empty(0, 3),
    }


def assert_same(got, expected):
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype
        assert torch.equal(got[name], tensor), name


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    """No folder of the user's, no Hub, no checkpoint of the checkout."""
    monkeypatch.delenv("PARAMETERNET_WEIGHTS", raising=False)
    monkeypatch.delenv("PARAMETERNET_HUB", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", CLOSED)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(registry, "PACKAGE", tmp_path / "checkout" / "parameternet")
    yield
    getattr(huggingface_hub.utils, "reset_sessions", lambda: None)()  # clients before 1.0 stay offline once they were


def put(folder, state_dict=None):
    """A checkpoint named NAME below `folder`."""
    path = Path(folder, NAME, weights.FILE_NAME)
    path.parent.mkdir(parents=True, exist_ok=True)
    weights.save(tensors() if state_dict is None else state_dict, path)
    path.with_name("config.json").write_text(
        json.dumps({"architecture": "parameternet_50m", "num_classes": 5, "pretrained_cfg": {}})
    )
    return path


def record(monkeypatch, path):
    """Make the checkpoint at `path` the only recorded one."""
    data = path.read_bytes()
    recorded = {NAME: {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}}
    records = path.parents[2] / "weights.json"
    records.write_text(json.dumps(recorded))
    monkeypatch.setattr(registry, "RECORDS", records)


@pytest.fixture
def checkout(monkeypatch, tmp_path):
    path = put(weights.shipped("weights"))
    record(monkeypatch, path)
    return path


# Files --------------------------------------------------------------------------------------------------------------


def test_round_trip_is_exact_and_leaves_no_other_files(tmp_path):
    weights.save(tensors(), tmp_path / "a.safetensors", metadata={"epoch": 3})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(weights.read(tmp_path / "a.safetensors"), tensors())
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        words = file.metadata()
    assert words["epoch"] == "3" and words["tensors_sha256"] == weights.tensors_digest(tensors())


def test_the_same_tensors_give_the_same_file(tmp_path):
    files = [tmp_path / f"{number}.safetensors" for number in range(8)]
    for path in files:
        weights.save(tensors(), path, metadata={"a": 1, "b": 2, "c": 3})
    assert len({path.read_bytes() for path in files}) == 1


def test_tensors_that_share_memory_are_saved_apart(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    weights.save({"a": base, "b": base.t(), "c": base[1]}, tmp_path / "a.safetensors")
    assert_same(weights.read(tmp_path / "a.safetensors"), {"a": base, "b": base.t(), "c": base[1]})


@pytest.mark.parametrize("change", ["name", "dtype", "shape", "value", "sign of zero", "missing"])
def test_digest_sees(change):
    other = tensors()
    if change == "name":
        other["tail.bias"] = other.pop("head.bias")
    elif change == "dtype":
        other["stem.weight"] = other["stem.weight"].view(torch.int16)
    elif change == "shape":
        other["head.weight"] = other["head.weight"].reshape(4, 5)
    elif change == "value":
        other["bn.num_batches_tracked"] += 1
    elif change == "missing":
        del other["empty"]
    first = {"x": torch.zeros(1)} if change == "sign of zero" else tensors()
    other = {"x": -torch.zeros(1)} if change == "sign of zero" else other
    assert weights.tensors_digest(first) != weights.tensors_digest(other)


def test_digest_is_independent_of_order_and_layout():
    state_dict = tensors()
    shuffled = dict(reversed(state_dict.items()))
    shuffled["head.weight"] = shuffled["head.weight"].t().contiguous().t()
    assert weights.tensors_digest(shuffled) == weights.tensors_digest(state_dict)


def test_nested_state_dict_is_refused_by_name(tmp_path):
    with pytest.raises(TypeError, match=r"'model' is a dict.*inner dict"):
        weights.save({"model": tensors()}, tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


def test_file_of_another_tool_is_read_with_a_warning(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    with pytest.warns(UserWarning, match="has no digest"):
        assert_same(weights.read(tmp_path / "a.safetensors"), {"a": torch.ones(2)})


def test_file_of_ours_that_lost_its_digest_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    weights.save(tensors(), path)
    path.write_bytes(path.read_bytes().replace(b"tensors_sha256", b"tensors_sha255"))
    with pytest.raises(weights.WeightsDamaged, match="which is now missing"):
        weights.read(path)


@pytest.mark.parametrize("form", ["torch.save", "old pickle"])
def test_pickles_are_refused_unopened_with_the_line_that_converts(tmp_path, form):
    path = tmp_path / "model.bin"
    torch.save(tensors(), path) if form == "torch.save" else path.write_bytes(pickle.dumps({"a": 1}, protocol=2))
    with pytest.raises(weights.WeightsError, match=r"only safetensors are read: convert it with.*weights_only=True"):
        weights.read(path)


def test_the_conversion_line_works(tmp_path):
    path = tmp_path / "model.bin"
    torch.save(tensors(), path)
    with pytest.raises(weights.WeightsError) as caught:
        weights.read(path)
    exec(re.search(r'-c "(.*)"', str(caught.value))[1])
    assert_same(weights.read(tmp_path / "model.safetensors"), tensors())


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(weights.WeightsNotFound, match="no such file"):
        weights.read(tmp_path / "none.safetensors")
    with pytest.raises(weights.WeightsNotFound, match="is not a folder"):
        weights.resolve({"source": "local-dir", "file": str(tmp_path / "none")})
    torch.save(tensors(), tmp_path / "pytorch_model.bin")
    with pytest.raises(weights.WeightsNotFound, match=r"holds no model.safetensors.*pytorch_model.bin"):
        weights.resolve({"source": "local-dir", "file": str(tmp_path)})


# Names --------------------------------------------------------------------------------------------------------------


def test_a_name_is_found_in_the_checkout(checkout):
    assert weights.find(NAME) == weights.local(NAME) == checkout
    assert_same(weights.resolve(CFG), tensors())
    assert weights.config(NAME)["num_classes"] == 5


def test_weights_folder_takes_precedence_and_is_verified(checkout, monkeypatch, tmp_path):
    monkeypatch.setenv("PARAMETERNET_WEIGHTS", str(tmp_path / "own"))
    assert weights.find(NAME) == checkout
    own = put(tmp_path / "own")
    assert weights.find(NAME) == own
    put(tmp_path / "own", {"a": torch.ones(1)})  # whole, with a digest that fits, and not ours
    with pytest.raises(weights.WeightsDamaged, match="is not the recorded file: expected SHA-256") as caught:
        weights.resolve(CFG)
    assert str(own) in str(caught.value)


def test_no_weights_for_an_architecture(checkout):
    for cfg in ({"architecture": "parameternet_150m"}, {"architecture": "parameternet_50m", "tag": "in1k"}):
        with pytest.raises(weights.WeightsNotFound, match=rf"no weights are recorded.*Recorded: {NAME}"):
            weights.resolve(cfg)
    with pytest.raises(weights.WeightsNotFound, match=rf"closest: {NAME}"):
        weights.find("parameternet_50m.tin20")


def test_nowhere_lists_every_place_and_what_to_do(checkout, monkeypatch, tmp_path):
    checkout.unlink()
    monkeypatch.setenv("PARAMETERNET_WEIGHTS", str(tmp_path / "own"))
    monkeypatch.setenv("PARAMETERNET_HUB", "mirror")
    with pytest.raises(weights.WeightsNotFound) as caught:
        weights.resolve(CFG)
    message = str(caught.value)
    for part in (
        str(tmp_path / "own" / NAME / "model.safetensors: no such folder"),
        str(checkout) + ": no such file",
        f"{CLOSED}/mirror/{NAME}/resolve/main/model.safetensors: the Hub did not respond",
        "PARAMETERNET_WEIGHTS=FOLDER",
        "HF_HUB_OFFLINE",
    ):
        assert part in message, part


def test_an_address_is_not_a_source():
    with pytest.raises(weights.WeightsError, match="not read from a plain URL"):
        weights.resolve({**CFG, "url": "https://example.org/model.safetensors"})


def test_given_tensors_pass_through():
    given = tensors()
    assert_same(weights.resolve({**CFG, "state_dict": given}), given)


def test_config_next_to_the_weights_is_required(checkout):
    beside = checkout.with_name("config.json")
    beside.write_text("{")
    with pytest.raises(weights.WeightsDamaged, match="is not valid JSON"):
        weights.config(NAME)
    beside.unlink()
    with pytest.raises(weights.WeightsNotFound, match="Copy the whole checkpoint folder"):
        weights.config(NAME)


def test_what_the_package_records_is_what_the_repository_holds(monkeypatch):
    monkeypatch.undo()
    for name, facts in weights.known().items():
        path = weights.shipped("weights") / name / weights.FILE_NAME
        assert path.is_file(), name
        assert facts["bytes"] == path.stat().st_size
        assert facts["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        assert weights.find(name) == path


# Networks -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def network():
    return timm.create_model("parameternet_50m", width=0.2, num_classes=5).eval()


def save_network(network, folder):
    weights.save(network.state_dict(), folder / weights.FILE_NAME)
    config = {
        "architecture": "parameternet_50m",
        "num_classes": 5,
        "model_args": {"width": 0.2},
        "pretrained_cfg": {"first_conv": "stem.conv", "classifier": "classifier", "input_size": [3, 64, 64]},
    }
    (folder / "config.json").write_text(json.dumps(config))


def test_timm_builds_a_network_from_a_folder_only_if_it_is_whole(network, tmp_path):
    save_network(network, tmp_path)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert_same(loaded.state_dict(), network.state_dict())
    path = tmp_path / weights.FILE_NAME
    data = bytearray(path.read_bytes())
    data[-5] ^= 4
    path.write_bytes(data)
    with pytest.raises(weights.WeightsDamaged, match="not those that were saved: expected digest"):
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True)


def test_timm_builds_a_network_from_a_file(network, tmp_path):
    save_network(network, tmp_path)
    overlay = {"file": str(tmp_path / weights.FILE_NAME), "num_classes": 5}
    loaded = timm.create_model("parameternet_50m", pretrained=True, width=0.2, pretrained_cfg_overlay=overlay)
    assert_same(loaded.state_dict(), network.state_dict())


def test_pretrained_without_weights_is_an_error_not_a_random_network(monkeypatch, tmp_path):
    monkeypatch.setattr(registry, "RECORDS", tmp_path / "none.json")
    with pytest.raises(weights.WeightsNotFound, match="no weights are recorded for parameternet_150m"):
        timm.create_model("parameternet_150m", pretrained=True)


@pytest.mark.parametrize("name", sorted(weights.known()))
def test_shipped_files_have_the_networks_own_names(name, monkeypatch):
    monkeypatch.undo()
    path = weights.shipped("weights") / name / weights.FILE_NAME
    architecture = name.partition(".")[0]
    expected = timm.create_model(architecture, pretrained=True).state_dict()
    model = timm.create_model(architecture, num_classes=200)
    assert safetensors.torch.load_model(model, path) == (set(), [])
    assert_same(model.state_dict(), expected)
    loaded = timm.create_model(architecture, num_classes=200, checkpoint_path=str(path))
    assert_same(loaded.state_dict(), expected)


def test_a_file_of_an_earlier_release_is_still_the_recorded_one(monkeypatch, tmp_path):
    monkeypatch.undo()
    name = "parameternet_50m.tin200"
    assert "11ac538e1921fa35fa6928cf2c52060e948f1dd3251ac3c407dd9b4c22f6b5b6" in weights.digests(name)  # 0.1.0
    now = weights.read(weights.find(name))
    old = {key.replace("stem.conv.", "conv_stem.").replace("stem.bn1.", "bn1."): value for key, value in now.items()}
    (tmp_path / name).mkdir()
    path = tmp_path / name / weights.FILE_NAME
    weights.save(old, path, {"name": name})
    digest, facts = hashlib.sha256(path.read_bytes()).hexdigest(), weights.known()[name]
    monkeypatch.setattr(registry, "known", lambda: {name: {**facts, "earlier": [digest]}})
    monkeypatch.setenv("PARAMETERNET_WEIGHTS", str(tmp_path))
    assert weights.find(name) == path
    loaded = timm.create_model("parameternet_50m", pretrained=True)
    assert_same(loaded.state_dict(), {key: value.to(loaded.state_dict()[key].dtype) for key, value in now.items()})


@pytest.mark.parametrize("argument", ["checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir",
                                      "pretrained", "pretrained_strict", "model_name", "scriptable"])  # fmt: skip
def test_a_config_cannot_have_other_weights_loaded(network, tmp_path, argument):
    save_network(network, tmp_path)
    torch.save(network.state_dict(), tmp_path / "x.pth")
    config = json.loads((tmp_path / "config.json").read_text())
    config["model_args"][argument] = str(tmp_path / "x.pth")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(weights.WeightsDamaged, match=f"config.json sets {argument} in model_args"):
        build_from_config(weights.config(f"local-dir:{tmp_path}"), source="local-dir", file=str(tmp_path))
    with pytest.raises(weights.WeightsDamaged, match=f"config.json sets {argument} in model_args"):
        Predictor(str(tmp_path))


BAD_VALUES = (5, 1.5, "text", [], {}, [[]], ["a", 1], {"a": 1}, True, None, float("nan"))


@pytest.mark.parametrize("part", ["", "pretrained_cfg."])
def test_every_value_of_a_config_is_checked_before_it_is_used(network, tmp_path, part):
    save_network(network, tmp_path)
    path = tmp_path / "config.json"
    good = json.loads(path.read_text())
    keys = weights.PRETRAINED_CFG_KEYS if part else weights.CONFIG_KEYS
    for key, value in itertools.product(keys, BAD_VALUES):
        config = copy.deepcopy(good)
        (config["pretrained_cfg"] if part else config)[key] = value
        path.write_text(json.dumps(config))
        try:
            weights.config(f"local-dir:{tmp_path}")
        except weights.WeightsDamaged as error:
            assert f"{part}{key} must be a JSON" in str(error)
        else:
            assert value is None or isinstance(value, (int, float) if keys[key] is float else keys[key])


def test_sixty_damaged_files(network, tmp_path):
    """A short form of benchmarks/damaged_files.py, which says what the kinds are."""
    spec = importlib.util.spec_from_file_location(
        "damaged_files", Path(__file__).parent.parent / "benchmarks" / "damaged_files.py"
    )
    damaged_files = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(damaged_files)
    save_network(network, tmp_path)
    counts = damaged_files.sweep(tmp_path / weights.FILE_NAME, network, files=60)
    total = {route: sum(by_damage.values(), damaged_files.Counter()) for route, by_damage in counts.items()}
    assert {route: sum(row.values()) for route, row in total.items()} == dict.fromkeys(total, 60)
    assert total["recorded SHA-256"] == {"refused": 60}
    assert total["digest only"]["silently wrong"] == 0
    assert total["digest only"]["refused"] >= 55  # a flipped bit in the header's remarks may be harmless
    assert total["timm"]["silently wrong"] > 20, "the sweep no longer makes files that need us"


# Where folders are --------------------------------------------------------------------------------------------------


def test_shipped_is_the_checkout_or_the_copy_in_the_package(monkeypatch, tmp_path):
    monkeypatch.undo()
    package = tmp_path / "parameternet"
    package.mkdir()
    monkeypatch.setattr(registry, "PACKAGE", package)
    (tmp_path / "weights").mkdir()
    assert weights.shipped("weights") == package / "_shipped" / "weights"  # somebody's folder in site-packages
    (tmp_path / "setup.cfg").touch()
    assert weights.shipped("weights") == tmp_path / "weights"
    assert weights.shipped("configs") == package / "_shipped" / "configs"


def test_random_bytes_are_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    for seed in range(50):
        path.write_bytes(random.Random(seed).randbytes(seed * 7))
        with pytest.raises(weights.WeightsError):
            weights.read(path)


FORMER = """
FILE_NAME CONFIG_NAME DIGEST PACKAGED WeightsError WeightsNotFound UnknownWeights WeightsDamaged
shipped known hub places
local resolve find config packaged unknown no_weights_in read save metadata tensors_digest conversion
hub_reason hub_cause
hub_damage
"""


def test_the_public_names_of_0_1_0_are_still_there():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert all(getattr(weights, name) is not None for name in FORMER.split())
