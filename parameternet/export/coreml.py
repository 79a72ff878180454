"""Export to Core ML, for Apple platforms: the folder NAME.mlpackage, an ML program in float32, written by timmx.

Core ML runs on Apple platforms only, so we do not run the file. On macOS, timmx runs it and compares it roughly.
"""

from pathlib import Path

from torch import nn

from parameternet.export import mobile
from parameternet.export.mobile import read
from parameternet.export.plan import Plan

__all__ = ["IS_FOLDER", "SUFFIX", "UNCHECKED", "read", "write"]

SUFFIX = ".mlpackage"
IS_FOLDER = True
UNCHECKED = "Core ML runs on Apple platforms only; on macOS, timmx compares it roughly"


def write(model: nn.Module, path: Path, plan: Plan) -> None:
    """Write `model` for Core ML, modifying `model` in place."""
    mobile.need("timmx", "coremltools")
    mobile.convert("coreml", model, path, plan, compute_precision="float32")
    mobile.describe(path, plan)
