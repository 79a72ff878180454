"""What each strategy costs in training on this machine, beside a static convolution: interleaved medians.

    python benchmarks/strategies.py [--threads 1] [--rounds 15]

A row is forward and backward of one layer; times are relative to torch.nn.functional.conv2d with one kernel for the
whole batch. Each strategy is checked against the naive loop in float64 first, and its largest relative error stands in
the row. The last tables are depthwise convolutions, oneDNN's against ours (`_DepthwiseConv`, `depthwise_conv2d`).
"""

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from reference import naive_dynamic_conv2d

from parameternet.layers import STRATEGIES, dynamic_conv2d
from parameternet.layers.functional import Geometry, _conv2d, choose_strategy, depthwise_conv2d

BATCH, EXPERTS = 128, 4
# name: channels in, out, side, kernel, stride, groups
LAYERS = {
    "pointwise 80 -> 240, 1 position": (80, 240, 1, 1, 1, 1),
    "pointwise 80 -> 240, 4 positions": (80, 240, 2, 1, 1, 1),
    "pointwise 80 -> 240, 16 positions": (80, 240, 4, 1, 1, 1),
    "pointwise 40 -> 120, 64 positions": (40, 120, 8, 1, 1, 1),
    "depthwise 3 x 3, 60 x 8 x 8": (60, 60, 8, 3, 1, 60),
    "depthwise 3 x 3, 240 x 2 x 2": (240, 240, 2, 3, 1, 240),
    "stem 3 x 3 stride 2, 3 x 64 x 64": (3, 8, 64, 3, 2, 1),
}
GRADIENTS = {
    "240 x 2 x 2, 3 x 3": (240, 2, 3, 1),
    "56 x 4 x 4, 5 x 5 stride 2": (56, 4, 5, 2),
    "60 x 8 x 8, 3 x 3": (60, 8, 3, 1),
}

STATIC = {"36 x 16 x 16, 5 x 5 stride 2": (36, 16, 5, 2), "336 x 4 x 4, 5 x 5 stride 2": (336, 4, 5, 2)}


def medians(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median milliseconds of each, the runs taking turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def training(function: Callable[..., Tensor], *tensors: Tensor) -> Callable[[], Tensor]:
    leaves = [t.clone().requires_grad_() for t in tensors]

    def run() -> Tensor:
        y = function(*leaves)
        torch.autograd.grad(y, leaves, torch.ones_like(y))
        return y

    return run


def layer(cin: int, cout: int, side: int, kernel: int, stride: int, groups: int, rounds: int) -> str:
    torch.manual_seed(0)
    x = torch.randn(BATCH, cin, side, side)
    weight = torch.randn(EXPERTS * cout, cin // groups, kernel, kernel) / (cin / groups) ** 0.5
    routing = torch.rand(BATCH, EXPERTS)
    conv = {"stride": stride, "padding": kernel // 2, "groups": groups}
    exact = naive_dynamic_conv2d(x.double(), weight.double(), routing.double(), **conv)
    runs = {"static": training(lambda a, w: F.conv2d(a, w, **conv), x, weight[:cout])}
    errors = {}
    for name in STRATEGIES:
        run = training(lambda a, w, r, s=name: dynamic_conv2d(a, w, r, strategy=s, **conv), x, weight, routing)
        try:
            errors[name] = float((run().detach().double() - exact).abs().max() / exact.abs().max())
        except ValueError:  # not for this kind of layer
            continue
        runs[name] = run
    times = medians(runs, rounds)
    chosen = choose_strategy(x, weight, routing, (stride, stride), (kernel // 2, kernel // 2), groups)
    cells = [f"{n}{'*' if n == chosen else ''} {t / times['static']:.2f}" for n, t in times.items() if n != "static"]
    return f"static {times['static']:7.2f} ms | {' | '.join(cells)} | error {max(errors.values()):.0e}"


def gradient(channels: int, side: int, kernel: int, stride: int, rounds: int) -> str:
    out = (side - 1) // stride + 1
    x, grad = torch.randn(1, BATCH * channels, side, side), torch.randn(1, BATCH * channels, out, out)
    weight = torch.randn(BATCH * channels, 1, kernel, kernel)
    step, pad, one, groups = [stride] * 2, [kernel // 2] * 2, [1, 1], BATCH * channels
    swapped = Geometry((1, 1), (kernel // 2, kernel // 2), (stride, stride), groups)

    def onednn():
        mask = [False, True, False]
        return torch.ops.aten.convolution_backward(grad, x, weight, None, step, pad, one, False, [0, 0], groups, mask)

    times = medians({"oneDNN": onednn, "ours": lambda: _conv2d(x, grad.reshape(groups, 1, out, out), swapped)}, rounds)
    return f"oneDNN {times['oneDNN']:.2f} ms | ours {times['ours']:.2f} ms"


def static_depthwise(channels: int, side: int, kernel: int, stride: int, rounds: int) -> str:
    x, weight = torch.randn(BATCH, channels, side, side), torch.randn(channels, 1, kernel, kernel)
    geometry = ((stride, stride), (kernel // 2, kernel // 2), (1, 1))
    runs = {
        "oneDNN": training(lambda a, w: F.conv2d(a, w, None, *geometry, channels), x, weight),
        "ours": training(lambda a, w: depthwise_conv2d(a, w, *geometry, training=True), x, weight),
    }
    times = medians(runs, rounds)
    return f"oneDNN {times['oneDNN']:.2f} ms | ours {times['ours']:.2f} ms"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"batch {BATCH}, {EXPERTS} experts, float32, {options.threads} thread(s), torch {torch.__version__}, "
          f"{platform.machine()}; relative to static, * is what runs")  # fmt: skip
    for name, shape in LAYERS.items():
        print(f"{name:36}{layer(*shape, options.rounds)}")
    print("\ngradient of a depthwise kernel, a kernel a sample")
    for name, shape in GRADIENTS.items():
        print(f"{name:36}{gradient(*shape, options.rounds)}")
    print("\nstatic depthwise layer, forward and backward")
    for name, shape in STATIC.items():
        print(f"{name:36}{static_depthwise(*shape, options.rounds)}")


if __name__ == "__main__":
    main()
