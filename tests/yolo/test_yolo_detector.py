"""The detector of `parameternet app --detector`: a YOLO file, and what stock Ultralytics finds with it."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from ultralytics import YOLO

import parameternet.yolo  # noqa: F401  registers the layers
from parameternet.yolo.detector import Detector

PHOTO = Path(__file__).parent.parent / "photos" / "coffee.jpg"


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """An untrained detector that is sure of something."""
    torch.manual_seed(0)
    model = YOLO("yolov8n-dynamicconv.yaml")
    for branch in model.model.model[-1].cv3:
        torch.nn.init.normal_(branch[-1].weight, std=0.5)
        torch.nn.init.zeros_(branch[-1].bias)
    path = tmp_path_factory.mktemp("yolo") / "sure.pt"
    model.save(path)
    return path


def test_boxes_are_those_of_ultralytics(file):
    (expected,) = YOLO(file).predict(str(PHOTO), verbose=False)
    found = Detector(file)(Image.open(PHOTO).convert("RGB"))
    assert len(found) == len(expected.boxes) > 0
    assert [one.label for one in found] == [expected.names[int(kind)] for kind in expected.boxes.cls]
    assert [one.confidence for one in found] == pytest.approx(expected.boxes.conf.tolist(), abs=1e-4)
    assert torch.allclose(torch.tensor([one.box for one in found]).float(), expected.boxes.xyxy, atol=1)
    width, height = Image.open(PHOTO).size
    for left, top, right, bottom in (one.box for one in found):
        assert 0 <= left <= right <= width and 0 <= top <= bottom <= height


def test_a_file_of_another_task_is_refused(tmp_path):
    YOLO("yolov8n-cls.yaml").save(tmp_path / "classifier.pt")
    with pytest.raises(ValueError, match=r"classifier\.pt is a network to classify; give one to detect"):
        Detector(tmp_path / "classifier.pt")
