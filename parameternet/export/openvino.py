"""Export to OpenVINO's own format, NAME.xml and NAME.bin, converted from ONNX."""

import functools
import logging
import re
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from parameternet.export import onnx as through
from parameternet.export.checking import Run
from parameternet.export.metadata import pack, unpack
from parameternet.export.plan import Plan, quiet

__all__ = ["SUFFIX", "observer", "quantise", "read", "runner", "write"]

SUFFIX = ".xml"
SECTION = "parameternet"
QUANTISED = ("Convolution", "MatMul")


@functools.cache
def _core() -> Any:
    """Return OpenVINO's runtime, one for the whole process.

    A Core that compiles a model replaces the thread's signal stack, and restores the previous one when it is destroyed.
    If the lifetimes of two Cores overlap, the restored stack may be freed memory, and the next signal (a data loader's
    worker sends one when it exits) kills the process.
    """
    import openvino

    return openvino.Core()


def write(model: nn.Module, path: Path, plan: Plan) -> None:
    """Write `model` as NAME.xml and NAME.bin, modifying `model` in place."""
    import onnx
    import openvino

    made = through.proto(model, plan, mix_by_conv=False)
    with tempfile.TemporaryDirectory() as folder, quiet():
        between = Path(folder) / "model.onnx"
        onnx.save(made, between)
        converted = openvino.convert_model(between)
        for key, text in pack(plan.facts).items():
            converted.set_rt_info(text, [SECTION, key])
        # By default, weights would be rounded to float16.
        openvino.save_model(converted, path, compress_to_fp16=False)


def read(path: Path) -> dict[str, Any]:
    """Return the metadata of an OpenVINO file."""
    return unpack(_core().read_model(path).get_rt_info([SECTION]).value)


def runner(path: Path, threads: int = 0) -> Run:
    """Return a function that runs the file with OpenVINO on the CPU in float32; `threads=0` lets OpenVINO choose."""
    return _compiled(path, threads)


def _compiled(model: Any, threads: int) -> Run:
    settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32"}
    settings |= {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1} if threads else {}
    compiled = _core().compile_model(model, "CPU", settings)
    return lambda x: list(compiled(x).values())


def observer(path: Path) -> Callable[[np.ndarray], tuple[list[np.ndarray], dict[str, np.ndarray]]]:
    """Return a function that runs the file and returns its outputs and the routing weights by router."""
    model = _core().read_model(path)
    number, routers = len(model.outputs), _routers(model)
    model.add_outputs(routers)
    compiled = _compiled(model, 1)

    def run(x: np.ndarray) -> tuple[list[np.ndarray], dict[str, np.ndarray]]:
        found = [np.array(value) for value in compiled(x)]
        return found[:number], dict(zip(routers, found[number:], strict=True))

    return run


def quantise(source: Path, target: Path, batches: Iterable[np.ndarray]) -> None:
    """Quantise the float32 file `source` to the int8 file `target` with NNCF, calibrated on `batches`."""
    import nncf
    import openvino
    from nncf.quantization.range_estimator import RangeEstimatorParametersSet

    nncf.set_log_level(logging.ERROR)
    model = _core().read_model(source)
    routers = _routers(model)
    for op in _products(model):
        if _mixes(op, set(routers)):
            _store_experts_in_8_bits(op)
    kept = {op.get_friendly_name() for op in _products(model) if _stays_float(op, set(routers))}
    kinds = {op.get_type_name() for op in model.get_ops()} - {*QUANTISED}
    images = [x for x in batches]
    with quiet():
        made = nncf.quantize(
            model,
            nncf.Dataset(images),
            subset_size=len(images),
            ignored_scope=nncf.IgnoredScope(
                names=sorted(kept),
                patterns=[f"{re.escape(name)}/.*" for name in routers],
                types=sorted(kinds),  # by default, sums, averages and normalisations are quantised too
                validate=False,
            ),
            # The default, the mean of the images' ranges, clips half of them, which shifts averages and so routing.
            advanced_parameters=nncf.AdvancedQuantizationParameters(
                activations_range_estimator_params=RangeEstimatorParametersSet.MINMAX,
                overflow_fix=nncf.OverflowFix.ENABLE,  # CPUs without VNNI add two products in 16 bits
            ),
        )
    openvino.save_model(made, target, compress_to_fp16=False)


def _routers(model: Any) -> list[str]:
    return [
        name
        for op in model.get_ordered_ops()
        if op.get_type_name() in ("Sigmoid", "Softmax")
        for output in op.outputs()
        for name in output.get_names()
        if op.get_friendly_name().startswith(f"{name}/")
    ]


def _products(model: Any) -> list[Any]:
    return [op for op in model.get_ops() if op.get_type_name() in (*QUANTISED, "GroupConvolution")]


def _mixes(op: Any, routers: set[str]) -> bool:
    """Return whether `op` is a product that mixes kernels; one that mixes biases is not reshaped."""
    users = [user.get_node().get_type_name() for user in op.output(0).get_target_inputs()]
    return bool(op.input_value(0).get_names() & routers) and users == ["Reshape"]


def _store_experts_in_8_bits(mixing: Any) -> None:
    """Store the experts (E, out * in * kh * kw) of a product as int8, with a scale per expert and output channel.

    NNCF would store a scale per column of this matrix, which is one weight of the kernel: a quarter as many scales as
    weights.
    """
    from openvino import opset13 as ops

    experts = mixing.input_value(1).get_node().data
    experts = experts.T if mixing.get_attributes()["transpose_b"] else experts
    (kernels,) = (user.get_node() for user in mixing.output(0).get_target_inputs())
    shape = kernels.output(0).get_partial_shape()
    # (batch, out, in * taps), (out, in, kh, kw) or (groups, 1, 1, kh, kw).
    outputs = shape[1 if len(shape) == 3 else 0].get_length()
    rows = experts.reshape(len(experts) * outputs, -1)
    scale = np.maximum(np.abs(rows).max(1, keepdims=True), np.finfo(np.float32).tiny) / 127
    stored = ops.constant(np.rint(rows / scale).astype(np.int8))
    values = ops.reshape(ops.multiply(ops.convert(stored, "f32"), ops.constant(scale)), list(experts.shape), False)
    made = ops.matmul(mixing.input_value(0), values, False, False)
    made.set_friendly_name(mixing.get_friendly_name())
    for user in mixing.output(0).get_target_inputs():
        user.replace_source_output(made.output(0))


def _stays_float(op: Any, routers: set[str]) -> bool:
    """Return whether `op` mixes experts, is depthwise, multiplies computed matrices, or convolves the input image."""
    computed = op.input_value(1).get_node().get_type_name() == "Reshape"
    source = op.input_value(0)
    return (
        computed
        or op.get_type_name() == "GroupConvolution"
        or source.get_node().get_type_name() == "Parameter"
        or bool(source.get_names() & routers)
    )
