"""Export to ncnn, for phones and small boards: NAME.param and NAME.bin in float32, written by timmx with pnnx.

ncnn has no batch dimension: each tensor belongs to one image. The input is `in0`, the outputs are `out0`, `out1`, ...
"""

import tempfile
from pathlib import Path

import numpy as np
from torch import nn

from parameternet.export import mobile
from parameternet.export.checking import Run
from parameternet.export.mobile import read
from parameternet.export.plan import Plan

__all__ = ["SUFFIX", "read", "runner", "write"]

SUFFIX = ".param"


def write(model: nn.Module, path: Path, plan: Plan) -> None:
    """Write `model` as NAME.param and NAME.bin, modifying `model` in place."""
    mobile.need("timmx", "pnnx", "ncnn")
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        mobile.convert("ncnn", model, Path(folder), plan, fp16=False, verify=False)
        for ending in (".param", ".bin"):
            Path(folder, f"model.ncnn{ending}").replace(path.with_suffix(ending))
    mobile.describe(path, plan)


def runner(path: Path, threads: int = 0) -> Run:
    """Return a function that runs the files for (1, C, H, W) on the CPU in float32; `threads=0` lets ncnn choose."""
    import ncnn

    net = ncnn.Net()
    for shorter in ("fp16_packed", "fp16_storage", "fp16_arithmetic", "bf16_storage", "bf16_packed"):
        setattr(net.opt, f"use_{shorter}", False)
    if threads:
        net.opt.num_threads = threads
    if net.load_param(str(path)) or net.load_model(str(path.with_suffix(".bin"))):
        raise RuntimeError(f"ncnn cannot read {path.name}")

    def run(x: np.ndarray) -> list[np.ndarray]:
        extractor = net.create_extractor()
        extractor.input("in0", ncnn.Mat(np.ascontiguousarray(x[0])))
        found = [extractor.extract(name) for name in net.output_names()]
        if any(code for code, _ in found):
            raise RuntimeError("ncnn returned no output")
        return [np.array(y)[None] for _, y in found]

    return run
