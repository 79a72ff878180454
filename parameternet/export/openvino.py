"""OpenVINO's own format, NAME.xml and NAME.bin, converted from ONNX."""

import tempfile
from pathlib import Path
from typing import Any

from torch import nn

from parameternet.export import onnx as through
from parameternet.export.checking import Run
from parameternet.export.metadata import pack, unpack
from parameternet.export.plan import Plan, quiet

__all__ = ["SUFFIX", "read", "runner", "write"]

SUFFIX = ".xml"
SECTION = "parameternet"


def write(model: nn.Module, path: Path, plan: Plan) -> None:
    """Write `model`, which is changed, as NAME.xml and NAME.bin."""
    import onnx
    import openvino

    made = through.proto(model, plan, mix_by_conv=False)
    with tempfile.TemporaryDirectory() as folder, quiet():
        between = Path(folder) / "model.onnx"
        onnx.save(made, between)
        converted = openvino.convert_model(between)
        for key, text in pack(plan.facts).items():
            converted.set_rt_info(text, [SECTION, key])
        # By default the weights would be rounded to 16 bits.
        openvino.save_model(converted, path, compress_to_fp16=False)


def read(path: Path) -> dict[str, Any]:
    """The facts in an OpenVINO file."""
    import openvino

    return unpack(openvino.Core().read_model(path).get_rt_info([SECTION]).value)


def runner(path: Path) -> Run:
    """The file as a function of arrays, run by OpenVINO on the CPU in 32-bit floats."""
    import openvino

    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda x: list(compiled(x).values())
