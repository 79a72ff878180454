"""Snippets of docs/clients.md."""

from pathlib import Path

import pytest
from test_docs import blocks

pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parent.parent.parent


def test_snippets_run(monkeypatch):
    monkeypatch.chdir(ROOT)
    found = blocks(ROOT / "docs" / "clients.md", "python")
    assert found
    for body in found:
        exec(compile(body, "clients.md", "exec"), {})
