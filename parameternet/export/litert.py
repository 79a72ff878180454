"""Export to LiteRT (TensorFlow Lite), for Android and microcontrollers: NAME.tflite in float32, written by timmx.

Its input and outputs keep PyTorch's order of dimensions, (B, C, H, W).
"""

from pathlib import Path

import numpy as np
from torch import nn

from parameternet.export import mobile
from parameternet.export.checking import Run
from parameternet.export.mobile import read
from parameternet.export.plan import Plan

__all__ = ["SUFFIX", "read", "runner", "write"]

SUFFIX = ".tflite"


def write(model: nn.Module, path: Path, plan: Plan) -> None:
    """Write `model` for LiteRT, modifying `model` in place."""
    mobile.need("timmx", "litert_torch", "ai_edge_litert")
    mobile.convert("litert", model, path, plan, verify=False)
    mobile.describe(path, plan)


def runner(path: Path, threads: int = 0) -> Run:
    """Return a function that runs the file with LiteRT on the CPU; `threads=0` lets LiteRT choose."""
    from ai_edge_litert.interpreter import Interpreter

    with mobile.silent():  # it logs its delegate
        interpreter = Interpreter(model_path=str(path), num_threads=threads or None)
        interpreter.allocate_tensors()
        signature = interpreter.get_signature_runner()
    (name,) = signature.get_input_details()
    outputs = sorted(signature.get_output_details(), key=lambda output: int(output.rpartition("_")[2]))

    def run(x: np.ndarray) -> list[np.ndarray]:
        found = signature(**{name: x})
        return [found[output] for output in outputs]

    return run
