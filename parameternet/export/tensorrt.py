"""Export to TensorRT, for NVIDIA GPUs: NAME.engine in float32, written by timmx on the GPU that will run it.

TensorRT rounds the operands of float32 products (TF32), so an engine cannot match the network as closely as our check
requires. timmx runs it and compares it roughly.
"""

from pathlib import Path

from torch import nn

from parameternet.export import mobile
from parameternet.export.mobile import read
from parameternet.export.plan import Plan

__all__ = ["SUFFIX", "UNCHECKED", "read", "write"]

SUFFIX = ".engine"
UNCHECKED = "TensorRT rounds float32 operands, and timmx has compared the engine only roughly"


def write(model: nn.Module, path: Path, plan: Plan) -> None:
    """Write `model` for TensorRT, modifying `model` in place; requires a GPU."""
    mobile.need("timmx", "tensorrt", "onnxscript")
    mobile.convert("tensorrt", model, path, plan, device="cuda")
    mobile.describe(path, plan)
