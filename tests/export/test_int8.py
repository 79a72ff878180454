"""8-bit files: they stay close to the floats, leave routers alone, and say what they cost."""

import importlib
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from small import needs, network
from torch import nn

from parameternet.data.errors import DataError
from parameternet.export import export, read_metadata
from parameternet.export.int8 import Images, quantise
from parameternet.layers import DynamicConv


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """204 small images of three classes that the network knows."""
    folder, draw = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for index in range(204):
        path = folder / f"n{index % 3}" / f"{index}.png"
        path.parent.mkdir(exist_ok=True)
        colours = draw.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(colours).resize((56, 40), Image.Resampling.BILINEAR).save(path)
    return folder


@pytest.fixture(scope="module")
def made(photos, tmp_path_factory):
    folder, known = tmp_path_factory.mktemp("int8"), {}

    def get(format, form):
        needs(format)
        if format == "openvino":
            pytest.importorskip("nncf")
        if (format, form) not in known:
            suffix = importlib.import_module(f"parameternet.export.{format}").SUFFIX
            model = network()
            known[format, form] = export(model, folder / f"{form}{suffix}", format, form=form, int8=photos)
        return known[format, form]

    return get


@pytest.mark.parametrize("form", ["computed", "constant"])
@pytest.mark.parametrize("format", ["onnx", "openvino"])
def test_eight_bits_are_close_to_floats_and_say_so(made, format, form):
    done = made(format, form)
    report = done.int8
    assert json.loads(done.path.with_name(f"{done.path.name}.int8.json").read_text()) == report
    assert report["calibration_images"] == 153 and report["checked_images"] == 51
    assert report["bytes"]["int8"] == done.bytes
    assert report["top1"]["lost"] == report["top1"]["float32"] - report["top1"]["int8"]
    assert report["agreement"] >= 90
    assert len(report["routing_agreement"]) == len([m for m in network().modules() if isinstance(m, DynamicConv)])
    assert min(report["routing_agreement"].values()) >= 80 and max(report["routing_difference"].values()) < 0.1
    facts = read_metadata(done.path)
    assert facts["form"] == form and facts["precision"] == "int8"


@torch.no_grad()
@pytest.mark.parametrize("format", ["onnx", "openvino"])
def test_an_eight_bit_file_computes_nearly_the_network(made, format):
    writer = importlib.import_module(f"parameternet.export.{format}")
    x = torch.randn(3, 3, 40, 56, generator=torch.Generator().manual_seed(0))
    y = network()(x).numpy()
    error = np.abs(writer.runner(made(format, "computed").path)(x.numpy())[0] - y).max() / np.abs(y).max()
    assert 0 < error < 0.1  # not 0: something was rounded


def test_routers_mixing_and_depthwise_convolutions_stay_in_floats(made):
    import onnx

    graph = onnx.load(made("onnx", "computed").path).graph
    rounded = {name for node in graph.node if node.op_type == "DequantizeLinear" for name in node.output}
    for node in graph.node:
        if node.op_type == "Conv" and any(a.name == "group" and a.i > 1 for a in node.attribute):
            assert not rounded & set(node.input), node.name
        if ".routing/" in node.name:
            assert not rounded & set(node.input), node.name
    kinds = {tensor.name: tensor.data_type for tensor in graph.initializer}
    experts = [name for name in kinds if name.endswith("weight_int8")]
    assert experts and all(kinds[name] == onnx.TensorProto.INT8 for name in experts)
    assert "QuantizeLinear" in {node.op_type for node in graph.node}


def test_weights_of_products_fit_processors_that_add_in_16_bits(made):
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(made("onnx", "constant").path).graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    scaled = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    weights = [
        numpy_helper.to_array(tensors[scaled[node.input[1]]])
        for node in graph.node
        if node.op_type in ("Conv", "Gemm", "MatMul") and scaled.get(node.input[1]) in tensors
    ]
    # An input is at most 255, and 2 * 255 * 64 < 2**15.
    assert weights and all(np.abs(values.astype(int)).max() <= 64 for values in weights)


def test_openvino_stores_experts_with_a_scale_for_each_output(made):
    import openvino

    from parameternet.layers import DynamicConv

    stored = []
    for op in openvino.Core().read_model(made("openvino", "computed").path).get_ops():
        if op.get_type_name() == "Convert" and op.input_value(0).get_element_type() == openvino.Type.i8:
            (scaled,) = (user.get_node() for user in op.output(0).get_target_inputs())
            (reader,) = (user.get_node() for user in scaled.output(0).get_target_inputs())
            if reader.get_type_name() == "Reshape":  # to the matrix that the routing weights are multiplied by
                stored.append((op.input_value(0).get_shape()[0], scaled.input_value(1).get_node().data.size))
    rows = {len(conv.weight) for conv in network().modules() if isinstance(conv, DynamicConv)}
    assert stored and {number for number, _ in stored} <= rows
    assert all(number == scales for number, scales in stored)


@pytest.mark.parametrize("form", ["computed", "constant"])
def test_openvino_rounds_inputs_of_products_only(made, form):
    path = made("openvino", form).path
    import openvino

    rounded = [op for op in openvino.Core().read_model(path).get_ops() if op.get_type_name() == "FakeQuantize"]
    # OpenVINO multiplies by a matrix of two dimensions in a convolution's place, behind a reshape.
    readers = [user.get_node() for op in rounded for user in op.output(0).get_target_inputs()]
    readers = [
        next(iter(node.output(0).get_target_inputs())).get_node() if node.get_type_name() == "Reshape" else node
        for node in readers
    ]
    assert {node.get_type_name() for node in readers} <= {"Convolution", "MatMul"}
    assert readers or form == "computed"  # in which this network has no other products than those by mixed kernels
    assert not any(".routing/" in node.get_friendly_name() for node in readers)
    assert not any(op.input_value(0).get_node().get_type_name() == "Parameter" for op in rounded)


