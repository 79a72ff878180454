"""A dense network and the dynamic one made of it: the same function, and one that trains on."""

import json

import pytest
import timm
import torch
from timm.layers import Conv2dSame, ScaledStdConv2d
from torch import nn
from trained import trained

from parameternet.layers import DynamicConv, Router
from parameternet.surgery import upcycle, upcycle_state_dict
from parameternet.surgery.upcycle import KINDS, rebuild

NETWORKS = [
    "ghostnet_100",
    "ghostnetv2_100",
    "ghostnetv3_100",
    "mobilenetv3_large_100",
    "efficientnet_b0",
    "resnet18",
    "convnext_atto",
    "regnety_002",
]


class Small(nn.Module):
    """A stem, two readers of one tensor, a strided pair, squeeze-and-excitation, a head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.left = nn.Conv2d(8, 16, 1)
        self.right = nn.Conv2d(8, 16, 3, padding=1, bias=False)
        self.same = Conv2dSame(16, 16, 3, stride=2, groups=16)
        self.grouped = nn.Conv2d(16, 16, 3, padding="same", groups=4)
        self.squeeze = nn.Conv2d(16, 16, 1)
        self.head = nn.Conv2d(16, 5, 1)

    def forward(self, x):
        x = self.stem(x).relu()
        x = (self.left(x) + self.right(x)).relu()
        x = self.grouped(self.same(x)).relu()
        x = x * self.squeeze(x.mean((2, 3), keepdim=True)).sigmoid()
        return self.head(x).mean((2, 3))


@pytest.fixture
def small():
    torch.manual_seed(0)
    return Small().eval()


def largest_difference(a, b, x):
    with torch.no_grad():
        expected = a(x)
        return float((b(x) - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("name", NETWORKS)
def test_timm_networks_keep_their_function_and_every_expert_and_router_learns(name):
    dense = trained(name, num_classes=10)
    dynamic = upcycle(dense)
    assert largest_difference(dense, dynamic, torch.randn(2, 3, 96, 96)) <= 1e-5
    dynamic.train()(torch.randn(4, 3, 64, 64)).square().sum().backward()
    for layer in dynamic.upcycling.converted:
        conv = dynamic.get_submodule(layer.name)
        for expert in conv.weight.grad.chunk(4):
            assert expert.abs().sum() > 0, layer.name
        assert conv.routing.weight.grad.abs().sum() > 0, layer.name


@pytest.mark.parametrize(
    "options",
    [
        {"routing": "softmax"},
        {"routing": "sigmoid"},
        {"num_experts": 1},
        {"num_experts": 3, "routing_hidden": 4},
        {"routing": "sigmoid", "neutral_weight": 0.25},
        {"noise": 0.0},
        {"noise": 2.0, "stem": True, "head": True},
        {"redraw": 0.5},
        {"redraw": 0.5, "routing": "sigmoid", "neutral_weight": 0.3},
    ],
    ids=str,
)
def test_every_start_keeps_the_function(small, options):
    dynamic = upcycle(small.double(), **options)
    assert largest_difference(small, dynamic, torch.randn(3, 3, 9, 9, dtype=torch.float64)) < 1e-14


def test_part_of_each_expert_is_drawn_anew(small):
    dense = small.right.weight.detach()
    experts = upcycle(small, noise=0.0, redraw=0.25).right.weight.detach().unflatten(0, (4, -1))
    assert torch.allclose(experts.mean(0), dense, atol=1e-6)
    # An output channel changes where it was drawn anew, and where it makes up for that in another expert.
    apart = (experts - dense).flatten(2).std(2) / dense.std()
    assert 0.1 < float((apart > 0.7).double().mean()) < 0.45 and float((apart < 1e-6).double().mean()) > 0.05
    again = upcycle(small, noise=0.0, redraw=0.25, seed=1).right.weight.detach()
    assert not torch.equal(again.unflatten(0, (4, -1)), experts)


def test_noise_tells_experts_apart_by_the_given_size_and_a_seed(small):
    for noise in (0.0, 0.3):
        kernel = upcycle(small, noise=noise).right.weight.detach().chunk(4)
        spread = (kernel[0] - kernel[1]).std() / (torch.stack(kernel).mean(0)).square().mean().sqrt()
        # Differences of two independent draws have sqrt(2) times the spread.
        assert float(spread) == pytest.approx(noise * 2**0.5, rel=0.15)
    one, same, other = (upcycle(small, seed=seed).right.weight for seed in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_a_random_router_changes_the_function_a_little(small):
    changed = upcycle(small, router_std=0.01)
    assert float(changed.left.routing.weight.detach().std()) == pytest.approx(0.01, rel=0.5)
    assert 1e-7 < largest_difference(small, changed, torch.randn(2, 3, 9, 9)) < 0.05


def test_what_is_left_dense_and_why(small):
    left = {layer.name: layer.left for layer in upcycle(small).upcycling.layers}
    assert left == {
        "stem": "the stem",
        "left": None,
        "right": None,
        "same": None,
        "grouped": None,
        "squeeze": "reads a single position: squeeze-and-excitation or a head",
        "head": "the head",
    }


@pytest.mark.parametrize(
    ("options", "converted"),
    [
        ({"include": "l*"}, ["left"]),
        ({"exclude": ("l*", "grouped")}, ["right", "same"]),
        ({"kinds": ["pointwise"]}, ["left"]),
        ({"kinds": ["depthwise", "grouped"]}, ["same", "grouped"]),
        ({"kinds": ["dense"]}, ["right"]),
        ({"kernel_sizes": [3]}, ["right", "same", "grouped"]),
        ({"min_channels": 16}, ["same", "grouped"]),
        ({"stem": True, "kinds": ["dense"]}, ["stem", "right"]),
        ({"head": True, "kinds": ["pointwise"]}, ["left", "squeeze", "head"]),
    ],
    ids=str,
)
def test_layers_are_chosen(small, options, converted):
    dynamic = upcycle(small, **options)
    assert [layer.name for layer in dynamic.upcycling.converted] == converted
    assert [name for name, m in dynamic.named_modules() if isinstance(m, DynamicConv)] == converted


def test_convolutions_that_read_the_same_tensor_share_a_router(small):
    shared, apart = upcycle(small), upcycle(small, share_routers=False)
    assert shared.left.routing is shared.right.routing
    assert apart.left.routing is not apart.right.routing
    assert sum(isinstance(m, Router) for m in shared.modules()) == 3
    # The leader of two may stay dense.
    assert upcycle(small, exclude="left").upcycling.converted[0].router == "right"


def test_a_tensor_that_was_written_to_is_another_one():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x):
            x = self.stem(x)
            a = self.a(x)
            return a + self.b(x.relu_())

    dynamic = upcycle(InPlace())
    assert dynamic.a.routing is not dynamic.b.routing


def test_what_cannot_be_converted_is_left_alone():
    tied = nn.Conv2d(4, 4, 1)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1),
        ScaledStdConv2d(4, 4, 3),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
        tied,
        tied,
        torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1)),
        nn.Conv2d(4, 4, 1),
    )
    left = [layer.left for layer in upcycle(model).upcycling.layers]
    assert left == [
        "the stem",
        "a ScaledStdConv2d may compute something else from its weights",
        "pads with reflect",
        "is shared, or shares its weight",
        "has hooks or a parametrization",
        None,
    ]


def test_the_original_is_untouched_unless_asked_and_modes_stay(small):
    before = {name: value.clone() for name, value in small.state_dict().items()}
    small.left.weight.requires_grad_(False)
    small.train()
    small.right.eval()
    dynamic = upcycle(small)
    assert {n: torch.equal(v, before[n]) for n, v in small.state_dict().items()} == dict.fromkeys(before, True)
    assert small.training and dynamic.training and dynamic.left.training and not dynamic.right.training
    assert not dynamic.left.weight.requires_grad and dynamic.right.weight.requires_grad
    assert upcycle(small, inplace=True) is small and isinstance(small.left, DynamicConv)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_experts": 0}, "num_experts must be at least 1, got 0"),
        ({"kinds": ["1x1"]}, "kinds must be some of pointwise, depthwise, dense, grouped"),
        ({"kinds": "dense"}, "kinds must be some of"),
        ({"noise": -1}, "must not be negative"),
        ({"redraw": 1.0}, "redraw must be at least 0 and below 1, got 1.0"),
        ({"neutral_weight": 1.0}, "neutral_weight must be between 0 and 1, got 1.0"),
        ({"include": "none"}, "no layer of this Small can be converted .*stem: the stem; left: does not match none"),
        ({"routing": "relu"}, "routing must be one of sigmoid, softmax"),
    ],
)
def test_errors_say_what_to_do(small, options, message):
    with pytest.raises(ValueError, match=message):
        upcycle(small, **options)


def test_network_that_fails_on_the_meta_device_is_classified_by_names():
    class Data(Small):
        def forward(self, x):
            return super().forward(x) if float(x.sum()) > 0 else super().forward(-x)

    names = [layer.name for layer in upcycle(Data()).upcycling.converted]
    assert names == ["left", "right", "same", "grouped", "squeeze"]  # nothing says that squeeze reads one position


def test_on_the_meta_device():
    with torch.device("meta"):
        dynamic = upcycle(timm.create_model("resnet18"))
    assert all(p.is_meta for p in dynamic.parameters())
    assert dynamic(torch.empty(2, 3, 64, 64, device="meta")).shape == (2, 1000)


# State dicts and recipes ----------------------------------------------------------------------------------------------


def test_a_dense_state_dict_becomes_a_dynamic_one(small):
    torch.manual_seed(1)
    dynamic = upcycle(Small().eval())
    dynamic.load_state_dict(upcycle_state_dict(small.state_dict(), dynamic))
    assert largest_difference(small, dynamic, torch.randn(2, 3, 9, 9)) < 1e-6
    assert torch.equal(dynamic.right.weight, upcycle(small).right.weight)  # the same noise by the same name


def test_a_dynamic_state_dict_passes_unchanged(small):
    state = upcycle(small, seed=3).state_dict()
    passed = upcycle_state_dict(state, upcycle(small))
    assert all(torch.equal(passed[name], value) for name, value in state.items())


def test_rebuild_follows_the_recipe_regardless_of_rules(small):
    dynamic = upcycle(small, num_experts=3, routing="sigmoid", routing_hidden=4, exclude="same")
    recipe = json.loads(json.dumps(dynamic.upcycling.recipe()))
    again = rebuild(Small().eval(), recipe)
    again.load_state_dict(dynamic.state_dict())
    assert again.left.routing is again.right.routing
    assert largest_difference(dynamic, again, torch.randn(2, 3, 9, 9)) == 0
    assert again.upcycling.recipe() == dynamic.upcycling.recipe()


def test_a_recipe_of_another_network_is_refused(small):
    recipe = upcycle(small).upcycling.recipe()
    with pytest.raises(ValueError, match="this ResNet has no convolution left, right, same, grouped"):
        rebuild(timm.create_model("resnet18"), recipe)


def test_kinds_are_those_that_the_documentation_names():
    assert all(f"'{kind}'" in upcycle.__doc__ for kind in KINDS)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_the_same_layers_are_chosen_where_gradients_are_off(mode):
    def shapes():
        return {name: value.shape for name, value in timm.create_model("dynamic_ghostnetv2_100").state_dict().items()}

    with mode():
        inside = shapes()
    assert inside == shapes()
