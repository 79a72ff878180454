"""Weights show what their routers compute, so networks with other defaults load them and compute what they did."""

import copy
import warnings

import pytest
import timm
import torch
from torch import nn

import parameternet
from parameternet import DynamicConv, Router
from parameternet.layers import match_routers, set_temperature
from parameternet.models.builder import build_from_config, build_model, hub_layout

KINDS = {
    f"{activation}, {norm}{', hidden' if hidden else ''}": {"activation": activation, "norm": norm, "hidden": hidden}
    for activation in ("softmax", "sigmoid")
    for norm in ("layer", "none")
    for hidden in (None, 5)
}
PAIRS = [(a, b) for a in KINDS for b in KINDS if KINDS[a]["hidden"] == KINDS[b]["hidden"]]
SMALL = {"stages": (((3, 16, 16, 0, 1),), ((3, 48, 24, 0.25, 2),)), "width": 0.5, "num_classes": 5}
ROUTINGS = ["softmax", "sigmoid"]


def trained(module):
    """With routers drawn, and the temperature of softmax routers, so that no two kinds compute the same."""
    torch.manual_seed(0)
    for router in module.modules():
        if isinstance(router, Router):
            for parameter in router.parameters():
                nn.init.normal_(parameter)
    set_temperature(module, 0.7)
    return module.eval()


def routers(model):
    return {m.activation for m in model.modules() if isinstance(m, Router)}


def test_defaults():
    assert Router(8).activation == DynamicConv(8, 8).routing.activation == "softmax"
    for name in ("parameternet_50m", "parameternet_150m", "parameternet_300m", "yolov8n_dynamicconv"):
        assert routers(timm.create_model(name)) == {"softmax"}
    assert routers(timm.create_model("parameternet_600m")) == {"sigmoid"}  # as released


@pytest.mark.filterwarnings("ignore:a router's state dict has no temperature")
@pytest.mark.parametrize(("mine", "theirs"), PAIRS)
@pytest.mark.parametrize("options", [{}, {"strict": False}, {"assign": True}], ids=str)
def test_a_router_loads_every_kind(mine, theirs, options):
    router, other = Router(8, 3, **KINDS[mine]), trained(Router(8, 3, **KINDS[theirs]))
    x = torch.rand(4, 8, 5, 6)
    router.load_state_dict(other.state_dict(), **options)
    assert torch.equal(router(x), other(x))
    assert (router.activation, router.norm) == (other.activation, other.norm)
    assert router.state_dict().keys() == other.state_dict().keys()
    assert torch.equal(copy.deepcopy(router)(x), other(x))
    assert torch.allclose(torch.jit.script(router)(x), other(x), atol=1e-6)


def test_a_router_changes_on_its_device():
    with torch.device("meta"):
        router = Router(8, 3, "sigmoid")
    other = trained(Router(8, 3))
    router.load_state_dict(other.state_dict(), assign=True)
    assert torch.equal(router(torch.ones(1, 8, 1, 1)), other(torch.ones(1, 8, 1, 1)))


def test_a_missing_temperature_is_not_silent():
    parameters = dict(trained(Router(8, 3)).named_parameters())  # as some tools save
    with pytest.warns(UserWarning, match="no temperature, so it is loaded as a sigmoid router"):
        Router(8, 3).load_state_dict(parameters, strict=False)
    router = Router(8, 3)
    router.load_state_dict({}, strict=False)  # of other layers
    router.load_state_dict({"bias": torch.zeros(1, 3)}, strict=False)
    assert router.activation == "softmax"


@pytest.mark.parametrize("theirs", ROUTINGS)
@pytest.mark.parametrize("mine", ROUTINGS)
def test_networks_compute_what_their_weights_did(mine, theirs):
    other, x = trained(parameternet.ParameterNet(**SMALL, routing=theirs)), torch.randn(2, 3, 32, 32)
    model = parameternet.ParameterNet(**SMALL, routing=mine).eval()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        match_routers(model, other.state_dict())
        model.load_state_dict(other.state_dict())
        assert torch.equal(model(x), other(x))
        assert torch.equal(parameternet.fuse(copy.deepcopy(model))(x), parameternet.fuse(other)(x))


@pytest.mark.parametrize("arguments", [{}, {"num_classes": 7}, {"in_chans": 1}, {"num_classes": 0}], ids=str)
@pytest.mark.parametrize(
    ("name", "routing"),
    [("parameternet_50m", "sigmoid"), ("parameternet_300m", "softmax"), ("parameternet_600m", "sigmoid")],
)
def test_shipped_weights_keep_their_routers(name, routing, arguments):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = timm.create_model(name, pretrained=True, **arguments)
    assert routers(model) == {routing}
    assert routers(timm.create_model(name, pretrained=True, features_only=True)) == {routing}


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("told", [True, False])
def test_configs_name_the_routing_of_weights_that_differ_from_the_default(routing, told):
    model = trained(timm.create_model("parameternet_50m", num_classes=3, routing=routing))
    config = hub_layout(model, {"routing": routing} if told else {})
    assert config["model_args"].get("routing", "softmax") == routing
    again, x = build_from_config(config, state_dict=model.state_dict()).eval(), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(again(x), model(x))


def test_training_goes_on_with_the_parameters_of_the_optimizer():
    """An optimizer made before loading must still update the router that was switched."""
    conv = DynamicConv(4, 6, num_experts=3, routing="sigmoid")
    optimizer = torch.optim.SGD(conv.parameters(), lr=1.0)
    conv.load_state_dict(trained(DynamicConv(4, 6, num_experts=3)).state_dict())
    before = conv.routing.weight.detach().clone()
    conv(torch.randn(2, 4, 3, 3)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(conv.routing.weight, before)


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"routing": "softmax"}, "routing='softmax'"),
        ({"routing_norm": "none"}, "routing_norm='none'"),
        ({"temperature": 4.0}, "temperature=4.0"),
    ],
    ids=str,
)
def test_other_routers_than_those_of_the_weights_are_refused(asked, named):
    with pytest.raises(ValueError, match=f"{named} was asked for, but the routers of parameternet_50m"):
        timm.create_model("parameternet_50m", pretrained=True, **asked)
    assert timm.create_model("parameternet_50m", **asked)


def test_a_network_built_without_defaults_refuses_too():
    """A network of one's own may hand all its arguments to `build_model` as keywords."""
    with pytest.raises(ValueError, match="routing='softmax' was asked for, but the routers of parameternet_50m"):
        build_model(parameternet.ParameterNet, "parameternet_50m", True, width=0.5, num_classes=200, routing="softmax")


@pytest.mark.parametrize("name", ["parameternet_50m", "parameternet_300m", "parameternet_600m"])
def test_the_routers_of_the_weights_may_be_named(name):
    def kinds(**asked):
        model = timm.create_model(name, pretrained=True, **asked)
        return {(m.activation, m.norm) for m in model.modules() if isinstance(m, Router)}

    ((routing, norm),) = kinds()
    assert kinds(routing=routing, routing_norm=norm, temperature=1.0) == {(routing, norm)}


@pytest.mark.parametrize("arguments", [{"num_experts": 8}, {"width": 1.0}], ids=str)
def test_weights_of_another_shape_are_not_reported_as_missing_temperatures(arguments):
    with pytest.raises(RuntimeError, match=r"size mismatch for stem\.conv\.weight") as caught:
        timm.create_model("parameternet_50m", pretrained=True, **arguments)
    assert "temperature" not in str(caught.value)
