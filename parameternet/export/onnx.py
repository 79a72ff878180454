"""ONNX, for onnxruntime and whatever else reads it; also the way to OpenVINO.

In the computed form the batch is freed by a Scan, ONNX's loop over the slices of a tensor: its body is the graph of
one image. onnxruntime optimises the body as it does any graph, provided that the weights are inside of it; the loop
itself costs nothing that can be measured.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from parameternet.export import forms
from parameternet.export.checking import Run, as_list
from parameternet.export.metadata import pack, unpack
from parameternet.export.plan import Plan, quiet

if TYPE_CHECKING:
    from onnx import ModelProto, ValueInfoProto

__all__ = ["SUFFIX", "proto", "read", "runner", "write"]

SUFFIX = ".onnx"
INPUT, OUTPUT, BATCH = "input", "output", "batch"


def write(model: nn.Module, path: Path, plan: Plan) -> None:
    """Write `model`, which is changed, as ONNX."""
    import onnx

    made = proto(model, plan, mix_by_conv=True)
    onnx.helper.set_model_props(made, pack(plan.facts))
    onnx.checker.check_model(made, full_check=True)
    onnx.save(made, path)


def read(path: Path) -> dict[str, Any]:
    """The facts in an ONNX file."""
    import onnx

    found = onnx.load(path, load_external_data=False)
    return unpack({entry.key: entry.value for entry in found.metadata_props})


def runner(path: Path) -> Run:
    """The file as a function of arrays, run by onnxruntime on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: session.run(None, {name: x})


def proto(model: nn.Module, plan: Plan, mix_by_conv: bool) -> "ModelProto":
    """The ONNX graph of `model`, which is changed; `mix_by_conv` as of `forms.write_computed`."""
    if plan.form == "constant" or not forms.has_dynamic_convolutions(model):
        return _graph(forms.write_constant(model), plan, plan.batch)
    model = forms.write_computed(model, plan.size, mix_by_conv)
    if plan.batch == 1:
        return _graph(model, plan, 1)
    # Names inside of a loop must differ from those around it.
    return _loop(_graph(model, plan, 1, "one_"), plan)


@torch.no_grad()
def _graph(model: nn.Module, plan: Plan, batch: int | None, prefix: str = "") -> "ModelProto":
    # An exporter takes a free dimension of 1 for a fixed one.
    x = torch.zeros(batch or 2, *plan.size)
    outputs = len(as_list(model(x)))
    names = [OUTPUT] if outputs == 1 else [f"{OUTPUT}_{index}" for index in range(outputs)]
    dims = plan.dynamic_dims(batch)
    with quiet():
        program = torch.onnx.export(
            model,
            (x,),
            dynamo=True,
            verbose=False,
            input_names=[prefix + INPUT],
            output_names=[prefix + name for name in names],
            dynamic_shapes=(dims,) if dims else None,
            opset_version=plan.opset,
        )
    made = program.model_proto
    for node in made.graph.node:
        del node.metadata_props[:]  # stack traces, with the folders of this machine
    return made


def _loop(one_image: "ModelProto", plan: Plan) -> "ModelProto":
    """A graph for any batch, or plan's, around that of one image."""
    from onnx import GraphProto, helper, numpy_helper

    graph, image, axis = one_image.graph, "image", "first_axis"
    body = GraphProto(name="one_image", node=[helper.make_node("Unsqueeze", [image, axis], [graph.input[0].name])])
    body.input.append(_with_dims(graph.input[0], image, without_first=True))
    body.initializer.extend([*graph.initializer, numpy_helper.from_array(np.array([0]), axis)])
    body.node.extend(graph.node)
    body.value_info.extend(graph.value_info)
    for value in graph.output:
        name = f"{value.name}_of_image"
        body.node.append(helper.make_node("Squeeze", [value.name, axis], [name]))
        body.output.append(_with_dims(value, name, without_first=True))

    outer = [(value, value.name.removeprefix("one_")) for value in (graph.input[0], *graph.output)]
    (_, source), *results = outer
    scan = helper.make_node(
        "Scan", [source], [name for _, name in results], name="images", num_scan_inputs=1, body=body
    )
    batched = [_with_dims(value, name, batch=plan.batch or BATCH) for value, name in outer]
    whole = helper.make_graph([scan], graph.name, batched[:1], batched[1:])
    made = helper.make_model(whole, opset_imports=one_image.opset_import, ir_version=one_image.ir_version)
    made.functions.extend(one_image.functions)
    made.producer_name, made.producer_version = one_image.producer_name, one_image.producer_version
    return made


def _with_dims(
    value: "ValueInfoProto", name: str, without_first: bool = False, batch: int | str | None = None
) -> "ValueInfoProto":
    """The declaration of a tensor under another name, without its first dimension or with another one."""
    from onnx import helper

    tensor = value.type.tensor_type
    dims = [dim.dim_param or dim.dim_value for dim in tensor.shape.dim][1:]
    return helper.make_tensor_value_info(name, tensor.elem_type, dims if without_first else [batch, *dims])
