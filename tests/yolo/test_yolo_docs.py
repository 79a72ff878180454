"""Snippets about YOLO in README and docs/yolo.md."""

from pathlib import Path

import pytest
import yaml
from test_docs import blocks
from ultralytics import YOLO

import parameternet.yolo  # noqa: F401

ROOT = Path(__file__).resolve().parent.parent.parent
PAGES = [ROOT / "README.md", ROOT / "docs" / "yolo.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_snippets_run(page):
    found = [body for body in blocks(page, "python") if "parameternet.yolo" in body]
    assert found
    for body in found:
        exec(compile(body, page.name, "exec"), {})


def test_rows_build(tmp_path):
    [body] = blocks(PAGES[1], "yaml")
    dynamic, c2f, *backbone = yaml.safe_load(body)
    small = {"nc": 2, "scales": {"n": [0.33, 0.25, 1024]}}
    head = [[-1, 1, "Classify", ["nc"]]]
    for rows in ([[-1, 1, "Conv", [64, 3, 2]], dynamic, c2f], backbone):
        path = tmp_path / f"yolov8n-{len(rows)}-cls.yaml"
        path.write_text(yaml.safe_dump({**small, "backbone": rows, "head": head}))
        assert YOLO(path, task="classify").model
