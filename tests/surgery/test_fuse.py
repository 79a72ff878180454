"""Batch normalisation folded: the same function, nothing of it left, nothing touched that must not be."""

import copy

import pytest
import timm
import torch
from timm.utils import reparameterize_model
from torch import nn

import parameternet
from parameternet import ConvBnAct, DynamicConv, GhostBottleneck
from parameternet.surgery import fuse

NETWORKS = ("parameternet_50m", "ghostnetv2_100", "mobilenetv3_small_050", "tf_efficientnetv2_b0", "resnet10t")


def lived_in(model):
    """Statistics and scales as of a trained network, in float64, in evaluation mode."""
    torch.manual_seed(0)
    for module in model.modules():
        if getattr(module, "running_mean", None) is not None:
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
            if module.affine:
                nn.init.normal_(module.weight, 1, 0.3)
                nn.init.normal_(module.bias, 0, 0.1)
    return model.double().eval()


def norms(model):
    return [name for name, module in model.named_modules() if getattr(module, "running_mean", None) is not None]


def assert_same(got, expected):
    assert (got - expected).abs().max() <= 1e-12 * expected.abs().max()


@pytest.mark.parametrize("name", NETWORKS)
def test_a_fused_network_computes_the_same_without_batch_norm(name):
    model = lived_in(timm.create_model(name))
    x = torch.randn(3, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        expected = model(x)
        fused = fuse(model)
        assert norms(model) and not norms(fused)
        assert_same(fused(x), expected)
        assert torch.equal(model(x), expected)
        assert fuse(fused, inplace=True) is fused
        assert_same(fused(x), expected)


@pytest.mark.parametrize("arguments", [{}, {"routing": "softmax"}, {"dynamic": False}], ids=str)
def test_timms_function_reaches_every_norm_of_ours(arguments):
    model = lived_in(timm.create_model("parameternet_50m", **arguments))
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        fused = reparameterize_model(model)
        assert not norms(fused) and norms(model)
        assert_same(fused(x), model(x))


@pytest.mark.parametrize("arguments", [{}, {"dynamic": False}, {"features_only": True}], ids=str)
@pytest.mark.parametrize("name", ["parameternet_50m", "dynamic_mobilenetv3_large_100", "dynamic_ghostnet_050"])
@pytest.mark.parametrize("inplace", [False, True])
def test_timms_function_takes_a_network_in_training_mode(name, arguments, inplace):
    model = lived_in(timm.create_model(name, **arguments)).train()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        expected = copy.deepcopy(model).eval()(x)
        fused = reparameterize_model(model, inplace=inplace)
        assert all(module.training for module in fused.modules())
        for got, want in zip(outputs(fused.eval()(x)), outputs(expected), strict=True):
            assert_same(got, want)
        if name == "parameternet_50m":
            assert not norms(fused)


def outputs(result):
    return result if isinstance(result, list) else [result]


@pytest.mark.parametrize("bias", [False, True])
def test_expert_biases_are_scaled_and_the_rest_is_not_mixed(bias):
    model = lived_in(nn.Sequential(DynamicConv(4, 6, 3, bias=bias, num_experts=3), nn.BatchNorm2d(6), nn.ReLU()))
    fused = fuse(model)
    assert fused[0].output_bias.shape == (6,) and isinstance(fused[1], nn.Identity)
    x = torch.randn(5, 4, 7, 9, dtype=torch.float64)
    assert_same(fused(x), model(x))
    assert not fused[0].weight.equal(model[0].weight) and fused[0].routing.weight.equal(model[0].routing.weight)


class Reader(nn.Module):
    """The convolution's output is used twice, so the norm after it must stay; the other pair may go."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = DynamicConv(4, 4), nn.BatchNorm2d(4)
        self.next = ConvBnAct(4, 4, 1)

    def forward(self, x):
        y = self.conv(x)
        return self.next(self.norm(y) + y)


class Untraceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = GhostBottleneck(4, 6, stride=2)

    def forward(self, x):
        return self.block(x) if x.sum() > 0 else -self.block(x)


class Twice(nn.Module):
    """One convolution in front of two norms."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)
        self.a, self.b = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.b(self.conv(self.a(self.conv(x))))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(self.norm(self.a(x)))


class Scaled(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, self.weight.sigmoid(), self.bias)


@pytest.mark.parametrize(
    ("model", "left"),
    [
        (Reader(), ["norm"]),
        (Untraceable(), []),
        (Twice(), ["a", "b"]),
        (Tied(), ["norm"]),
        (nn.Sequential(Scaled(4, 4, 1), nn.BatchNorm2d(4)), ["1"]),
        (nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.BatchNorm2d(4)), ["2"]),
        (nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)), []),
        (nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, affine=False)), []),
    ],
    ids=["read twice", "untraceable", "called twice", "tied", "subclass", "not adjacent", "batch statistics", "affine"],
)
def test_only_what_is_exact_is_folded(model, left):
    fused = fuse(lived_in(model))
    assert norms(fused) == left
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    assert_same(fused(x), model(x))


def test_observed_layers_are_left_alone():
    model = lived_in(nn.Sequential(DynamicConv(4, 4), nn.BatchNorm2d(4)))
    seen = []
    model[0].register_forward_hook(lambda module, inputs, output: seen.append(output))
    fused = fuse(model)
    assert norms(fused) == ["1"]


def test_a_training_network_is_refused_and_left_as_it_was():
    model = timm.create_model("parameternet_50m").eval()
    model.blocks[3].train()
    with pytest.raises(ValueError, match=r"in training mode \(first: blocks\.3\): call model\.eval"):
        fuse(model, inplace=True)
    assert len(norms(model)) == len(norms(timm.create_model("parameternet_50m")))


def test_a_fused_network_keeps_its_configuration_and_travels(tmp_path):
    model = timm.create_model("parameternet_50m", pretrained=True).eval()
    fused = fuse(model)
    assert fused.pretrained_cfg == model.pretrained_cfg
    torch.save(fused.state_dict(), tmp_path / "fused.pth")
    again = fuse(timm.create_model("parameternet_50m", num_classes=200).eval())
    again.load_state_dict(torch.load(tmp_path / "fused.pth", weights_only=True))
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(again(x), fused(x))
        assert torch.allclose(fused(x), model(x), rtol=0, atol=1e-4 * float(model(x).abs().max()))
        scripted = torch.jit.script(fused)
        assert torch.allclose(scripted(x), fused(x), atol=1e-5)


def test_half_precision_stays_half():
    fused = fuse(lived_in(parameternet.ConvBnAct(4, 6, 1)).bfloat16())
    assert {p.dtype for p in fused.parameters()} == {torch.bfloat16}
