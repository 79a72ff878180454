"""Export to ONNX, for onnxruntime and other runtimes that read it, and as an intermediate step to OpenVINO.

Nodes are named after the layers they come from, and the output of each router has the router's name: to read the
routing weights of a layer, add that tensor to the graph's outputs.

In the looped form, a Scan (ONNX's loop over the slices of a tensor) makes the batch free: its body is the graph of one
image. onnxruntime optimises the body like any other graph, provided that the weights are inside it; the loop itself has
no measurable cost.
"""

import ast
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from parameternet.export import forms
from parameternet.export.checking import ExportError, Run, as_list
from parameternet.export.metadata import pack, unpack
from parameternet.export.plan import Plan, quiet, simple_padding
from parameternet.layers import Router

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, ValueInfoProto
    from onnx_ir import Graph, Node

__all__ = ["DEFAULT_OPSET", "SUFFIX", "observer", "proto", "quantise", "read", "routers_of", "runner", "write"]

SUFFIX = ".onnx"
INPUT, OUTPUT, BATCH = "input", "output", "batch"
CLIPPING = ("Clip", "Relu")
# The exporter's lowest opset. onnxruntime's CUDA provider lacks kernels for some operators of later opsets.
DEFAULT_OPSET = 18


def write(model: nn.Module, path: Path, plan: Plan) -> None:
    """Write `model` as ONNX, modifying `model` in place."""
    import onnx

    made = proto(model, plan, mix_by_conv=True)
    onnx.helper.set_model_props(made, pack(plan.facts))
    onnx.checker.check_model(made, full_check=True)
    onnx.save(made, path)


def read(path: Path) -> dict[str, Any]:
    """Return the metadata of an ONNX file."""
    import onnx

    found = onnx.load(path, load_external_data=False)
    return unpack({entry.key: entry.value for entry in found.metadata_props})


def runner(path: Path, threads: int = 0) -> Run:
    """Return a function that runs the file with onnxruntime on the CPU; `threads=0` lets onnxruntime choose."""
    session = _session(path, threads)
    name = session.get_inputs()[0].name
    return lambda x: session.run(None, {name: x})


