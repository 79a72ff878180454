"""Layers, blocks and networks give what the released code gives."""

import json
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from reference import golden_input, relative_error, scaled
from torch import nn

from parameternet import ConvBnAct, DynamicConv, GhostBottleneck, GhostModule
from parameternet.models.parameternet import checkpoint_filter_fn

FOLDER = Path(__file__).parent / "golden"
CASES = {case["id"]: case for case in json.loads((FOLDER / "golden_cases.json").read_text())["cases"]}
LAYERS = [name for name, case in CASES.items() if "DynamicConv" in case["module"] and "C2f" not in case["module"]]
BLOCKS = [
    name
    for name, case in CASES.items()
    if case["module"].split(".")[-1] in ("ConvBnAct", "GhostModule", "GhostBottleneck")
]
NETWORKS = {
    "parameternet_600m_224": ("parameternet_600m", "parameternet_600m_keys.json"),
    "reconstructed_300m_128": ("parameternet_300m", "parameternet_300m_keys.json"),
}
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5}


def build(case):
    """The module of a case: the released code's arguments in our names."""
    args = {k: tuple(v) if isinstance(v, list) else v for k, v in case["args"].items()}
    kind = case["module"].split(" ")[0].split(".")[-1]
    if "act_layer" in args:
        args["act_layer"] = {None: None, "hardswish": nn.Hardswish}[args["act_layer"]]
    if kind == "DynamicConv":
        return DynamicConv(args.pop("in_features"), args.pop("out_features"), **args)
    return {"ConvBnAct": ConvBnAct, "GhostModule": GhostModule, "GhostBottleneck": GhostBottleneck}[kind](**args)


def fill_module(module, rows):
    """Load the official rows through the checkpoint filter."""
    official = {row[0]: scaled(*row) for row in rows}
    missing, unexpected = module.load_state_dict(checkpoint_filter_fn(official, module), strict=False)
    assert not unexpected
    assert all("num_batches_tracked" in name or name.endswith("temperature") for name in missing), missing


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", LAYERS + BLOCKS)
def test_case(name, dtype):
    case = CASES[name]
    module = build(case)
    assert sum(p.numel() for p in module.parameters()) == case["num_params"]
    module = module.double()
    fill_module(module, case["params"])
    module = module.to(dtype).train(case["mode"] == "train")
    x = golden_input(case["input_shape"]).to(dtype).requires_grad_()
    y = module(x)
    assert relative_error(y, case["output"]) <= TOLERANCE[dtype]
    if "routing" in case:
        assert relative_error(module.routing(x), case["routing"]) <= TOLERANCE[dtype]
    if case["mode"] == "train":
        check_gradients(module, x, y, case, TOLERANCE[dtype])


def check_gradients(module, x, y, case, tolerance):
    loss = y.square().sum()
    loss.backward()
    assert loss.item() == pytest.approx(case["loss"], rel=tolerance)
    assert relative_error(x.grad, case["gradients"]["input"]) <= tolerance
    named = dict(module.named_parameters())
    for row in case["params"]:
        name, shape = row[:2]
        if name in case["gradients"]:
            grad = named[name.replace("cond_conv.", "")].grad.reshape(shape)
            # Sums over a whole batch of maps, some of which cancel, carry more roundings than single outputs.
            assert relative_error(grad, case["gradients"][name]) <= 10 * tolerance, name
    for name, stored in case.get("buffers_after", {}).items():
        assert torch.allclose(
            module.state_dict()[name].double(), torch.tensor(stored).double(), rtol=0, atol=tolerance
        ), name


@pytest.mark.parametrize("name", NETWORKS)
def test_network(name):
    case, (architecture, keys) = CASES[name], NETWORKS[name]
    rows = json.loads((FOLDER / keys).read_text())
    model = timm.create_model(architecture, num_classes=1000).eval()
    assert sum(p.numel() for p in model.parameters()) == rows["num_params"] == case["num_params"]
    fill_module(model, rows["keys"])
    x = golden_input(case["input_shape"]).float()
    routing_samples = {n.replace("conv_stem.", "stem.conv."): r for n, r in case["routing_samples"].items()}
    routers = {n: m for n, m in model.named_modules() if n in routing_samples}
    assert len(routers) == len(routing_samples)
    seen = {}
    for router_name, router in routers.items():
        router.register_forward_hook(partial(lambda key, m, i, o: seen.__setitem__(key, o), router_name))
    with torch.no_grad():
        maps, features = model.forward_intermediates(x)
        pre_logits = model.forward_head(maps, pre_logits=True)
        logits = model.classifier(pre_logits)
    assert relative_error(logits, case["logits"]) <= 1e-4
    assert relative_error(pre_logits, case["pre_logits"]) <= 1e-4
    for key, expected in routing_samples.items():
        assert torch.allclose(seen[key][0].double(), torch.tensor(expected).double(), rtol=0, atol=1e-5), key
    by_module = dict(zip((info["module"] for info in model.feature_info), features, strict=True))
    compared = 0
    for stored in case["features"]:
        if stored["module"] in by_module:
            feature = by_module[stored["module"]].double()
            mean = torch.tensor(stored["channel_mean"]).double()
            assert list(feature.shape) == stored["shape"]
            assert (feature.mean((0, 2, 3)) - mean).abs().max() <= 1e-4 * mean.abs().max()
            compared += 1
    assert compared >= 4
