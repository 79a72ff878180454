"""The family as timm users know it. What timm's own tests ask is run by benchmarks/timm_tests.py; this is the rest."""

import json
from pathlib import Path

import pytest
import timm
import torch
from checkpoints import network, write
from torch import nn

from parameternet import DynamicConv, ParameterNet
from parameternet.layers import GhostBottleneck
from parameternet.models.parameternet import checkpoint_filter_fn

NAMES = ["parameternet_50m", "parameternet_150m", "parameternet_300m", "parameternet_600m"]
GOLDEN = Path(__file__).parent.parent / "golden"


def create(name, num_classes=1000, **kwargs):
    with torch.device("meta"):
        return timm.create_model(name, num_classes=num_classes, **kwargs)


def parameters(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("parameternet_600m", {}, 34_504_504),
        ("parameternet_600m", {"num_experts": 1}, 19_852_939),
        ("parameternet_600m", {"num_experts": 8}, 54_039_924),
        ("parameternet_600m", {"dynamic": False}, 19_822_198),
        ("parameternet_300m", {}, 15_737_100),
        ("parameternet_300m", {"num_experts": 2}, 11_013_742),
        ("parameternet_300m", {"num_experts": 8}, 25_183_816),
        ("parameternet_300m", {"dynamic": False}, 8_633_106),
        ("parameternet_150m", {"dynamic": False}, 5_182_508),
    ],
)
def test_parameters_are_the_published_ones(name, arguments, expected):
    assert parameters(create(name, **arguments)) == expected


def test_the_registry_lists_exactly_these():
    assert timm.list_models("parameternet*") == NAMES
    assert timm.list_models("parameternet*", pretrained=True) == [
        f"parameternet_{size}m.tin200" for size in (50, 300, 600)
    ]
    assert all(timm.models.model_entrypoint(n).__module__ == "parameternet.models.parameternet" for n in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_features_end_at_the_last_block_of_each_resolution(name):
    model = create(name, features_only=True)
    assert model.feature_info.reduction() == [2, 4, 8, 16, 32]
    assert model.feature_info.module_name() == ["stem", "blocks.2", "blocks.4", "blocks.6", "blocks.8"]
    maps = model(torch.empty(1, 3, 64, 96, device="meta"))
    assert [m.shape[1] for m in maps] == model.feature_info.channels()
    assert [tuple(m.shape[2:]) for m in maps] == [(32, 48), (16, 24), (8, 12), (4, 6), (2, 3)]


@pytest.mark.parametrize("form", ["list", "getter", "fx", "hook"])
def test_all_forms_of_features_are_the_same_maps(form, tmp_path):
    model = network()
    x = torch.randn(2, 3, 64, 64)
    expected = model.forward_intermediates(x, intermediates_only=True)
    name = f"local-dir:{write(tmp_path, model)}"
    other = timm.create_model(name, pretrained=True, features_only=True, feature_cls=form).eval()
    assert all(torch.allclose(got, want, atol=1e-5) for got, want in zip(other(x), expected, strict=True))


def test_pruned_networks_give_the_same_maps():
    model = timm.create_model("parameternet_50m").eval()
    x = torch.randn(1, 3, 64, 64)
    expected = model.forward_intermediates(x, indices=[1, 3], intermediates_only=True)
    assert model.prune_intermediate_layers([1, 3]) == [1, 3]
    got = model.forward_intermediates(x, indices=[1, 3], intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert len(model.blocks) == 7 and model(x).shape[1] == model.num_features == 56


def test_the_head_can_be_had_in_pieces():
    model = timm.create_model("parameternet_50m", num_classes=7).eval()
    x = torch.randn(2, 3, 64, 64)
    maps = model.forward_features(x)
    assert maps.shape == (2, model.num_features, 2, 2)
    assert model.forward_head(maps, pre_logits=True).shape == (2, model.head_hidden_size)
    assert torch.equal(model.forward_head(maps), model(x)) and model(x).shape == (2, 7)
    model.reset_classifier(0)
    assert model(x).shape == (2, 1280)
    model.reset_classifier(0, "")
    assert model(x).shape == (2, 1280, 2, 2)
    model.reset_classifier(5, "avg")
    assert model(x).shape == (2, 5)


def test_drop_path_grows_over_single_blocks():
    model = create("parameternet_600m", drop_path_rate=0.18)
    rates = [getattr(m.drop_path, "drop_prob", 0.0) for m in model.modules() if isinstance(m, GhostBottleneck)]
    assert len(rates) == 19
    assert rates == pytest.approx([0.01 * i for i in range(19)])


def test_arguments_reach_the_layers():
    model = create(
        "parameternet_50m",
        num_experts=2,
        routing="softmax",
        routing_hidden=6,
        width=0.6,
        act_layer="relu",
        drop_rate=0.3,
    )
    layers = [m for m in model.modules() if isinstance(m, DynamicConv)]
    assert {layer.num_experts for layer in layers} == {2}
    assert all(layer.routing.softmax and layer.routing.hidden.out_features == 6 for layer in layers)
    assert isinstance(model.stem.act1, nn.ReLU) and model.drop_rate == 0.3 and model.stem.conv.out_channels == 12
    assert not any(isinstance(m, DynamicConv) for m in create("parameternet_50m", dynamic=False).modules())
    with pytest.raises(ValueError, match="output_stride must be one of 8, 16, 32, got 12"):
        create("parameternet_50m", output_stride=12)


def test_layer_decay_groups_grow_from_the_stem_to_the_head():
    from timm.optim import param_groups_layer_decay

    model = create("parameternet_50m")
    groups = param_groups_layer_decay(model, layer_decay=0.5)
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    assert len(scale) == len(list(model.parameters()))
    first, last = (model.blocks[stage][0].ghost1.primary_conv[0] for stage in (3, 8))
    depth = [scale[id(layer.weight)] for layer in (model.stem.conv, first, last, model.classifier)]
    assert depth == sorted(depth) and depth[-1] == 1.0 and depth[0] < depth[1] < depth[2]


def test_checkpointed_gradients_are_the_same():
    torch.manual_seed(0)
    model = timm.create_model("parameternet_50m", num_classes=3)
    x, grads = torch.randn(2, 3, 64, 64), []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model.eval()
        model(x).sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*grads, strict=True))


