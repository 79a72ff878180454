"""Files hold what the network computes, whatever the batch; and what cannot be kept is refused in words."""

import copy
import importlib
import itertools
import os
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from small import FREE, PAIRS, SIZE, needs, network
from timm.layers import Conv2dSame
from torch import nn

from parameternet.export import FORMS, ExportError, checking, export, metadata, read_metadata
from parameternet.layers import DynamicConv
from parameternet.layers.recording import dynamic_layers, record_routing_weights
from parameternet.prediction import Predictor


def pictures(batch, size=SIZE, seed=1):
    return checking.noise_images(batch, size, seed)


@torch.no_grad()
def difference(model, run, x):
    expected, got = model(x).numpy(), run(x.numpy())[0]
    assert got.shape == expected.shape
    return float(np.abs(got - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("format, form", PAIRS)
def test_a_file_computes_the_network_at_every_batch(exported, model, format, form):
    file = exported(format, form)
    assert list(file.result.differences) == [f"batch {batch}, 40 x 56" for batch in (1, 3, 8)]
    for batch in (1, 2, 3, 8, 17):
        assert difference(model, file.run, pictures(batch)) <= 1e-5, batch
    # A picture's result does not depend on its neighbours.
    x = pictures(3).numpy()
    assert np.abs(file.run(x)[0][1:2] - file.run(x[1:2])[0]).max() <= 1e-5


@pytest.mark.parametrize("format", FREE)
def test_height_and_width_can_be_free(exported, model, format):
    file = exported(format, dynamic_size=True)
    assert len(file.result.differences) == 6
    for size in ((40, 56), (33, 47), (64, 96)):
        assert difference(model, file.run, pictures(2, (3, *size))) <= 1e-5, size


@pytest.mark.parametrize("format, form, batch", [("onnx", *rest) for rest in itertools.product(FORMS, (1, 3))])
def test_a_fixed_batch_is_the_only_one_that_a_file_takes(exported, model, format, form, batch):
    file = exported(format, form, batch=batch)
    assert list(file.result.differences) == [f"batch {batch}, 40 x 56"]
    assert difference(model, file.run, pictures(batch)) <= 1e-5
    with pytest.raises(Exception):  # noqa: B017  each runtime has its own
        file.run(pictures(batch + 1).numpy())


@pytest.mark.parametrize("format", FREE)
def test_a_file_says_how_to_use_it(exported, format):
    facts = read_metadata(exported(format).path)
    assert facts == {
        "input_size": [3, 40, 56],
        "name": "small",  # not small.test: nobody verified the weights
        "mean": [0.1, 0.2, 0.3],
        "std": [0.4, 0.5, 0.6],
        "interpolation": "bilinear",
        "crop_pct": 0.8,
        "crop_mode": "center",
        "class_names": ['a "rose", rouge <é>', *(f"n{i}" for i in range(1, 7))],
        "form": "computed",
        "batch": "free",
        "dynamic_size": False,
        "precision": "float32",
    }


def test_what_a_network_does_not_say_is_not_invented(tmp_path):
    file = export(DynamicConv(3, 4, 3).eval(), tmp_path / "a.torchscript", "torchscript", size=8)
    assert read_metadata(file.path) == {
        "input_size": [3, 8, 8], "form": "computed", "batch": "free", "dynamic_size": False, "precision": "float32",
    }  # fmt: skip


def with_classes(change, **arguments):
    """A ParameterNet with the names of three classes, changed."""
    made = timm.create_model("parameternet_50m", width=0.2, num_classes=3, **arguments).eval()
    made.pretrained_cfg = {**made.pretrained_cfg, "label_names": ["a", "b", "c"]}
    change(made)
    return made


@pytest.mark.parametrize("number", [0, 2, 3, 10])
def test_names_of_an_old_classifier_are_not_exported(number):
    model = with_classes(lambda made: made.reset_classifier(number))
    assert "class_names" not in metadata.describe(model, (3, 64, 64), verified=False)
    model = with_classes(lambda made: setattr(made, "num_classes", number))
    assert ("class_names" in metadata.describe(model, (3, 64, 64), verified=False)) == (number == 3)


@pytest.mark.parametrize("number", [2, 10])
def test_a_predictor_does_not_use_names_of_an_old_classifier(number):
    labels = Predictor(with_classes(lambda made: made.reset_classifier(number)), "cpu").labels
    assert labels == [f"class {index}" for index in range(number)]


def test_feature_networks_have_metadata():
    model = timm.create_model("parameternet_50m", width=0.2, features_only=True)
    assert "class_names" not in metadata.describe(model, (3, 64, 64), verified=False)


@pytest.mark.parametrize("channels", [1, 3, 4, 6])
@pytest.mark.parametrize("name", ["parameternet_50m", "dynamic_efficientnet_lite0", "resnet10t", "tresnet_m"])
def test_a_file_takes_the_channels_that_the_network_takes(name, channels):
    model = timm.create_model(name, in_chans=channels).eval()
    assert metadata.input_channels(model, 64, 64) == channels
    facts = metadata.describe(model, (channels, 64, 64), verified=False)
    assert ("mean" in facts) == ("std" in facts) == (channels == 3), "timm's config has three means"


def convolutions(graph, constants=frozenset()):
    """(are its kernels constant?) for every convolution, also those in loops."""
    constants = constants | {initializer.name for initializer in graph.initializer}
    for node in graph.node:
        if node.op_type == "Conv":
            yield node.input[1] in constants
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from convolutions(attribute.g, constants)


def operators(graph):
    for node in graph.node:
        yield node.op_type
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from operators(attribute.g)


@pytest.mark.parametrize("form, batch", [("computed", None), ("computed", 1), ("computed", 3), ("constant", None)])
def test_a_graph_has_no_loop_and_an_opset_that_cuda_runs(exported, form, batch):
    needs("onnx")
    import onnx

    made = onnx.load(exported("onnx", form, batch=batch).path)
    assert not {"Scan", "Loop", "If"} & set(operators(made.graph))
    assert [(opset.domain, opset.version) for opset in made.opset_import] == [("", 18)]


def test_the_looped_form_has_one_loop(exported):
    needs("onnx")
    import onnx

    found = list(operators(onnx.load(exported("onnx", "looped").path).graph))
    assert found.count("Scan") == 1 and found[0] == "Scan"


def test_the_opset_can_be_chosen(tmp_path):
    needs("onnx")
    import onnx

    path = tmp_path / "a.onnx"
    export(DynamicConv(3, 4, 3).eval(), path, size=8, opset=20)
    assert onnx.load(path).opset_import[0].version == 20


@pytest.mark.parametrize("opset", [7, 17, 99])
@pytest.mark.parametrize("format", ["onnx", "openvino"])
def test_an_opset_that_cannot_be_written_is_refused(format, opset, tmp_path):
    needs(format)
    suffix = importlib.import_module(f"parameternet.export.{format}").SUFFIX
    with pytest.raises(ExportError, match=f"cannot write this network with opset {opset}, only with 18"):
        export(DynamicConv(3, 4, 3).eval(), tmp_path / f"a{suffix}", format, size=8, opset=opset)
    assert not list(tmp_path.iterdir())


@torch.no_grad()
@pytest.mark.parametrize("form", ["computed", "constant"])
def test_routing_weights_have_the_names_of_their_routers(exported, model, form):
    needs("onnx")
    import onnx
    import onnxruntime

    from parameternet.export.onnx import routers_of

    made = onnx.load(exported("onnx", form).path)
    names = routers_of(made.graph)
    assert sorted(names) == sorted(f"{name}.routing" for name in dynamic_layers(model))
    made.graph.output.extend(onnx.helper.make_tensor_value_info(name, 1, None) for name in names)
    x = pictures(3)
    with record_routing_weights(model) as recording:
        model(x)
    session = onnxruntime.InferenceSession(made.SerializeToString())
    for name, weights in zip(names, session.run(names, {"input": x.numpy()}), strict=True):
        assert np.abs(weights - recording.samples(name.removesuffix(".routing")).numpy()).max() < 1e-5, name


def test_constant_form_has_constant_kernels_only(exported):
    needs("onnx")
    import onnx

    assert all(convolutions(onnx.load(exported("onnx", "constant").path).graph))
    assert not all(convolutions(onnx.load(exported("onnx", "computed", batch=1).path).graph))


@pytest.mark.parametrize("batch", [1, None])
def test_one_expert_has_constant_kernels_in_every_form(tmp_path, batch):
    needs("onnx")
    import onnx

    model = nn.Sequential(
        DynamicConv(3, 16, 3, stride=2, num_experts=1),
        DynamicConv(16, 16, 3, groups=16, num_experts=1),
        DynamicConv(16, 4, num_experts=1),
    ).eval()
    for form in ("computed", "constant"):
        graph = onnx.load(export(model, tmp_path / "a.onnx", form=form, batch=batch, size=SIZE).path).graph
        assert list(convolutions(graph)) == [True] * 3


@pytest.mark.parametrize("form", FORMS)
def test_nothing_of_this_machine_is_in_an_onnx_file(exported, form):
    assert b"site-packages" not in exported("onnx", form).path.read_bytes()
    assert __file__.partition("tests")[0].encode() not in exported("onnx", form).path.read_bytes()


def test_several_outputs(tmp_path):
    needs("onnx")

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = DynamicConv(3, 6, 3)

        def forward(self, x):
            y = self.conv(x)
            return y, y.mean((2, 3))

    assert export(Two().eval(), tmp_path / "two.onnx", size=8).differences.keys() == {
        "batch 1, 8 x 8", "batch 3, 8 x 8", "batch 8, 8 x 8",
    }  # fmt: skip


class Returning(nn.Module):
    """A network whose outputs are made from a map of features."""

    def __init__(self, outputs):
        super().__init__()
        self.conv, self.outputs = DynamicConv(3, 6, 3), outputs

    def forward(self, x):
        return self.outputs(self.conv(x))


def nest(y):
    return {"map": y, "vectors": [y.mean((2, 3)), (y.amax((2, 3)),)]}


@pytest.mark.parametrize("format", FREE)
def test_outputs_can_be_nested(format, tmp_path):
    needs(format)
    writer = importlib.import_module(f"parameternet.export.{format}")
    model, path = Returning(nest).eval(), tmp_path / f"nested{writer.SUFFIX}"
    export(model, path, format, size=8)
    x = pictures(2, (3, 8, 8))
    with torch.no_grad():
        y = model.conv(x)
    for expected, got in zip((y, y.mean((2, 3)), y.amax((2, 3))), writer.runner(path)(x.numpy()), strict=True):
        assert np.allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize(
    "outputs, message",
    [
        (lambda y: (y, None), "returns None among its outputs"),
        (lambda y: {"scores": y, "number": 3}, "returns 3 among its outputs"),
        (lambda y: (y, y.mean()), r"a tensor of shape \(\) for 2 images"),
        (lambda y: y.mean(0), r"a tensor of shape \(6, 8, 8\) for 2 images"),
    ],
)
def test_outputs_that_no_file_can_have_are_refused(outputs, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        export(Returning(outputs).eval(), tmp_path / "a.torchscript", "torchscript", size=8)
    assert not list(tmp_path.iterdir())


class Variadic(Returning):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


@pytest.mark.parametrize("format", FREE)
def test_a_network_need_not_name_its_input(format, tmp_path):
    needs(format)
    writer = importlib.import_module(f"parameternet.export.{format}")
    export(Variadic(nn.Identity()).eval(), tmp_path / f"a{writer.SUFFIX}", format, size=8)


@pytest.mark.parametrize("kernel", [{}, {"dilation": 3}, {"stride": 4}], ids=str)
@pytest.mark.parametrize("format", FREE)
def test_sizes_can_be_free_without_padding(format, kernel, tmp_path):
    needs(format)
    writer = importlib.import_module(f"parameternet.export.{format}")
    model = nn.Sequential(DynamicConv(3, 4, 3, padding="valid", **kernel), nn.ReLU()).eval()
    export(model, tmp_path / f"a{writer.SUFFIX}", format, size=24, dynamic_size=True)


@pytest.mark.parametrize("layer", [Conv2dSame, partial(DynamicConv, padding="same")], ids=["timm", "dynamic"])
def test_same_padding_of_free_sizes_has_no_maximum(layer, tmp_path):
    # torch.export takes minutes for a few layers with one.
    path = tmp_path / "a.pt2"
    rows = [nn.Sequential(layer(3, 3, 3, stride=2), nn.ReLU()) for _ in range(2)]
    export(nn.Sequential(*rows).eval(), path, "torch_export", size=32, dynamic_size=True)
    maxima = [node.args for node in torch.export.load(path).graph.nodes if node.target is torch.sym_max]
    assert all(0 not in args for args in maxima)


def test_a_network_without_dynamic_convolutions(tmp_path):
    needs("onnx")
    assert max(export(nn.Conv2d(3, 4, 3).eval(), tmp_path / "static.onnx", size=8).differences.values()) < 1e-5


def test_the_network_stays_as_it_is(tmp_path):
    model = network().train()
    before, modules = copy.deepcopy(model.state_dict()), [type(module) for module in model.modules()]
    export(model, tmp_path / "a.torchscript", "torchscript", form="constant")
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())
    assert [type(module) for module in model.modules()] == modules
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


# What is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong", [lambda y: y * 1.001, lambda y: y * np.nan, lambda y: y[:, :-1], lambda y: y[::-1].copy()]
)
def test_a_file_that_differs_is_not_kept(tmp_path, monkeypatch, wrong):
    from parameternet.export import torchscript

    right = torchscript.runner
    monkeypatch.setattr(torchscript, "runner", lambda path: lambda x: [wrong(y) for y in right(path)(x)])
    path = tmp_path / "net.torchscript"
    path.write_text("older")
    with pytest.raises(ExportError, match=r"differs from the network by|the network returns"):
        export(network(), path, "torchscript")
    assert [p.name for p in tmp_path.iterdir()] == ["net.torchscript"] and path.read_text() == "older"


def test_a_file_that_does_not_run_is_not_kept(tmp_path, monkeypatch):
    from parameternet.export import torchscript

    def refuse(x):
        raise IndexError("broken inside")

    monkeypatch.setattr(torchscript, "runner", lambda path: refuse)
    with pytest.raises(ExportError, match=r"the file does not run for an input of \(1, 3, 40, 56\): broken inside"):
        export(network(), tmp_path / "net.torchscript", "torchscript")
    assert not list(tmp_path.iterdir())


class Killed(BaseException):
    """Stands for a kill: nothing in the package catches it."""


@pytest.mark.parametrize("stage", ["full disk", "killed at the first rename", "killed at the second rename"])
def test_files_of_two_exports_are_never_mixed(tmp_path, monkeypatch, stage):
    """A format of two files: either both are of the same export, or the main one is missing."""
    from parameternet.export import torchscript

    write, replace, renamed = torchscript.write, os.replace, []

    def write_two(model, path, plan):
        write(model, path, plan)
        path.with_suffix(".bin").write_text(plan.facts["export"])
        path.write_bytes(path.read_bytes() + plan.facts["export"].encode())

    def replace_some(source, target):
        renamed.extend([target] if Path(target).parent == tmp_path else [])
        if len(renamed) == (1 if "first" in stage else 2):
            raise Killed
        replace(source, target)

    monkeypatch.setattr(torchscript, "write", write_two)
    monkeypatch.setattr(torchscript, "UNCHECKED", "it is not one file", raising=False)
    package, number = importlib.import_module("parameternet.export"), iter("ABC")
    describe = package.describe
    monkeypatch.setattr(package, "describe", lambda *a, **k: describe(*a, **k) | {"export": next(number)})

    def two_files():
        with pytest.warns(UserWarning, match="not compared"):
            export(network(), tmp_path / "net.torchscript", "torchscript")

    def content():
        return {path.suffix: path.read_bytes()[-1:] for path in tmp_path.iterdir() if path.is_file()}

    two_files()
    assert content() == {".torchscript": b"A", ".bin": b"A"}
    with monkeypatch.context() as patch:
        if stage == "full disk":
            patch.setattr(shutil, "copyfileobj", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
        else:
            patch.setattr(os, "replace", replace_some)
        with pytest.raises((Killed, OSError)):
            export(network(), tmp_path / "net.torchscript", "torchscript")
    if stage == "full disk":
        assert content() == {".torchscript": b"A", ".bin": b"A"}
    else:
        assert ".torchscript" not in content()
    two_files()
    assert content() == {".torchscript": b"C", ".bin": b"C"}


def test_a_report_in_8_bits_does_not_outlive_its_file(tmp_path):
    (tmp_path / "net.torchscript.int8.json").write_text("{}")
    export(network(), tmp_path / "net.torchscript", "torchscript")
    assert [path.name for path in tmp_path.iterdir()] == ["net.torchscript"]


def test_a_strategy_that_freezes_the_batch_is_not_written(tmp_path):
    model = network()
    for module in model.modules():
        if isinstance(module, DynamicConv):
            module.strategy = "grouped"
    assert len(export(model, tmp_path / "net.torchscript", "torchscript").differences) == 3
    assert {module.strategy for module in model.modules() if isinstance(module, DynamicConv)} == {"grouped"}


def test_an_exporter_that_fails_is_told(tmp_path):
    class Picky(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = DynamicConv(3, 4)

        def forward(self, x):
            y = self.conv(x)
            return y if y.sum() > 0 else -y

    with pytest.raises(ExportError, match=r"the exporter failed with .*; try a fixed batch"):
        export(Picky().eval(), tmp_path / "a.pt2", "torch_export", size=8)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"format": "onxx"}, "unknown format 'onxx'; there are onnx, torchscript, torch_export, openvino"),
        ({"form": "wide"}, "unknown form 'wide'; there are computed, constant, looped"),
        ({"form": "looped"}, "form 'looped' requires format onnx or openvino, got 'torchscript'; use form 'computed'"),
        ({"batch": 0}, r"batch must be None \(free\) or at least 1, got 0"),
        ({"size": (1, 2, 3, 4)}, "size must be a number"),
        ({"opset": 18}, "opset requires format onnx or openvino, got opset 18 with format 'torchscript'"),
        ({"path": "a.pt"}, "must end in .torchscript, got a.pt"),
        ({"path": "nowhere/a.torchscript"}, "the folder nowhere does not exist"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        export(network(), **{"path": "a.torchscript", "format": "torchscript", **arguments})


def test_a_network_without_a_size_or_a_name():
    with pytest.raises(ValueError, match="does not specify its input size"):
        export(DynamicConv(3, 4).eval(), "a.torchscript", "torchscript")
    with pytest.raises(ValueError, match="no name to derive the file name from"):
        export(DynamicConv(3, 4).eval(), format="torchscript", size=8)


def test_metadata_of_what_is_no_file_of_ours(tmp_path):
    with pytest.raises(
        ValueError, match=r"the suffix of an exported file; expected one of .onnx, .torchscript, .pt2, .xml, .param"
    ):
        read_metadata(tmp_path / "a.pt")
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_metadata(tmp_path / "a.onnx")