def test_images_to_calibrate_and_to_check_have_none_in_common(photos):
    found = Images.find(photos, network(), 150)
    calibration, checks = ({name for name, _ in part} for part in (found.calibration, found.checks))
    assert len(calibration) == 150 and len(checks) == 54 and not calibration & checks
    assert all(name.split("/")[0] == f"n{label}" for name, label in found.calibration)
    x, labels = next(found.batches(found.checks, 4))
    assert x.shape == (4, 3, 40, 56) and len(labels) == 4


@pytest.fixture
def damaged(photos, tmp_path):
    """The same images, with every tenth of them damaged."""
    folder = tmp_path / "damaged"
    shutil.copytree(photos, folder)
    for path in list(folder.rglob("*.png"))[::10]:
        path.write_bytes(b"no image")
    return folder


class Runtime:
    """A format whose files are texts, and which keeps what it was given."""

    def __init__(self, outputs=7):
        self.calibrated, self.checked, self.timed = [], [], []
        self.outputs = outputs if isinstance(outputs, tuple) else (outputs,)

    def quantise(self, source, target, batches):
        self.calibrated = list(batches)
        target.write_text("8 bits")

    def observer(self, path):
        def run(x):
            self.checked.append(x)
            return [np.ones((len(x), *self.outputs), np.float32)], {}

        return run

    def runner(self, path, threads):
        return self.timed.append


def measure(folder, tmp_path, batch, runtime):
    source = tmp_path / "net.onnx"
    source.write_text("in floats")
    return quantise(runtime, source, tmp_path / "8.onnx", Images.find(folder, network(), 150), batch)


@pytest.mark.parametrize("batch", [None, 1, 4, 7, 40])
def test_the_report_counts_the_images_that_were_used(damaged, tmp_path, batch):
    runtime, images = Runtime(), Images.find(damaged, network(), 150)
    report = measure(damaged, tmp_path, batch, runtime)
    readable = [sum(images._read(name) is not None for name, _ in part) for part in (images.calibration, images.checks)]
    assert readable[0] < 150 and readable[1] < 54
    expected = [number - number % (batch or 1) for number in readable]
    assert [report["calibration_images"], report["checked_images"]] == expected
    assert sum(map(len, runtime.calibrated)) == expected[0]
    assert sum(map(len, runtime.checked)) == 2 * expected[1], "by both files"
    sizes = {len(x) for x in (*runtime.calibrated, *runtime.timed, *(runtime.checked if batch else ()))}
    assert sizes == {batch or 1}, "images that cannot be read leave no gap in a batch"


@pytest.mark.parametrize("batch, what", [(200, "calibrate"), (55, "check")])
def test_a_batch_larger_than_the_images_is_refused(photos, tmp_path, batch, what):
    with pytest.raises(DataError, match=f"batch {batch} requires at least {batch} images to {what} with"):
        measure(photos, tmp_path, batch, Runtime())
    assert not (tmp_path / "8.onnx").exists()


def test_maps_of_features_are_compared_without_classes(photos, tmp_path):
    report = measure(photos, tmp_path, None, Runtime(outputs=(7, 2, 3)))
    assert report["difference"] == 0 and report["agreement"] is None and report["top1"] is None


def test_a_report_of_eight_bits_does_not_outlive_its_file(tmp_path):
    report, other = tmp_path / "a.torchscript.int8.json", tmp_path / "b.torchscript.int8.json"
    report.write_text("{}"), other.write_text("{}")
    export(network(), tmp_path / "a.torchscript", "torchscript")
    assert not report.exists() and other.exists()


def test_a_layer_that_is_called_twice_is_stored_once(photos, tmp_path):
    needs("onnx")
    import onnx

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.pool = DynamicConv(3, 3), nn.AdaptiveAvgPool2d(1)

        def forward(self, x):
            return self.pool(self.conv(self.conv(x).relu())).flatten(1)

    model = Twice().eval()
    model.pretrained_cfg, model.num_classes = network().pretrained_cfg, 3
    path = export(model, tmp_path / "twice.onnx", int8=photos).path
    names = [tensor.name for tensor in onnx.load(path).graph.initializer]
    assert names.count("conv.weight_int8") == 1 and "conv.weight" not in names


@pytest.mark.parametrize(
    "cfg, size, message",
    [
        (None, 8, "the network has no pretrained_cfg"),
        (network().pretrained_cfg, (1, 8, 8), "a mean for each of the network's 1 input channels, .* has 3"),
    ],
)
def test_networks_that_do_not_say_how_images_are_prepared_are_refused(photos, tmp_path, cfg, size, message):
    model = DynamicConv(size[0] if isinstance(size, tuple) else 3, 4).eval()
    model.pretrained_cfg = cfg
    with pytest.raises(ValueError, match=message):
        export(model, tmp_path / "a.onnx", size=size, int8=photos)


def test_what_is_refused(photos, tmp_path):
    few = tmp_path / "few"
    few.mkdir()
    (few / "a.png").write_bytes((photos / "n0" / "0.png").read_bytes())
    with pytest.raises(DataError, match=r"at least 200 images, .*few has 1"):
        export(network(), tmp_path / "a.onnx", int8=few)
    with pytest.raises(ValueError, match="int8 requires format onnx or openvino"):
        export(network(), tmp_path / "a.pt2", "torch_export", int8=photos)
    with pytest.raises(ValueError, match="calibration_images must be at least 1, got 0"):
        export(network(), tmp_path / "a.onnx", int8=photos, calibration_images=0)
    assert not list(tmp_path.glob("a.*"))
