"""Other dynamic convolutions beside ours: time, memory, and whether they can be exported for any batch.

    python benchmarks/peers.py            four layers, batch 1 and 32, inference and training: 10 minutes on one core

Every layer has the parameters of `--experts` kernels and routes by itself:

ours             DynamicConv, default router
CondConv2d       timm's, with our router
ODConv           gates on kernels (softmax), inputs, outputs and taps (sigmoid); arXiv:2209.07947
KernelWarehouse  kernels put together of cells, which are mixed from a warehouse of cells; arXiv:2308.08361
static           torch.nn.Conv2d

The functions differ, so each is held against its own formula, sample by sample in float64, before it is timed; ODConv
and KernelWarehouse are written from the formulas of their papers, with batch normalisation left out of ODConv's
attention. Their authors' code mixes and convolves in the same way: one product, one grouped convolution. Times are
medians of runs that take turns, and ratios those to static within a round. Memory is what a step of training adds to a
fresh process. `exports` says whether torch.onnx.export takes a free batch and the file gives the layer's outputs for
another one in onnxruntime. Results go to benchmarks/results/peers.csv.
"""

import argparse
import json
import sys

import torch
import torch.nn.functional as F
from _timing import ROOT, Row, Spread, header, in_fresh_process, interleave, peak_mib, ratio, relative_error, write_csv
from timm.layers import CondConv2d
from torch import Tensor, nn

from parameternet.layers import DynamicConv, Router

RESULT = ROOT / "benchmarks" / "results" / "peers.csv"
# Channels in, channels out, side, kernel, groups.
SHAPES = ((80, 240, 14, 1, 1), (240, 240, 14, 3, 240), (64, 64, 28, 3, 1), (960, 160, 7, 1, 1))
TOLERANCE = 1e-5


class CondConv(nn.Module):
    """timm's CondConv2d behind our router."""

    def __init__(self, cin: int, cout: int, kernel: int, groups: int, experts: int) -> None:
        super().__init__()
        self.routing = Router(cin, experts)
        self.conv = CondConv2d(cin, cout, kernel, padding=kernel // 2, groups=groups, num_experts=experts)

    def kernels(self, x: Tensor) -> Tensor:
        return (self.routing(x).to(x) @ self.conv.weight).reshape(len(x), *self.conv.weight_shape)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x, self.routing(x))


