"""Ultralytics' own exports of our networks: right for every batch that a file allows, routing far from uniform."""

import copy
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from lively import lively
from PIL import Image
from ultralytics import YOLO, __version__

from parameternet.layers import Router

# Every kind of row by itself. What `ROWS` and `TWINS` hold and no YAML by name has is in "rows".
NAMES = [
    "yolov8n-dynamicconv",
    "yolov8n-dynamicconvbnact",
    "yolov8n-c2f-dynamicconv",
    "yolov8n-c2f-ghost-dynamicconv",
    "yolo11n-c2f-dynamicconv",
    "yolo11n-c2f-ghost-dynamicconv",
    "rows",
    "yolov8n-parameternet_50m",
    "yolov8n-dynamic_efficientnet_lite0",
    "yolov8n-resnet10t",
]
# Slow converters see each kind of row once.
KINDS = ["yolov8n-dynamicconv", "rows", "yolov8n-parameternet_50m"]
ROWS = {
    "nc": 3,
    "scales": {"n": [0.33, 1.0, 1024]},
    "backbone": [
        [-1, 1, "Conv", [16, 3, 2]],
        [-1, 1, "GhostModule", [32, 3, 2]],
        [-1, 1, "GhostBottleneck_DynamicConv", [64, 5, 2]],
        [-1, 1, "C3k_DynamicConv", [64]],
        [-1, 1, "DynamicConv", [64, 3, 2, {"num_experts": 3, "routing": "softmax"}]],
        [-1, 2, "C3k2_DynamicConv", [64, True]],
        [-1, 6, "DynamicConvBnAct", [64, 3, 1]],
        [-1, 1, "DynamicConv", [64, 3, 2, {"bias": True}]],
        [-1, 2, "C2f_GhostModule_DynamicConv", [64]],
    ],
    "head": [
        [-1, 1, "nn.Upsample", [None, 2, "nearest"]],
        [[-1, 4], 1, "Concat", [1]],
        [-1, 2, "C3k2_GhostModule_DynamicConv", [64, False]],
        [[-1, 5], 1, "Concat", [1]],
        [-1, 1, "C2f_DynamicConv", [64, True]],
        [[3, 13, 8], 1, "Detect", ["nc"]],
    ],
}
SIZE = 64


def wide_awake(model):
    """`lively`, with signals that neither fade nor explode on their way to a head that says something else everywhere.

    Without it every score is near 0 and no output depends on the routing.
    """
    lively(model)
    generator = torch.Generator().manual_seed(1)
    norms = {m: m.momentum for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)}
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        for router in (module for module in model.modules() if isinstance(module, Router)):
            router.weight.div_(router.in_features**0.25)
        for branch in ("cv2", "cv3", "one2one_cv2", "one2one_cv3"):
            for level in getattr(model.model[-1], branch, None) or ():
                weight = level[-1].weight
                weight.copy_(2 * torch.randn(weight.shape, generator=generator) / weight[0].numel() ** 0.5)
                level[-1].bias.zero_()
        brightness = torch.linspace(0.1, 1, 8)[:, None, None, None]
        model.train()(brightness * torch.rand(8, 3, SIZE, SIZE, generator=generator))
    for norm, momentum in norms.items():
        norm.running_var.clamp_(min=0.1)  # of channels that are silent, which would amplify rounding errors
        norm.momentum = momentum
    return model.eval()


def answer(model, x):
    with torch.no_grad():
        y = model.float().eval()(x)
    return y[0] if isinstance(y, list | tuple) else y


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A checkpoint by name, and what its network says about three images; each is made once."""
    folder, known = tmp_path_factory.mktemp("export"), {}
    (folder / "rows.yaml").write_text(yaml.safe_dump(ROWS))

    def make(name):
        if name not in known:
            torch.manual_seed(0)
            model = YOLO(folder / "rows.yaml" if name == "rows" else f"{name}.yaml")
            wide_awake(model.model.eval())
            model.save(folder / f"{name}.pt")
            x = torch.rand(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
            x = x * torch.tensor([0.1, 0.5, 1.0])[:, None, None, None]  # images that are routed differently
            known[name] = folder / f"{name}.pt", x, answer(YOLO(folder / f"{name}.pt").model, x)
        return known[name]

    return make


@pytest.fixture(params=NAMES)
def saved(request, made):
    return made(request.param)


@pytest.fixture(params=KINDS)
def saved_kind(request, made):
    return made(request.param)


def gaps(got, expected):
    """The largest differences of boxes, as a fraction of the image's side, and of scores."""
    got = torch.as_tensor(np.asarray(got)).float()
    assert got.shape == expected.shape
    boxes, scores = (got - expected).abs().split((4, got.shape[1] - 4), 1)
    return float(boxes.max()) / SIZE, float(scores.max())


def assert_agrees(got, expected, boxes=1e-3, scores=1e-3):
    found = gaps(got, expected)
    assert found[0] <= boxes and found[1] <= scores, found


def test_outputs_depend_on_the_routing(saved):
    path, x, expected = saved
    assert float(expected[:, 4:].std()) > 0.05
    model = YOLO(path).model
    routers = [module for module in model.modules() if isinstance(module, Router)]
    for router in routers:
        router.weight.data.zero_()
    if routers:
        assert max(gaps(answer(model, x), expected)) > 0.015  # far more than a file may be off


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
    assert_agrees(run_onnx(file, other), answer(YOLO(path).model, other))


