"""The checklists of CONTRIBUTING.md, each followed with a dummy."""

import sys
from types import ModuleType

import click
import numpy as np
import pytest
import timm
import torch
from click.testing import CliRunner
from timm.models import _registry, register_model

from parameternet import DynamicConv, cli, export
from parameternet.models.parameternet import ParameterNet

STAGES = (((3, 16, 16, 0, 1),), ((3, 16, 16, 0, 2),))


@pytest.fixture
def module(monkeypatch):
    """A module that can be imported by its name while the test runs."""

    def add(name, **content):
        made = ModuleType(name)
        vars(made).update(content)
        monkeypatch.setitem(sys.modules, name, made)
        return made

    return add


def test_a_model_is_an_entry_point_with_a_decorator(monkeypatch, module):
    from parameternet.models import build_model, catalogue

    def dummynet_5m(pretrained=False, **kwargs):
        return build_model(ParameterNet, "dummynet_5m", pretrained, **{"stages": STAGES, "width": 0.25, **kwargs})

    for table in ("_model_entrypoints", "_module_to_models", "_model_to_module", "_model_has_pretrained"):
        if hasattr(_registry, table):
            monkeypatch.setattr(_registry, table, getattr(_registry, table).copy())
    dummynet_5m.__module__ = "parameternet.models.dummynet"
    module(dummynet_5m.__module__, default_cfgs={}, __all__=[])
    register_model(dummynet_5m)
    model = timm.create_model("dummynet_5m", num_classes=7).eval()
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 7)
    assert catalogue.is_ours("dummynet_5m") and "dummynet_5m" in catalogue.architectures()
    assert any(isinstance(layer, DynamicConv) for layer in model.modules())


def test_a_command_is_a_row_and_a_file(monkeypatch, module):
    @click.command()
    @click.argument("name")
    def greet(name):
        """Greet NAME."""
        click.echo(f"hello {name}")

    module("parameternet.cli.greet", greet=greet)
    monkeypatch.setitem(cli.COMMANDS, "greet", "Greet a name.")
    assert CliRunner().invoke(cli.main, ["greet", "Ada"]).output == "hello Ada\n"
    assert "Greet a name." in CliRunner().invoke(cli.main, ["--help"]).output


def test_an_export_format_is_a_name_and_a_file(monkeypatch, module, tmp_path):
    """A format that keeps the weights of a linear network as text."""

    def write(model, path, plan):
        assert plan.size == (3, 4, 4)
        np.savetxt(path, model[1].weight.detach().numpy() * factor)

    def runner(path):
        weight = np.loadtxt(path, ndmin=2)
        return lambda x: [(x.reshape(len(x), -1) @ weight.T).astype("float32")]

    factor = 1.0
    module("parameternet.export.text", SUFFIX=".text", write=write, runner=runner, read=lambda path: {})
    monkeypatch.setattr(export, "FORMATS", (*export.FORMATS, "text"))
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 5, bias=False))
    made = export.export(network, tmp_path / "net.text", "text", size=4)
    assert made.path.is_file() and max(made.differences.values()) < 1e-4
    factor = 2.0  # a file that computes something else is not kept
    with pytest.raises(export.ExportError):
        export.export(network, tmp_path / "other.text", "text", size=4)
    assert not (tmp_path / "other.text").exists()
