"""Export with torch.export, for PyTorch's ahead-of-time compilers, ExecuTorch, and PyTorch without this package."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from parameternet.export import forms
from parameternet.export.checking import Run, as_list
from parameternet.export.metadata import FILE_NAME
from parameternet.export.plan import Plan, quiet, simple_padding

__all__ = ["SUFFIX", "read", "runner", "write"]

SUFFIX = ".pt2"


@torch.no_grad()
def write(model: nn.Module, path: Path, plan: Plan) -> None:
    """Write `model` as an exported program, modifying `model` in place."""
    model = forms.write_for_torch(model, plan)
    # torch.export would treat a free dimension of size 1 as fixed.
    x = torch.zeros(plan.batch or 2, *plan.size)
    dims = plan.dynamic_dims(plan.batch)
    if plan.dynamic_size and hasattr(torch.export.Dim, "DYNAMIC"):
        # Kernels without padding require a minimum size, which torch infers only for unnamed dimensions.
        dims |= {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    with quiet(), simple_padding():
        program = torch.export.export(
            model,
            (x,),
            dynamic_shapes=(dims,) if dims else None,
            # Constraints on free sizes that cannot be proved here become assertions in the program.
            prefer_deferred_runtime_asserts_over_guards=plan.dynamic_size,
        )
        for node in program.graph.nodes:
            node.meta.pop("stack_trace", None)  # it contains local paths
        torch.export.save(program, path, extra_files={FILE_NAME: json.dumps(plan.facts)})


def read(path: Path) -> dict[str, Any]:
    """Return the metadata of an exported program."""
    found = {FILE_NAME: ""}
    with quiet():
        torch.export.load(path, extra_files=found)
    return json.loads(found[FILE_NAME])


def runner(path: Path) -> Run:
    """Return a function that runs the file on the CPU."""
    with quiet():
        model = torch.export.load(path).module()

    @torch.no_grad()
    def run(x):
        return [y.numpy() for y in as_list(model(torch.from_numpy(x)))]

    return run