@pytest.mark.skipif(__version__ < "8.4", reason="this Ultralytics writes half precision on a GPU alone")
def test_onnx_in_half_precision(saved_kind):
    pytest.importorskip("onnxruntime")
    path, x, expected = saved_kind
    whole = Path(YOLO(path).export(format="onnx", imgsz=SIZE, dynamic=True)).stat().st_size
    file = YOLO(path).export(format="onnx", imgsz=SIZE, half=True, dynamic=True)
    assert Path(file).stat().st_size < 0.6 * whole
    for batch in (1, 3):  # with such weights, boxes of a stock YOLOv8n are 0.004 off, on timm's resnet10t 0.02
        assert_agrees(run_onnx(file, x[:batch]), expected[:batch], boxes=1e-2, scores=5e-3)


@pytest.fixture(scope="module")
def calibration(made, tmp_path_factory):
    """The images that `made` compares, as a data set: ranges of activations are then known for them."""
    root = tmp_path_factory.mktemp("calibration")
    (root / "images").mkdir()
    (root / "labels").mkdir()
    for index, image in enumerate(made("yolov8n")[1]):
        pixels = (255 * image).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(root / "images" / f"{index}.png")
        (root / "labels" / f"{index}.txt").write_text("0 0.5 0.5 0.4 0.4\n")
    config = {"path": str(root), "train": "images", "val": "images", "names": {0: "square"}}
    (root / "data.yaml").write_text(yaml.safe_dump(config))
    return root / "data.yaml"


@pytest.mark.parametrize("name", ["yolov8n", "yolov8n-dynamicconv", "yolov8n-dynamicconvbnact"])
def test_int8_onnx(name, made, calibration):
    """Compare medians over boxes: a box whose distribution over distances is nearly a tie may move far by rounding."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("ultralytics.utils.export.onnx", reason="this Ultralytics writes no ONNX in eight bits")
    path, x, expected = made(name)
    whole = Path(YOLO(path).export(format="onnx", imgsz=SIZE)).stat().st_size
    for options in ({}, {"dynamic": True}):
        file = YOLO(path).export(format="onnx", imgsz=SIZE, int8=True, data=str(calibration), **options)
        assert Path(file).stat().st_size < 0.4 * whole
        got = torch.cat([torch.as_tensor(run_onnx(file, image)) for image in x.split(1)])
        boxes, scores = (got - expected).abs().split((4, got.shape[1] - 4), 1)
        assert boxes.median() < 0.01 * SIZE and scores.median() < 0.005, (boxes.median(), scores.median())


def test_openvino_with_a_fixed_and_with_a_free_batch(saved_kind):
    openvino = pytest.importorskip("openvino")
    path, x, expected = saved_kind
    for batches, options in (((1,), {}), ((1, 3), {"dynamic": True})):
        folder = YOLO(path).export(format="openvino", imgsz=SIZE, **options)
        file = next(Path(folder).glob("*.xml"))
        compiled = openvino.Core().compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        for batch in batches:
            assert_agrees(compiled(x[:batch].numpy())[0], expected[:batch])


@pytest.mark.skipif(
    not importlib.util.find_spec("ncnn") or not importlib.util.find_spec("pnnx"), reason="needs ncnn, pnnx"
)
def test_ncnn(saved_kind):
    from ultralytics.nn.autobackend import AutoBackend

    path, x, expected = saved_kind
    backend = AutoBackend(YOLO(path).export(format="ncnn", imgsz=SIZE), device=torch.device("cpu"))
    got = backend(x[:1])
    assert_agrees(got[0] if isinstance(got, list | tuple) else got, expected[:1])


def wiring(model):
    """What Ultralytics writes on every row, and of what class each module is."""
    rows = [(row.i, row.f, row.type, row.np) for row in model.model]
    return rows, [(name, type(module), module.training) for name, module in model.named_modules()]


@pytest.mark.parametrize("loaded", [True, False], ids=["from-file", "from-yaml"])
@pytest.mark.parametrize("name", ["yolov8n-dynamicconv", "yolov8n-dynamicconvbnact", "yolov8n-parameternet_50m"])
def test_exports_leave_the_network_as_it_is(made, tmp_path, monkeypatch, name, loaded):
    monkeypatch.chdir(tmp_path)
    path, x, _ = made(name)
    model = YOLO(path if loaded else f"{name}.yaml")
    model.model.float().eval()
    before, wired, expected = copy.deepcopy(model.model.state_dict()), wiring(model.model), answer(model.model, x)
    files = [
        model.export(format=format, imgsz=SIZE, **options)
        for format, options in (("torchscript", {}), ("torchscript", {"dynamic": True}), ("torchscript", {}))
    ]
    assert torch.equal(torch.jit.load(files[-1])(x[:1]), torch.jit.load(files[0])(x[:1]))
    after = model.model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    assert wiring(model.model) == wired
    assert torch.equal(answer(model.model, x), expected)
    assert_agrees(torch.jit.load(files[-1])(x[:1]), expected[:1])
