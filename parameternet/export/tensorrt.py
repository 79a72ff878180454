"""TensorRT, for NVIDIA's GPUs: the engine NAME.engine, in 32-bit floats. Written by timmx, on the GPU that will run it.

TensorRT rounds the factors of 32-bit products (TF32), so an engine cannot agree with the network as closely as our
check requires. timmx runs it, and compares it roughly.
"""

from pathlib import Path

from torch import nn

from parameternet.export import mobile
from parameternet.export.mobile import read
from parameternet.export.plan import Plan

__all__ = ["SUFFIX", "UNCHECKED", "read", "write"]

SUFFIX = ".engine"
UNCHECKED = "TensorRT rounds 32-bit floats, and timmx has only compared the engine roughly"


def write(model: nn.Module, path: Path, plan: Plan) -> None:
    """Write `model`, which is changed, for TensorRT; needs a GPU."""
    mobile.need("timmx", "tensorrt", "onnxscript")
    mobile.convert("tensorrt", model, path, plan, device="cuda")
    mobile.describe(path, plan)
