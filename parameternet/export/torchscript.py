"""Export to TorchScript, for PyTorch's C++ and mobile runtimes: a frozen trace."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from parameternet.export import forms
from parameternet.export.checking import Run, as_list
from parameternet.export.metadata import FILE_NAME
from parameternet.export.plan import Plan, quiet

__all__ = ["SUFFIX", "read", "runner", "write"]

SUFFIX = ".torchscript"


@torch.no_grad()
def write(model: nn.Module, path: Path, plan: Plan) -> None:
    """Write `model` as TorchScript, modifying `model` in place."""
    model = _Flat(forms.write_for_torch(model, plan))
    with quiet():
        traced = torch.jit.trace(model.eval(), torch.zeros(plan.batch or 2, *plan.size), check_trace=False)
        torch.jit.freeze(traced).save(str(path), _extra_files={FILE_NAME: json.dumps(plan.facts)})
    _drop_source_lines(path)


class _Flat(nn.Module):
    """A wrapper that returns a tensor or a tuple of tensors, since traces support no other nesting."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        outputs = as_list(self.network(x))
        return outputs[0] if len(outputs) == 1 else tuple(outputs)


def _drop_source_lines(path: Path) -> None:
    """Remove from an archive the local source file and line of each operation."""
    reader = torch._C.PyTorchFileReader(str(path))
    records = {name: reader.get_record(name) for name in reader.get_all_records()}
    del reader
    fresh = path.with_name(f"{path.name}.new")
    writer = torch._C.PyTorchFileWriter(str(fresh))
    for name, data in records.items():
        if not name.endswith(".debug_pkl") and not name.startswith(".data/") and name not in ("version", "byteorder"):
            writer.write_record(name, data, len(data))
    writer.write_end_of_file()
    fresh.replace(path)


def read(path: Path) -> dict[str, Any]:
    """Return the metadata of a TorchScript file."""
    found = {FILE_NAME: ""}
    with quiet():
        torch.jit.load(str(path), map_location="cpu", _extra_files=found)
    return json.loads(found[FILE_NAME])


def runner(path: Path) -> Run:
    """Return a function that runs the file on the CPU."""
    with quiet():
        model = torch.jit.load(str(path), map_location="cpu")

    @torch.no_grad()
    def run(x):
        # Recompiling for each new shape takes longer than all the checks.
        with torch.jit.optimized_execution(False):
            return [y.numpy() for y in as_list(model(torch.from_numpy(x)))]

    return run
