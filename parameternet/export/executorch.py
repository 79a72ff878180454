"""Export to ExecuTorch, PyTorch's runtime for phones: NAME.pte in float32, for XNNPACK on CPUs, written by timmx."""

from pathlib import Path

import numpy as np
import torch
from torch import nn

from parameternet.export import mobile
from parameternet.export.checking import Run
from parameternet.export.mobile import read
from parameternet.export.plan import Plan

__all__ = ["SUFFIX", "read", "runner", "write"]

SUFFIX = ".pte"


def write(model: nn.Module, path: Path, plan: Plan) -> None:
    """Write `model` for ExecuTorch, modifying `model` in place."""
    mobile.need("timmx", "executorch")
    mobile.convert("executorch", model, path, plan, verify=False)
    mobile.describe(path, plan)


def runner(path: Path) -> Run:
    """Return a function that runs the file with ExecuTorch on the CPU; ExecuTorch chooses the number of threads."""
    with mobile.silent():  # it logs the processor
        from executorch.runtime import Runtime

        program = Runtime.get().load_program(path)
        method = program.load_method("forward")

    def run(x: np.ndarray) -> list[np.ndarray]:
        return [y.numpy().copy() for y in method.execute([torch.from_numpy(np.ascontiguousarray(x))])]

    return run
