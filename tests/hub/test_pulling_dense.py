"""A dynamic network reads the dense checkpoint of timm's repository, through the real client."""

import pytest
import timm
import torch
from click.testing import CliRunner
from safetensors.torch import save
from server import TOKEN
from trained import trained

from parameternet import DynamicConv, cli, weights
from parameternet.hub import publish
from parameternet.models.upcycled import upcycle_checkpoint


@pytest.fixture(scope="module")
def dense():
    return trained("ghostnet_100")


def outputs(model):
    x = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.eval()(x)


def agree(a, b):
    return float((a - b).abs().max() / b.abs().max()) <= 1e-5


def test_a_dynamic_network_has_the_logits_of_the_dense_checkpoint(hub, dense):
    hub.put("timm/ghostnet_100.in1k", {"model.safetensors": save(dense.state_dict())})
    model = timm.create_model("dynamic_ghostnet_100.in1k_upcycled", pretrained=True)
    assert agree(outputs(model), outputs(dense))
    generic = timm.create_model("dynamic_timm", source="ghostnet_100", pretrained=True)
    assert agree(outputs(generic), outputs(dense))


@pytest.mark.parametrize("kind", ["flipped", "short"])
def test_an_altered_checkpoint_is_never_used(hub, dense, kind):
    hub.put("timm/ghostnet_100.in1k", {"model.safetensors": save(dense.state_dict())})
    hub.fail(kind, "GET", "/storage/", times=99)
    with pytest.raises(weights.WeightsError):
        timm.create_model("dynamic_ghostnet_100", pretrained=True)


def test_the_command_reads_a_name_of_timm_from_the_hub(hub, dense, tmp_path):
    hub.put("timm/ghostnet_100.in1k", {"model.safetensors": save(dense.state_dict())})
    dynamic, compared = upcycle_checkpoint("ghostnet_100", tmp_path / "out")
    assert compared.difference <= 1e-5
    assert agree(outputs(dynamic), outputs(dense))


def test_an_upcycled_folder_is_published_and_pulled(hub, dense, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.put("timm/ghostnet_100.in1k", {"model.safetensors": save(dense.state_dict())})
    upcycle_checkpoint("ghostnet_100", tmp_path / "out", num_experts=2)
    card = CliRunner().invoke(cli.main, ["card", str(tmp_path / "out")]).output
    assert "ghostnet_100" in card and "upcycled" in card
    publish(tmp_path / "out", "somebody/dynamic")
    assert {"README.md", "config.json", "model.safetensors"} <= set(hub.files("somebody/dynamic"))
    pulled = timm.create_model("hf-hub:somebody/dynamic", pretrained=True)
    assert agree(outputs(pulled), outputs(dense))
    assert {m.num_experts for m in pulled.modules() if isinstance(m, DynamicConv)} == {2}
