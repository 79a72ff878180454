"""Routers start by routing every image alike, which would hide faults from most tests: here their weights are drawn."""

import os

# Processes of pytest-xdist share the cores; read when torch is imported, also by the programs that tests start.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

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