class PerSample(nn.Module):
    """A convolution with the kernel `kernels(x)` of each sample, (B, out, in / groups, k, k)."""

    def __init__(self, kernel: int, groups: int) -> None:
        super().__init__()
        self.padding, self.groups = kernel // 2, groups

    def kernels(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        kernels = self.kernels(x)
        folded = x.reshape(1, -1, *x.shape[2:])
        y = F.conv2d(folded, kernels.flatten(0, 1), None, 1, self.padding, 1, x.shape[0] * self.groups)
        return y.reshape(x.shape[0], kernels.shape[1], *x.shape[2:])


class ODConv(PerSample):
    """W(x) = sum_e kernel_e (outputs x inputs x taps) W_e: gates along every axis of the kernel."""

    def __init__(self, cin: int, cout: int, kernel: int, groups: int, experts: int) -> None:
        super().__init__(kernel, groups)
        hidden = max(cin // 16, 16)
        self.hidden = nn.Linear(cin, hidden, bias=False)
        self.of_experts, self.of_outputs = nn.Linear(hidden, experts), nn.Linear(hidden, cout)
        self.of_inputs, self.of_taps = nn.Linear(hidden, cin // groups), nn.Linear(hidden, kernel * kernel)
        self.weight = nn.Parameter(torch.randn(experts, cout, cin // groups, kernel, kernel) * 0.05)

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        seen = F.relu(self.hidden(x.mean((2, 3))))
        gates = (layer(seen).sigmoid() for layer in (self.of_outputs, self.of_inputs, self.of_taps))
        return self.of_experts(seen).softmax(1), *gates

    def kernels(self, x: Tensor) -> Tensor:
        experts, outputs, inputs, taps = self.gates(x)
        mixed = (experts @ self.weight.flatten(1)).reshape(x.shape[0], *self.weight.shape[1:])
        taps = taps.reshape(x.shape[0], 1, 1, *self.weight.shape[3:])
        return mixed * outputs[:, :, None, None, None] * inputs[:, None, :, None, None] * taps


class KernelWarehouse(PerSample):
    """A kernel of `cells` parts, each mixed from all `experts` x `cells` cells of the warehouse.

    The weights of a part are its logits divided by the sum of their sizes: they may be negative, and there is no
    softmax.
    """

    def __init__(self, cin: int, cout: int, kernel: int, groups: int, experts: int, cells: int = 4) -> None:
        super().__init__(kernel, groups)
        self.shape = (cout, cin // groups, kernel, kernel)
        number, hidden = experts * cells, max(cin // 16, 16)
        self.hidden, self.logits = nn.Linear(cin, hidden), nn.Linear(hidden, cells * number)
        size = cout * (cin // groups) * kernel * kernel // cells
        self.warehouse = nn.Parameter(torch.randn(number, size) * 0.05)

    def kernels(self, x: Tensor) -> Tensor:
        logits = self.logits(F.relu(self.hidden(x.mean((2, 3))))).reshape(x.shape[0], -1, len(self.warehouse))
        weights = logits / (logits.abs().sum(2, keepdim=True) + 1e-3)
        return (weights.flatten(0, 1) @ self.warehouse).reshape(x.shape[0], *self.shape)


class Ours(DynamicConv):
    """DynamicConv with random routers, so that there is something to export."""

    def __init__(self, cin: int, cout: int, kernel: int, groups: int, experts: int) -> None:
        super().__init__(cin, cout, kernel, padding=kernel // 2, groups=groups, num_experts=experts)
        nn.init.normal_(self.routing.weight)

    def kernels(self, x: Tensor) -> Tensor:
        mixed = self.routing(x).to(x) @ self.weight.reshape(self.num_experts, -1)
        return mixed.reshape(len(x), self.out_channels, *self.weight.shape[1:])


LAYERS = {"ours": Ours, "CondConv2d": CondConv, "ODConv": ODConv, "KernelWarehouse": KernelWarehouse}


def layers(shape: tuple[int, ...], experts: int) -> dict[str, nn.Module]:
    cin, cout, _, kernel, groups = shape
    torch.manual_seed(0)
    static = nn.Conv2d(cin, cout, kernel, padding=kernel // 2, groups=groups, bias=False)
    return {"static": static, **{name: kind(cin, cout, kernel, groups, experts) for name, kind in LAYERS.items()}}


def error(layer: nn.Module, shape: tuple[int, ...]) -> float:
    """Largest difference from the definition, one sample after another in float64."""
    x = torch.randn(3, shape[0], shape[2], shape[2])
    with torch.no_grad():
        y = layer(x)
        exact = layer.double()
        x = x.double()
        kernels = [exact.weight] * 3 if isinstance(layer, nn.Conv2d) else exact.kernels(x)
        rows = zip(x.split(1), kernels, strict=True)
        truth = torch.cat([F.conv2d(one, kernel, None, 1, shape[3] // 2, 1, shape[4]) for one, kernel in rows])
    layer.float()
    return relative_error(y, truth)


def exports(layer: nn.Module, shape: tuple[int, ...]) -> str:
    """Does torch.onnx.export take a free batch, and is the file right for another batch?"""
    import onnxruntime

    x = torch.randn(2, shape[0], shape[2], shape[2])
    other = torch.cat([x, x[:1]])
    try:
        batch = ({0: torch.export.Dim("batch", min=1)},)
        program = torch.onnx.export(layer.eval(), (x,), dynamo=True, dynamic_shapes=batch, verbose=False)
        session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
        (y,) = session.run(None, {session.get_inputs()[0].name: other.numpy()})
    except Exception as failure:  # every layer fails in its own way
        return f"no ({type(failure).__name__})"
    with torch.no_grad():
        return "yes" if relative_error(torch.as_tensor(y), layer(other).double()) < TOLERANCE else "wrong numbers"


def step(layer: nn.Module, x: Tensor) -> None:
    layer(x).sum().backward()
    layer.zero_grad()


def memory(name: str, shape: list[int], batch: int, experts: int) -> float:
    def build():
        layer = layers(tuple(shape), experts)[name].train()
        x = torch.randn(batch, shape[0], shape[2], shape[2], requires_grad=True)
        return lambda: step(layer, x)

    return peak_mib(build, "cpu")


def measure(
    shape: tuple[int, ...], batch: int, training: bool, free: dict[str, str], options: argparse.Namespace
) -> list[Row]:
    made = layers(shape, options.experts)
    errors = {name: error(layer, shape) for name, layer in made.items()}
    x = torch.randn(batch, shape[0], shape[2], shape[2], requires_grad=training)
    for layer in made.values():
        layer.train(training)
    with torch.set_grad_enabled(training):
        runs = {
            name: (lambda layer=layer: step(layer, x)) if training else (lambda layer=layer: layer(x))
            for name, layer in made.items()
        }
        times = interleave(runs, options.rounds, "cpu")
    rows = []
    for name, layer in made.items():
        case = {"name": name, "shape": shape, "batch": batch, "experts": options.experts}
        beside = ratio(times[name], times["static"])
        rows.append(
            {
                "shape": "x".join(map(str, shape)),
                "batch": batch,
                "mode": "training" if training else "inference",
                "layer": name,
                "parameters": sum(p.numel() for p in layer.parameters()),
                "ms": f"{1e3 * Spread.of(times[name]).median:.3f}",
                "times static": f"{beside.median:.2f}",
                "quartiles": f"{beside.low:.2f} to {beside.high:.2f}",
                "MiB": f"{in_fresh_process(__file__, case):.0f}" if training else "",
                "exports": free[name],
                "error": f"{errors[name]:.0e}",
            }
        )
        if errors[name] > TOLERANCE:
            raise SystemExit(f"{name} is not its formula: {errors[name]:.1e} at {shape}")
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory_of:
        print(memory(**json.loads(options.memory_of)))
        return 0
    head = [*header(options.threads, "cpu"), f"{options.experts} experts; {options.rounds} rounds taking turns"]
    rows: list[Row] = []
    for shape in SHAPES:
        free = {name: exports(layer, shape) for name, layer in layers(shape, options.experts).items()}
        for batch in options.batches:
            for training in (False, True):
                rows += measure(shape, batch, training, free, options)
                write_csv(RESULT, head, rows)
                for row in rows[-len(LAYERS) - 1 :]:
                    print("  ".join(map(str, row.values())), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
