"""What `freeze` leaves to train: the patterns of docs/finetuning.md, and the recipe that trains routers and norms."""

import re
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from parameternet import DynamicConv, Router, weights
from parameternet.training import load_recipe, run
from parameternet.training.build import freeze
from parameternet.training.checkpoint import load_last

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs" / "finetuning.md"
RECIPE = ROOT / "configs" / "train" / "parameternet_50m_routers_cifar10.yaml"
PARTS = {"experts": DynamicConv, "routers": Router, "norms": nn.BatchNorm2d, "static convolutions": nn.Conv2d}


def owned(model, kinds, buffers=False):
    """Names of the tensors that modules of these kinds have themselves, without those of modules inside them."""
    found = set()
    for name, module in model.named_modules():
        if isinstance(module, kinds):
            tensors = [
                *module.named_parameters(recurse=False),
                *(module.named_buffers(recurse=False) if buffers else ()),
            ]
            found |= {f"{name}.{key}" for key, _ in tensors}
    return found


def patterns():
    """(network, part, patterns) for each cell of the table in the docs."""
    rows = re.findall(r"^\| (experts|routers|norms|static convolutions) \| (.*) \| (.*) \|$", DOCS.read_text(), re.M)
    for part, *cells in rows:
        for name, cell in zip(("parameternet_600m", "dynamic_efficientnet_lite0"), cells, strict=True):
            yield name, part, re.findall("`(.*?)`", cell)


def test_the_docs_have_a_row_for_each_part():
    assert {part for _, part, _ in patterns()} == set(PARTS)


@pytest.mark.parametrize(("name", "part", "found"), [*patterns()] if DOCS.is_file() else [], ids=str)
def test_the_patterns_of_the_docs_freeze_exactly_that_part(name, part, found):
    model = timm.create_model(name)
    freeze(model, found)
    frozen = {key for key, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen and frozen == owned(model, PARTS[part])


def test_the_recipe_trains_routers_norms_and_the_classifier_and_nothing_else(pictures, tmp_path):
    small = {"train": pictures / "train", "val": pictures / "val", "batch_size": 8, "epochs": 2, "cache": "none"}
    small |= {"workers": 0, "init": weights.shipped("weights") / "parameternet_50m.tin200"}
    recipe = load_recipe(RECIPE, [f"{key}={value}" for key, value in small.items()])
    run(recipe, tmp_path)
    after, model = load_last(tmp_path)["model"], timm.create_model("parameternet_50m", pretrained=True)
    before = model.state_dict()
    changed = {
        name for name in after if not name.startswith("classifier") and not torch.equal(before[name], after[name])
    }
    expected = owned(model, (Router, nn.BatchNorm2d), buffers=True)
    assert changed == expected and not expected & owned(model, DynamicConv)
    assert after["classifier.weight"].shape[0] == 3 and after["classifier.weight"].std() > 0


def test_only_what_the_recipe_trains_gets_gradients():
    model = timm.create_model("parameternet_50m", pretrained=True)
    freeze(model, load_recipe(RECIPE).freeze)
    model(torch.randn(2, 3, 64, 64)).square().sum().backward()
    got = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert got == owned(model, (Router, nn.BatchNorm2d, nn.Linear))


@pytest.mark.parametrize(("number", "expected"), [(0, ([], 1e-3)), (1, ([1e-4], 1e-3))], ids=["frozen", "slower"])
def test_the_examples_of_the_docs_run(number, expected):
    snippet = re.findall(r"^```python\n(.*?)^```$", DOCS.read_text(), re.MULTILINE | re.DOTALL)[number]
    left = {}
    exec(compile(snippet, str(DOCS), "exec"), left)
    assert {weight.ndim for weight in left["experts"]} == {4}
    experts, others = rates_of(left["optimizer"], {id(weight) for weight in left["experts"]})
    assert (experts, others[-1]) == expected


def rates_of(optimizer, experts):
    """Learning rates of the experts, and of everything else, in ascending order."""
    rates = [(id(p) in experts, group["lr"]) for group in optimizer.param_groups for p in group["params"]]
    return tuple(sorted({rate for is_expert, rate in rates if is_expert == wanted}) for wanted in (True, False))
