"""torch.hub on this repository. It loads from any folder, but lists and helps only from where it keeps downloads."""

import subprocess
import sys
from pathlib import Path

import checkpoints
import pytest
import timm
import torch

import parameternet  # noqa: F401  registers the networks

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture
def cloned(monkeypatch, tmp_path):
    """The repository where torch.hub keeps what it has downloaded."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "somebody_parameternet_main").symlink_to(REPOSITORY)
    return "somebody/parameternet:main"


def ours():
    return {name for name in timm.list_models() if timm.model_entrypoint(name).__module__.startswith("parameternet.")}


def test_list_names_every_network(cloned):
    assert set(torch.hub.list(cloned, skip_validation=True, trust_repo=True)) == ours()


def test_help_describes_each(cloned):
    for name in ours():
        words = torch.hub.help(cloned, name, skip_validation=True, trust_repo=True)
        assert "pretrained (bool)" in words and len(words.splitlines()[0]) > 20


def test_load_builds_a_network_with_its_arguments():
    model = torch.hub.load(str(REPOSITORY), "parameternet_50m", source="local", num_classes=7, width=0.2)
    assert model.eval()(torch.zeros(2, 3, 64, 64)).shape == (2, 7)


def test_load_takes_recorded_weights(monkeypatch, tmp_path):
    own = checkpoints.write(tmp_path / checkpoints.NAME)
    checkpoints.record(monkeypatch, own)
    cfg = {**checkpoints.config()["pretrained_cfg"], "architecture": "parameternet_50m", "tag": "tin200"}
    model = torch.hub.load(
        str(REPOSITORY), "parameternet_50m", source="local", pretrained=True, pretrained_cfg=cfg, width=0.2
    )
    for name, tensor in checkpoints.network().state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def run(code, folder):
    """Run `code` in a fresh process in `folder`, without this repository on its path; returns what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=120, env={"HOME": str(folder)}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_load_works_where_the_package_is_not_installed(tmp_path):
    hide = "import sys; sys.path[:] = [p for p in sys.path if 'parameternet' not in p]; "
    load = f"import torch; m = torch.hub.load({str(REPOSITORY)!r}, 'parameternet_50m', source='local', width=0.2); "
    assert run(hide + load + "print(type(m).__name__)", tmp_path) == "ParameterNet"


def test_nothing_is_imported_before_a_network_is_asked_for(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(REPOSITORY)!r}); import hubconf; "
    code += "print(any(name in sys.modules for name in ('torch', 'timm', 'parameternet')))"
    assert run(code, tmp_path) == "False"


def test_a_missing_package_is_named(tmp_path):
    code = f"""
import sys
sys.path.insert(0, {str(REPOSITORY)!r})
sys.modules["timm"] = None
import hubconf
try:
    hubconf.parameternet_50m()
except ModuleNotFoundError as error:
    print(error)
"""
    assert run(code, tmp_path) == "parameternet_50m needs timm: pip install timm"


def test_dependencies_are_what_the_package_imports():
    import hubconf

    for name in hubconf.dependencies:
        __import__(name)
    assert {"torch", "timm", "safetensors", "huggingface_hub"} <= set(hubconf.dependencies)
