"""Ultralytics' own exports of our networks: right for every batch that a file allows, routing far from uniform."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from lively import lively
from ultralytics import YOLO, __version__
from ultralytics.nn.autobackend import AutoBackend

NAMES = [
    "yolov8n-dynamicconvbnact",
    "yolo11n-c2f-dynamicconv",
    "yolov8n-c2f-ghost-dynamicconv",
    "yolov8n-parameternet_50m",
]
SIZE = 64


@pytest.fixture(scope="module", params=NAMES)
def saved(request, tmp_path_factory):
    """A checkpoint, and what its network says about three pictures."""
    path = tmp_path_factory.mktemp("export") / f"{request.param}.pt"
    model = YOLO(f"{request.param}.yaml")
    lively(model.model.eval())
    model.save(path)
    x = torch.rand(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    x = x * torch.tensor([0.1, 0.5, 1.0])[:, None, None, None]  # pictures that are routed differently
    with torch.no_grad():
        return path, x, YOLO(path).model.float().eval()(x)[0]


def assert_agrees(got, expected, boxes=1e-3, scores=1e-3):
    got = torch.as_tensor(np.asarray(got)).float()
    assert float((got[:, :4] - expected[:, :4]).abs().max()) / SIZE <= boxes
    assert float((got[:, 4:] - expected[:, 4:]).abs().max()) <= scores


@pytest.mark.parametrize("batch", [1, 3])
def test_torchscript(saved, batch):
    path, x, expected = saved
    file = YOLO(path).export(format="torchscript", imgsz=SIZE, batch=batch)
    module = torch.jit.load(file)
    for begin in range(0, 3, batch):
        assert_agrees(module(x[begin : begin + batch]), expected[begin : begin + batch])


def run_onnx(file, x):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    entry = session.get_inputs()[0]
    return session.run(None, {entry.name: x.numpy().astype(np.float16 if "float16" in entry.type else np.float32)})[0]


def test_onnx_with_a_fixed_and_with_a_free_batch(saved):
    pytest.importorskip("onnxruntime")
    path, x, expected = saved
    assert_agrees(run_onnx(YOLO(path).export(format="onnx", imgsz=SIZE), x[:1]), expected[:1])
    file = YOLO(path).export(format="onnx", imgsz=SIZE, dynamic=True)
    for batch in (1, 3):
        assert_agrees(run_onnx(file, x[:batch]), expected[:batch])
    other = torch.rand(2, 3, 96, 64)
    with torch.no_grad():
        assert_agrees(run_onnx(file, other), YOLO(path).model.float().eval()(other)[0])


@pytest.mark.skipif(__version__ < "8.4", reason="this Ultralytics writes half precision on a GPU alone")
def test_onnx_in_half_precision(saved):
    pytest.importorskip("onnxruntime")
    path, x, expected = saved
    whole = Path(YOLO(path).export(format="onnx", imgsz=SIZE, dynamic=True)).stat().st_size
    file = YOLO(path).export(format="onnx", imgsz=SIZE, half=True, dynamic=True)
    assert Path(file).stat().st_size < 0.6 * whole
    for batch in (1, 3):  # the boxes of stock networks are 0.003 to 0.004 off in half precision
        assert_agrees(run_onnx(file, x[:batch]), expected[:batch], boxes=5e-3)


def test_openvino_with_a_free_batch(saved):
    openvino = pytest.importorskip("openvino")
    path, x, expected = saved
    folder = YOLO(path).export(format="openvino", imgsz=SIZE, dynamic=True)
    core = openvino.Core()
    file = next(Path(folder).glob("*.xml"))
    compiled = core.compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for batch in (1, 3):
        assert_agrees(compiled(x[:batch].numpy())[0], expected[:batch])


@pytest.mark.skipif(
    not importlib.util.find_spec("ncnn") or not importlib.util.find_spec("pnnx"), reason="needs ncnn, pnnx"
)
def test_ncnn(saved):
    path, x, expected = saved
    folder = YOLO(path).export(format="ncnn", imgsz=SIZE)
    backend = AutoBackend(folder, device=torch.device("cpu"))
    got = backend(x[:1])
    assert_agrees(got[0] if isinstance(got, list | tuple) else got, expected[:1])
