"""Shared code of the formats that timmx writes: ncnn, LiteRT, ExecuTorch, Core ML and TensorRT.

timmx takes the name of a network and has timm create it. `convert` substitutes our network, fused and in one of our
forms, and timmx does the rest. Its own check (a cosine of 0.9) is skipped where we run the file.

These formats have no common place for metadata, so it is written next to the file, as FILE.json.
"""

import contextlib
import importlib.util
import io
import json
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from parameternet.export import forms
from parameternet.export.plan import Plan, quiet
from parameternet.files import write_json

__all__ = ["convert", "need", "read", "silent"]

_one_at_a_time = threading.Lock()


def need(*packages: str) -> None:
    """Check that packages, given by import name, are installed.

    Raises:
        ModuleNotFoundError: names the first missing package and the command that installs it.
    """
    for package in packages:
        if importlib.util.find_spec(package) is None:
            wanted = "tensorrt" if package == "tensorrt" else "'parameternet[mobile]'"
            raise ModuleNotFoundError(f"the package {package} is missing: pip install {wanted}", name=package)


def convert(backend: str, model: nn.Module, path: Path, plan: Plan, **options: Any) -> None:
    """Write `model` with a backend of timmx, modifying `model` in place.

    Args:
        backend: The backend's name in `timmx export`.
        model: A fused network.
        path: The output file, or the output folder for ncnn.
        plan: A plan with a fixed batch and size.
        options: Options of the backend, as on timmx's command line.

    Raises:
        timmx.TimmxError: the conversion failed.
    """
    import timmx

    with _one_at_a_time, _instead_of_timm(_Network(_in_form(model, plan), plan.size[0])), silent():
        timmx.export_model(backend, "network", output=path, batch_size=plan.batch, input_size=plan.size, **options)


def describe(path: Path, plan: Plan) -> None:
    """Write the metadata of `plan` next to the file."""
    write_json(_facts(path), plan.facts)


def read(path: Path) -> dict[str, Any]:
    """Return the metadata that is stored next to a file."""
    return json.loads(_facts(path).read_text(encoding="utf-8"))


def _facts(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _in_form(model: nn.Module, plan: Plan) -> nn.Module:
    if plan.form == "constant":
        return forms.write_constant(model)
    if plan.batch == 1:
        return forms.write_computed(model, plan.size, mix_by_conv=False)
    return forms.write_batched(model)


class _Network(nn.Module):
    """A wrapper that prefixes layer names: pnnx uses them as Python names, which may not begin with a digit.

    timmx checks the input size against `in_chans`.
    """

    def __init__(self, network: nn.Module, in_chans: int) -> None:
        super().__init__()
        self.network, self.in_chans = network.eval(), in_chans

    def forward(self, x: Tensor) -> Any:
        return self.network(x)


@contextlib.contextmanager
def _instead_of_timm(model: nn.Module) -> Iterator[None]:
    """Make timmx receive `model`, whatever network it asks timm for."""
    from timmx.export import common

    original = common.create_timm_model
    common.create_timm_model = lambda *_, **__: model
    try:
        yield
    finally:
        common.create_timm_model = original


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Suppress output as `plan.quiet` does, including that of subprocesses and C++ libraries.

    These write to file descriptors, not to sys.stdout and sys.stderr.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    kept = {number: os.dup(number) for number in (1, 2)}
    try:
        with open(os.devnull, "wb") as nowhere, quiet(), contextlib.redirect_stderr(io.StringIO()):
            for number in kept:
                os.dup2(nowhere.fileno(), number)
            yield
    finally:
        for number, copy in kept.items():
            os.dup2(copy, number)
            os.close(copy)
