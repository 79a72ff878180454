"""Parameter groups: who is decayed, and at which rate routers are trained."""

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from torch import nn

from parameternet import DynamicConv, param_groups


def rates(model, **kwargs):
    groups = param_groups(model, lr=0.1, weight_decay=0.05, **kwargs)
    names = {p: name for name, p in model.named_parameters()}
    return {names[p]: (round(g["lr"], 6), g["weight_decay"]) for g in groups for p in g["params"]}


def test_normalised_routers_and_static_layers_use_timms_groups():
    model = timm.create_model("parameternet_50m", num_classes=3)
    ours = torch.optim.AdamW(param_groups(model, lr=0.1, weight_decay=0.05))
    theirs = create_optimizer_v2(model, "adamw", lr=0.1, weight_decay=0.05)
    assert len(ours.param_groups) == len(theirs.param_groups) == 2
    for a, b in zip(ours.param_groups, theirs.param_groups, strict=True):
        assert (a["lr"], a["weight_decay"]) == (b["lr"], b["weight_decay"])
        assert [id(p) for p in a["params"]] == [id(p) for p in b["params"]]


def test_unnormalised_routers_get_a_lower_learning_rate():
    model = nn.Sequential(
        DynamicConv(16, 4, bias=True, routing_norm="none"),
        DynamicConv(4, 4, routing_norm="none", routing_hidden=9),
        nn.Conv2d(4, 25, 1),
    )
    assert rates(model) == {
        "0.weight": (0.1, 0.05),
        "0.bias": (0.1, 0.0),
        "0.routing.weight": (0.025, 0.05),
        "0.routing.bias": (0.1, 0.0),
        "1.weight": (0.1, 0.05),
        "1.routing.weight": (0.1, 0.05),
        "1.routing.bias": (0.1, 0.0),
        "1.routing.hidden.weight": (0.05, 0.05),
        "1.routing.hidden.bias": (0.1, 0.0),
        "2.weight": (0.1, 0.05),
        "2.bias": (0.1, 0.0),
    }
    assert {lr for lr, _ in rates(model, scale_router_lr=False).values()} == {0.1}


@pytest.mark.parametrize("layer_decay", [None, 0.5])
def test_every_trained_parameter_is_in_one_group(layer_decay):
    model = timm.create_model("parameternet_50m", num_classes=3, routing_norm="none")
    model.stem.requires_grad_(False)
    groups = param_groups(model, 0.1, 0.05, layer_decay)
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert all(("lr_scale" in group) == (layer_decay is not None) for group in groups)
    torch.optim.SGD(groups, lr=0.1)


def test_names_that_a_network_does_not_decay_are_not_decayed():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.token, self.matrix = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(2, 2))

        def no_weight_decay(self):
            return {"token"}

    assert rates(Network()) == {"token": (0.1, 0.0), "matrix": (0.1, 0.05)}


@pytest.mark.parametrize("layer_decay", [None, 0.75])
@pytest.mark.parametrize("name", ["parameternet_50m", "parameternet_600m", "dynamic_ghostnet_050"])
def test_biases_of_routers_are_not_decayed(name, layer_decay):
    found = rates(timm.create_model(name, num_classes=3), layer_decay=layer_decay)
    biases = {decay for name, (_, decay) in found.items() if name.endswith(".bias")}
    assert biases == {0.0} and any(name.endswith("routing.bias") for name in found)
    assert {decay for name, (_, decay) in found.items() if name.endswith("routing.weight")} == {0.05}
