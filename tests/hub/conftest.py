import pytest
from hub.server import Hub, connect


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub on the loopback that this process takes for the Hub, with an empty cache and nobody signed in."""
    monkeypatch.delenv("PARAMETERNET_WEIGHTS", raising=False)
    monkeypatch.delenv("PARAMETERNET_HUB", raising=False)
    with Hub() as server:
        connect(server, monkeypatch, tmp_path / "cache")
        yield server
