"""What the formats that timmx writes have in common: ncnn, LiteRT, ExecuTorch, Core ML and TensorRT.

timmx takes names of networks and asks timm for them. `convert` gives it a network of ours in that place, fused and in
one of our forms, so that timmx does all the rest. Its own check (a cosine of 0.9) is left out where we run the file.

The formats share no place for metadata, so it is written next to the file, as FILE.json.
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
    """Refuse to go on without one of these packages, given by import name.

    Raises:
        ModuleNotFoundError: the first one that is missing, with what installs it.
    """
    for package in packages:
        if importlib.util.find_spec(package) is None:
            wanted = "tensorrt" if package == "tensorrt" else "'parameternet[mobile]'"
            raise ModuleNotFoundError(f"the package {package} is missing: pip install {wanted}", name=package)


def convert(backend: str, model: nn.Module, path: Path, plan: Plan, **options: Any) -> None:
    """Write `model`, which is changed, by timmx's `backend`, and the metadata next to it.

    Args:
        backend: What `timmx export` calls it.
        model: A fused network.
        path: The file, or the folder for ncnn.
        plan: Its batch and its size are fixed.
        options: Of the back end, as on timmx's command line.

    Raises:
        timmx.TimmxError: it failed.
    """
    import timmx

    with _one_at_a_time, _instead_of_timm(_Network(_in_form(model, plan), plan.size[0])), silent():
        timmx.export_model(backend, "network", output=path, batch_size=plan.batch, input_size=plan.size, **options)


def describe(path: Path, plan: Plan) -> None:
    """Write the facts of `plan` next to the file."""
    write_json(_facts(path), plan.facts)


def read(path: Path) -> dict[str, Any]:
    """The facts next to a file."""
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
    """A network under a name: pnnx calls its layers by theirs, and no name in Python may begin with a digit.

    `in_chans` is what timmx checks the size of the input against.
    """

    def __init__(self, network: nn.Module, in_chans: int) -> None:
        super().__init__()
        self.network, self.in_chans = network.eval(), in_chans

    def forward(self, x: Tensor) -> Any:
        return self.network(x)


@contextlib.contextmanager
def _instead_of_timm(model: nn.Module) -> Iterator[None]:
    """Let timmx get `model` whatever it asks timm for."""
    from timmx.export import common

    original = common.create_timm_model
    common.create_timm_model = lambda *_, **__: model
    try:
        yield
    finally:
        common.create_timm_model = original


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Like `plan.quiet`, also for programs and C++ libraries, which know nothing of sys.stdout and sys.stderr."""
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
