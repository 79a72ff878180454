"""The public API: what 0.1.0 had works, by its old name too, and today's names are those listed here."""

import importlib
import inspect
import json
import warnings
from pathlib import Path

import pytest
import torch

import parameternet
from parameternet import deprecation

OLD = json.loads((Path(__file__).parent / "fixtures" / "api_0.1.0.json").read_text())
ROOMS = {
    "parameternet": "ConvBnAct DynamicConv GhostBottleneck GhostModule ParameterNet Router __version__ collapse "
    "convert_condconv count_flops dynamic_conv2d fuse models param_groups set_temperature upcycle",
    "parameternet.layers": "STRATEGIES ConvBnAct DynamicConv GhostBottleneck GhostModule Recording Router "
    "dynamic_conv2d match_routers record_routing_weights set_temperature",
    "parameternet.prediction": "DEFAULT_MODEL ImageLike Predictor Result Summary class_names draw expand load "
    "predict_to_file read_image",
    "parameternet.routing": "Ablated LayerRouting Routing Row Sample ablate draw find_images measure",
    "parameternet.surgery": "collapse compare convert_condconv dilate fuse measure_routing upcycle upcycle_state_dict",
}
PAIRS = [(module, name) for module, names in OLD.items() for name in names if module != "parameternet.yolo"]


@pytest.mark.parametrize(("module", "name"), PAIRS, ids=lambda part: part)
def test_every_name_of_0_1_0_and_its_arguments_work(module, name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        found = getattr(importlib.import_module(module), name)
    if not callable(found) or (inspect.isclass(found) and issubclass(found, Exception)):
        return
    now = inspect.signature(found).parameters
    former = getattr(found.__init__ if inspect.isclass(found) else found, "former_arguments", {})
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in now.values())
    # Nobody but the package makes results, so it is enough that they can be read by the old name.
    readable = vars(found) if inspect.isclass(found) else {}
    missing = [name for name in OLD[module][name] if name not in {*now, *former, *readable}]
    assert takes_any or not missing, f"{module}.{name} no longer takes {missing}"


@pytest.mark.parametrize("room", ROOMS)
def test_the_names_of_a_room_are_those_listed(room):
    assert sorted(importlib.import_module(room).__all__) == sorted(ROOMS[room].split())


def test_moved_names_warn_and_are_the_same_objects():
    from parameternet import routing

    for old, new in {"Picture": routing.Sample, "find_pictures": routing.find_images}.items():
        with pytest.warns(DeprecationWarning, match=f"parameternet.routing.{old} is deprecated, use"):
            assert getattr(routing, old) is new
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        routing.nonsense  # noqa: B018


def test_renamed_arguments_warn_and_mean_the_same():
    with pytest.warns(DeprecationWarning, match="the argument inp is deprecated, use in_chs"):
        block = parameternet.GhostModule(inp=8, oup=12)
    assert block(torch.randn(1, 8, 4, 4)).shape == (1, 12, 4, 4)
    with pytest.raises(TypeError, match="got both in_chs and its former name inp"):
        parameternet.GhostModule(8, 12, in_chs=8, inp=8)
    dense = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.Conv2d(4, 4, 1))
    with pytest.warns(DeprecationWarning, match="coefficient is deprecated, use neutral_weight"):
        dynamic = parameternet.upcycle(dense, routing="sigmoid", coefficient=0.25, probe=torch.randn(1, 3, 4, 4))
    assert torch.allclose(dynamic[1].routing(torch.randn(1, 4, 4, 4)), torch.full((1, 4), 0.25))


def test_the_output_bias_was_called_shift():
    conv, x = parameternet.DynamicConv(4, 6), torch.randn(2, 4, 5, 5)
    conv.output_bias = torch.nn.Parameter(torch.randn(6))
    with pytest.warns(DeprecationWarning, match="DynamicConv.shift is deprecated, use output_bias"):
        assert conv.shift is conv.output_bias
    state = conv.state_dict()
    state["shift"] = state.pop("output_bias")
    other = parameternet.DynamicConv(4, 6)
    other.output_bias = torch.nn.Parameter(torch.zeros(6))
    other.load_state_dict(state)
    assert torch.equal(other(x), conv(x))
    routing_weights = torch.rand(2, 4)
    with pytest.warns(DeprecationWarning, match="the argument shift is deprecated"):
        y = parameternet.dynamic_conv2d(x, conv.weight, routing_weights, shift=conv.output_bias)
    assert torch.equal(y, parameternet.dynamic_conv2d(x, conv.weight, routing_weights, output_bias=conv.output_bias))
    pickled = conv.__getstate__() if hasattr(conv, "__getstate__") else conv.__dict__
    pickled = {**pickled, "_parameters": dict(pickled["_parameters"])}
    pickled["_parameters"]["shift"] = pickled["_parameters"].pop("output_bias")
    restored = parameternet.DynamicConv.__new__(parameternet.DynamicConv)
    restored.__setstate__(pickled)
    assert torch.equal(restored(x), conv(x))


def test_old_attributes_warn_and_mean_the_same():
    class New:
        images = 3
        pictures = deprecation.renamed("pictures", "images")

    with pytest.warns(DeprecationWarning, match="New.pictures is deprecated, use images"):
        assert New().pictures == 3