def test_a_residual_branch_starts_at_zero_and_still_learns():
    model = timm.create_model("parameternet_50m", num_classes=3)
    block = model.blocks[2][0]
    x = torch.randn(4, 12, 8, 8)
    assert torch.equal(block(x), x)
    model(torch.randn(4, 3, 64, 64)).square().sum().backward()
    assert block.ghost2.primary_conv[1].weight.grad.abs().sum() > 0


def official(name):
    """A state dict by the released code's keys and shapes, with random numbers."""
    rows = json.loads((GOLDEN / f"{name}_keys.json").read_text())
    return {row[0]: torch.randn(row[1]) for row in rows["keys"]}


@pytest.mark.parametrize("name", ["parameternet_300m", "parameternet_600m"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_official_state_dicts_load(name, wrapped):
    state = official(name)
    model = timm.create_model(name, num_classes=1000)
    given = {"state_dict": {f"module.{k}": v for k, v in state.items()}} if wrapped else state
    missing, unexpected = model.load_state_dict(checkpoint_filter_fn(given, model), strict=False)
    assert not unexpected and all(key.endswith("num_batches_tracked") for key in missing)
    kernel = state["blocks.3.0.ghost1.primary_conv.0.cond_conv.weight"]
    assert torch.equal(model.blocks[3][0].ghost1.primary_conv[0].weight.reshape(kernel.shape), kernel)


def test_one_channel_follows_the_three(tmp_path):
    """A grey picture gives what the same picture in three equal channels gives: kernels and router are summed."""
    model = network()
    name = f"local-dir:{write(tmp_path, model)}"
    grey = timm.create_model(name, pretrained=True, in_chans=1).eval()
    x = torch.randn(2, 1, 64, 64)
    assert torch.allclose(grey(x), model(x.expand(-1, 3, -1, -1)), atol=1e-4)
    six = timm.create_model(name, pretrained=True, in_chans=6).eval()
    rgb = torch.randn(2, 3, 64, 64)
    assert torch.allclose(six(torch.cat([rgb, rgb], 1)), model(rgb), atol=1e-4)


def test_loaded_networks_keep_no_second_copy_of_their_weights(tmp_path):
    name = f"local-dir:{write(tmp_path)}"
    for kwargs in ({}, {"features_only": True}, {"features_only": True, "feature_cls": "getter"}):
        loaded = timm.create_model(name, pretrained=True, **kwargs)
        assert not any((getattr(m, "pretrained_cfg", None) or {}).get("state_dict") for m in loaded.modules())
        assert loaded.pretrained_cfg["source"] == "local-dir"


def test_timm_sees_a_parameternet():
    model = create("parameternet_50m", num_classes=200)
    assert isinstance(model, ParameterNet)
    assert model.pretrained_cfg["first_conv"] == "stem.conv" and model.get_classifier() is model.classifier
