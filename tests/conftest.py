"""Routers start by routing every image alike, which would hide faults from most tests: here their weights are drawn."""

import pytest
from torch import nn

from parameternet import Router

START = Router.reset_parameters


def draw(router):
    START(router)
    if router.norm == "layer":
        nn.init.normal_(router.weight)


@pytest.fixture(autouse=True, scope="session")
def drawn_routers():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Router, "reset_parameters", draw)
        yield


@pytest.fixture
def neutral_routers(monkeypatch):
    """For tests of the start that users get."""
    monkeypatch.setattr(Router, "reset_parameters", START)