def _session(model: Path | bytes, threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


# ---------------------------------------------------------------------------------------------------------------------
# Quantisation
# ---------------------------------------------------------------------------------------------------------------------


def observer(path: Path) -> Callable[[np.ndarray], tuple[list[np.ndarray], dict[str, np.ndarray]]]:
    """Return a function that runs the file and returns its outputs and the routing weights by router."""
    import onnx

    made = onnx.load(path)
    number, routers = len(made.graph.output), routers_of(made.graph)
    made.graph.output.extend(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in routers)
    session = _session(made.SerializeToString(), 1)

    def run(x: np.ndarray) -> tuple[list[np.ndarray], dict[str, np.ndarray]]:
        found = session.run(None, {INPUT: x})
        return found[:number], dict(zip(routers, found[number:], strict=True))

    return run


def quantise(source: Path, target: Path, batches: Iterable[np.ndarray]) -> None:
    """Quantise the float32 file `source` to the int8 file `target` with onnxruntime, calibrated on `batches`."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def get_next(self) -> dict[str, np.ndarray] | None:
            x = next(remaining, None)
            return None if x is None else {INPUT: x}

    remaining = iter(batches)
    with quiet():
        quantize_static(
            source,
            target,
            Reader(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["Conv", "Gemm", "MatMul", *CLIPPING],
            nodes_to_quantize=_quantisable(onnx.load(source).graph) or ["none"],  # an empty list means all
            per_channel=True,
            # 7-bit weights: CPUs without VNNI add two products in 16 bits, which overflows with 8-bit weights.
            reduce_range=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            extra_options={"DedicatedQDQPair": True},  # nodes that stay in float32 read unrounded tensors
        )
    made = onnx.load(target)
    _store_experts(made.graph, _channels(onnx.shape_inference.infer_shapes(onnx.load(source)).graph))
    onnx.checker.check_model(made, full_check=True)
    onnx.save(made, target)


def _quantisable(graph: "GraphProto") -> list[str]:
    """Return the names of products with constants, and of the activations that clip their outputs.

    Routers, mixing, depthwise convolutions and the convolution of the input image are left out. The last has few
    weights, and rounding it changes many predictions of `dynamic_efficientnet_lite0`.
    """
    constants = {tensor.name for tensor in graph.initializer}
    routers = routers_of(graph)
    inside = tuple(f"{name}/" for name in routers)
    products = [
        node
        for node in graph.node
        if node.op_type in ("Conv", "Gemm", "MatMul")
        and node.input[1] in constants
        and node.input[0] not in (*routers, INPUT)
        and not node.name.startswith(inside)
        and all(attribute.i == 1 for attribute in node.attribute if attribute.name == "group")
    ]
    outputs = {node.output[0] for node in products}
    # Otherwise the range of an output is measured before clipping, where it can be a hundred times as wide.
    clipped = [node for node in graph.node if node.op_type in CLIPPING and node.input[0] in outputs]
    return [node.name for node in (*products, *clipped)]


def _store_experts(graph: "GraphProto", channels: dict[str, int]) -> None:
    """Store the experts of mixed kernels as int8, with a scale per expert and output channel.

    `channels` has the output channels of each tensor of mixed kernels, see `_channels`.

    Quantisers support a scale per column of a matrix, which here is a single weight of the kernel.
    """
    from onnx import helper, numpy_helper

    routers = routers_of(graph)
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    mixing = [node for node in graph.node if node.input[0] in routers and node.output[0] in channels]
    stored = []
    # A layer that is called twice mixes the same experts twice.
    for node in {node.input[1]: node for node in mixing}.values():
        experts = numpy_helper.to_array(tensors[node.input[1]])
        rows = experts.reshape(len(experts) * channels[node.output[0]], -1)
        scale = np.maximum(np.abs(rows).max(1), np.finfo(np.float32).tiny * 127) / 127
        name = node.input[1]
        graph.initializer.remove(tensors[name])
        graph.initializer.extend(
            [
                numpy_helper.from_array(np.rint(rows / scale[:, None]).astype(np.int8), f"{name}_int8"),
                numpy_helper.from_array(scale.astype(np.float32), f"{name}_scale"),
                numpy_helper.from_array(np.array(experts.shape), f"{name}_shape"),
            ]
        )
        layer = node.name.rpartition("/")[0]
        stored += [
            helper.make_node(
                "DequantizeLinear", [f"{name}_int8", f"{name}_scale"], [f"{name}_rows"], f"{layer}/Experts", axis=0
            ),
            helper.make_node("Reshape", [f"{name}_rows", f"{name}_shape"], [name], f"{layer}/ExpertsByRow"),
        ]
    nodes = [*stored, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)


def _channels(graph: "GraphProto") -> dict[str, int]:
    """Return the number of output channels of each tensor of mixed kernels, from the product that applies them."""
    dims = {value.name: value.type.tensor_type.shape.dim for value in [*graph.value_info, *graph.output]}
    reshaped = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "Reshape"}
    return {
        reshaped[node.input[0]]: dims[node.output[0]][1].dim_value
        for node in graph.node
        if node.op_type == "MatMul" and node.input[0] in reshaped and node.output[0] in dims
    }


# ---------------------------------------------------------------------------------------------------------------------
# Graphs
# ---------------------------------------------------------------------------------------------------------------------


def proto(model: nn.Module, plan: Plan, mix_by_conv: bool) -> "ModelProto":
    """Return the ONNX graph of `model`, modifying `model` in place; for `mix_by_conv` see `forms.write_computed`."""
    if plan.form == "constant" or not forms.has_dynamic_convolutions(model):
        return _graph(forms.write_constant(model, plan.int8), plan, plan.batch)
    if plan.batch == 1 and not plan.int8:
        return _graph(forms.write_computed(model, plan.size, mix_by_conv), plan, 1)
    if plan.form == "computed":
        return _graph(forms.write_batched(model, plan.int8), plan, plan.batch)
    # Names inside a loop must differ from those outside it.
    return _loop(_graph(forms.write_computed(model, plan.size, mix_by_conv), plan, 1, "one_"), plan)


def routers_of(graph: "GraphProto") -> list[str]:
    """Return the names of the routers in an exported graph, which are also the names of their routing weights."""
    return [name for node in graph.node for name in node.output if node.name.startswith(f"{name}/")]


@torch.no_grad()
def _graph(model: nn.Module, plan: Plan, batch: int | None, prefix: str = "") -> "ModelProto":
    # The exporter would treat a free dimension of size 1 as fixed.
    x = torch.zeros(batch or 2, *plan.size)
    outputs = len(as_list(model(x)))
    names = [OUTPUT] if outputs == 1 else [f"{OUTPUT}_{index}" for index in range(outputs)]
    dims = plan.dynamic_dims(batch)
    opset = plan.opset or DEFAULT_OPSET
    with quiet(), simple_padding():
        program = torch.onnx.export(
            model,
            (x,),
            dynamo=True,
            verbose=False,
            input_names=[prefix + INPUT],
            output_names=[prefix + name for name in names],
            dynamic_shapes=(dims,) if dims else None,
            opset_version=opset,
        )
    _check_opset(program.model.opset_imports[""], opset)
    _name_by_layer(program.model.graph, model)
    made = program.model_proto
    for node in made.graph.node:
        del node.metadata_props[:]  # stack traces, which contain local paths
    return made


def _check_opset(made: int, asked: int) -> None:
    # The exporter writes its own opset and converts it; if it cannot, it only warns.
    if made != asked:
        raise ExportError(f"torch.onnx cannot write this network with opset {asked}, only with {made}: omit opset")


def _name_by_layer(graph: "Graph", model: nn.Module) -> None:
    routers = {name for name, module in model.named_modules(remove_duplicate=False) if isinstance(module, Router)}
    calls: Counter[str] = Counter()
    for index, node in enumerate(graph):
        layer = _layer(node)
        name = layer
        # Not the average pooling, which routers with the same input share.
        if layer in routers and node.op_type in ("Sigmoid", "Softmax") and _leaves(node, layer):
            calls[layer] += 1
            name = layer if calls[layer] == 1 else f"{layer}_{calls[layer]}"  # a router that is called several times
            node.outputs[0].name = name
        node.name = f"{name}/{node.op_type}_{index}".removeprefix("/")


def _leaves(node: "Node", layer: str) -> bool:
    return any(_layer(user) != layer for user, _ in node.outputs[0].uses())


def _layer(node: "Node") -> str:
    """Return the name of the module that a node comes from; '' if the exporter does not record it."""
    scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
    return scopes[-2] if len(scopes) > 1 else ""


def _loop(one_image: "ModelProto", plan: Plan) -> "ModelProto":
    """Wrap the graph of one image in a loop over the batch, which is the plan's or free."""
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
    """Return a tensor's declaration under another name, with its first dimension removed or replaced by `batch`."""
    from onnx import helper

    tensor = value.type.tensor_type
    dims = [dim.dim_param or dim.dim_value for dim in tensor.shape.dim][1:]
    return helper.make_tensor_value_info(name, tensor.elem_type, dims if without_first else [batch, *dims])
