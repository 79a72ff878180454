"""Measure our networks and our layer next to static ones and to timm's CondConv2d.

    python benchmarks/speed.py                            networks, training, layers: about 20 minutes on two cores
    python benchmarks/speed.py --what networks training   about 8 minutes
    python benchmarks/speed.py --what layers              about 10 minutes
    python benchmarks/speed.py --what strategies          each way to compute a layer; or --shape 80,240,14,1,1,1
    python benchmarks/speed.py --quick                    everything in some minutes, without writing files

networks    Inference at 224 pixels, batch norm folded in: ours, its static baseline (`dynamic=False`), and ours on
            timm's CondConv2d with the same weights.
training    A step of the same three at 128 pixels, not folded: forward, backward, SGD with momentum.
layers      One convolution with given routing weights, over a grid of shapes: ours, CondConv2d, static, and peers.
strategies  One convolution by each strategy that takes its shape, and static: torch's, and ours where it is depthwise.

Each contestant is compared with the naive form (tests/reference.py) in float64 before it is timed. Its error, that of
the naive form in the same dtype, and the times are in one row. An error is the largest one of an output relative to
the largest output (inference, first and last sample), or the distance of all gradients relative to their length
(training). What is ours has to be at most twice as inaccurate as the naive form or as the static convolution, which
sums in the same order as a fast dynamic one; others have to be so, or right in half of the digits. Who is not is not
timed, and the program exits with 1.

Times are medians, with quartiles, of runs that take turns; a ratio is the median over the rounds, each round by
itself, so above 1 is slower. Memory is the highest point of model and run (networks and training): of a fresh process
on a CPU, of torch's allocator on a GPU. Results go to benchmarks/results as CSV and as a plot, a pair for each kind of
processor, since the instructions of a CPU decide which form is fast.

bfloat16 is measured on a CPU if it is asked for: one without instructions for it takes 20 times as long in all forms.

Peers: timm is what people install for this. Two more packages with such a layer were found and take part in `layers`
where they are installed: geffnet, timm's forerunner, and fightingcv-attention, which takes layers of stride 1 only. Not
on the package index, so not here: ODConv, KernelWarehouse, d-li14/condconv.pytorch, kaijieshi7's DynamicConv.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _contestants import EXPERTS, PEERS, StaticDepthwise, double, layers, naive_layer, network
from _timing import (
    ROOT,
    Runs,
    Spread,
    accurate,
    distance,
    header,
    in_fresh_process,
    interleave,
    kind_of_processor,
    peak_mib,
    ratio,
    relative_error,
    right,
    write_csv,
)
from torch import Tensor, nn

from parameternet.layers import STRATEGIES, DynamicConv, dynamic_conv2d
from parameternet.layers.dispatch import choose_strategy

RESULTS = ROOT / "benchmarks" / "results"
NETWORK = "parameternet_600m"
CONTESTANTS = ("ours", "static", "condconv")
OTHERS = ("static", "condconv", *PEERS)  # not ours: whoever is right is compared with
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# Channels in, channels out, side, kernel, stride, groups.
Shape = tuple[int, int, int, int, int, int]
POINTWISE = (
    (16, 16, 112), (16, 64, 112), (24, 72, 56), (72, 24, 56), (40, 120, 28), (120, 40, 28), (80, 240, 14),
    (240, 80, 14), (112, 672, 14), (672, 112, 14), (160, 960, 7), (960, 160, 7), (960, 960, 7),
)  # fmt: skip
DEPTHWISE = ((16, 112), (72, 56), (120, 28), (240, 14), (672, 14), (960, 7))
DENSE = ((16, 16, 112), (32, 32, 56), (64, 64, 28), (128, 128, 14), (240, 240, 7), (960, 960, 7))
GRID: tuple[Shape, ...] = (
    *((cin, cout, side, 1, 1, 1) for cin, cout, side in POINTWISE),
    *((c, c, side, kernel, 1, c) for kernel in (3, 5, 7) for c, side in DEPTHWISE),
    *((c, c, side, kernel, 2, c) for kernel in (3, 5) for c, side in DEPTHWISE[1::2]),
    *((cin, cout, side, 3, 1, 1) for cin, cout, side in DENSE[:-1]),
    *((cin, cout, side, 3, 2, 1) for cin, cout, side in ((3, 32, 112), *DENSE[1::2])),
)
# Where strategies change places: few positions, small maps, kernels larger than the map.
STRATEGY_SHAPES: tuple[Shape, ...] = (
    (80, 240, 1, 1, 1, 1), (80, 240, 2, 1, 1, 1), (80, 240, 4, 1, 1, 1), (40, 120, 8, 1, 1, 1), (60, 60, 8, 3, 1, 60),
    (240, 240, 2, 3, 1, 240), (56, 56, 4, 5, 2, 56), (36, 36, 16, 5, 2, 36), (336, 336, 4, 5, 2, 336),
    (3, 8, 64, 3, 2, 1), (32, 32, 14, 3, 1, 1),
)  # fmt: skip

Row = dict[str, Any]
Models = dict[str, nn.Module]
Errors = dict[str, tuple[float, float]]  # of a contestant, and of the naive form in the same dtype


def main() -> int:
    options = parse()
    if options.memory_of:
        print(memory_of(**json.loads(options.memory_of)))
        return 0
    torch.backends.cudnn.benchmark = True
    rows = [row for device in options.devices for what in options.what for row in run_all(what, device, options)]
    wrong = [row for row in rows if not row["accurate"]]
    for row in wrong:
        print(f"not timed, too inaccurate: {row}")
    return 1 if wrong else 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", nargs="+", choices=CASES, default=["networks", "training", "layers"])
    parser.add_argument("--devices", nargs="+", choices=["cpu", "cuda"], help="default: all there are")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, help="default: float32; on a GPU bfloat16, too")
    usual = "1 8 32; training 16; strategies 128; on a GPU 256, too"
    parser.add_argument("--batches", nargs="+", type=int, help=f"default: {usual}")
    parser.add_argument("--modes", nargs="+", choices=["inference", "training"], help="of layers and strategies")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--network", default=NETWORK)
    parser.add_argument("--shape", help="only this layer: channels in,channels out,side,kernel,stride,groups")
    parser.add_argument("--channels-last", action="store_true", help="on a CPU, too; a GPU always gets it")
    parser.add_argument("--quick", action="store_true", help="3 rounds, one batch size, every 6th layer; no files")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.devices is None:
        options.devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    options.rounds = 3 if options.quick else options.rounds
    return options


def run_all(what: str, device: str, options: argparse.Namespace) -> list[Row]:
    """Run all cases; each is written at once."""
    print(f"\n{what} on {device}: ms (quartiles), ratio to static, to CondConv2d, MiB, error (of the naive form)")
    head, path = header(options.threads, device), RESULTS / f"{what}_{kind_of_processor(device)}.csv"
    print("\n".join(head), flush=True)
    rows: list[Row] = []
    dtypes = options.dtypes or (["float32"] if device == "cpu" else ["float32", "bfloat16"])
    for dtype in dtypes:
        for found in CASES[what](device, dtype, options):
            print(words(found), flush=True)
            rows += found
            if not options.quick:
                write_csv(path, head, rows)
    if what == "layers":
        print(slower(rows))
    if not options.quick:
        plot(path)
    return rows


def slower(rows: list[Row]) -> str:
    """Say which of our layers take more than 5 % longer than CondConv2d."""
    ours = [row for row in rows if row["contestant"] == "ours" and row["vs_condconv"]]
    late = [row for row in ours if float(row["vs_condconv"]) > 1.05]
    names = [f"\n    {r['vs_condconv']} {r['case']}, {r['mode']}, {r['dtype']}, batch {r['batch']}" for r in late]
    return f"more than 5 % slower than CondConv2d: {len(late)} of {len(ours)}" + "".join(names)


def batches(options: argparse.Namespace, device: str, usual: list[int]) -> list[int]:
    found = options.batches or usual + ([256] if device == "cuda" else [])
    return [min(found)] if options.quick else found


def rows_of(case: Row, errors: Errors, times: dict[str, list[float]], peaks: dict[str, float]) -> list[Row]:
    """A row per contestant: case, times, error."""
    rows = []
    for name, (error, naive_error) in errors.items():
        row = {**case, "contestant": name}
        own = times.get(name)
        for column, spread in (
            ("ms", own and Spread.of([1e3 * t for t in own])),
            ("vs_static", own and "static" in times and ratio(own, times["static"])),
            ("vs_condconv", own and "condconv" in times and ratio(own, times["condconv"])),
        ):
            numbers = [f"{number:.4g}" for number in spread] if spread else [""] * 3
            row |= dict(zip((column, f"{column}_low", f"{column}_high"), numbers, strict=True))
        row["peak_mib"] = f"{peaks[name]:.0f}" if name in peaks else ""
        row |= {"error": f"{error:.1e}", "naive_error": f"{naive_error:.1e}", "accurate": own is not None}
        rows.append(row)
    return rows


def words(rows: list[Row]) -> str:
    first = rows[0]
    lines = [f"{first['case']}, {first['mode']}, {first['dtype']}, batch {first['batch']}"]
    for row in rows:
        spread = f"{row['ms']:>8} ({row['ms_low']} to {row['ms_high']})"
        ratios = f"{row['vs_static'] or '-':>6} {row['vs_condconv'] or '-':>6}"
        lines.append(
            f"    {row['contestant']:16} {spread:30} {ratios} {row['peak_mib'] or '-':>6}  "
            f"{row['error']} ({row['naive_error']})"
        )
    return "\n".join(lines)


def timed(runs: Runs, errors: Errors, case: Row, rounds: int) -> dict[str, list[float]]:
    """Time the accurate ones, in seconds."""
    dtype = DTYPES[case["dtype"]]
    good = {}
    for name, run in runs.items():
        error, naive_error = errors[name]
        floor = max(naive_error, errors["static"][0])
        if accurate(error, floor, dtype) or (name in OTHERS and right(error, dtype)):
            good[name] = run
    return interleave(good, rounds, case["device"])


# networks -------------------------------------------------------------------------------------------------------------


def networks(device: str, dtype: str, options: argparse.Namespace) -> Iterator[list[Row]]:
    """Inference at 224 pixels."""
    models = {name: prepare(network(name, options.network, False), device, dtype, options) for name in CONTESTANTS}
    truths = {name: network(name, options.network, False).to(device) for name in ("naive", "naive static")}
    for batch in batches(options, device, [1, 8, 32]):
        case = {"case": options.network, "mode": "inference", "device": device, "dtype": dtype, "batch": batch}
        x = pictures(batch, 224, device, dtype, options)
        runs = {name: partial(model, x) for name, model in models.items()}
        with torch.inference_mode():
            errors = network_errors(runs, truths, x)
            times = timed(runs, errors, case, options.rounds)
        yield rows_of(case, errors, times, peaks(case, 224, options))


def prepare(model: nn.Module, device: str, dtype: str, options: argparse.Namespace) -> nn.Module:
    model = model.to(device, DTYPES[dtype])
    if device == "cuda" or options.channels_last:
        for parameter in model.parameters():
            if parameter.ndim == 4:  # a peer has five, which torch refuses
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return model


def pictures(batch: int, side: int, device: str, dtype: str, options: argparse.Namespace) -> Tensor:
    """Return images; a smaller batch is the beginning of a larger one."""
    draw = torch.Generator().manual_seed(1)
    # A constant per image and channel, so that images are routed differently.
    x = torch.stack([
        torch.randn(3, side, side, generator=draw) + torch.randn(3, 1, 1, generator=draw) for _ in range(batch)
    ])  # fmt: skip
    x = x.to(device, DTYPES[dtype])
    return x.contiguous(memory_format=torch.channels_last) if device == "cuda" or options.channels_last else x


def network_errors(runs: Runs, truths: Models, x: Tensor) -> Errors:
    """On the first and the last image."""
    some = [0] if len(x) == 1 else [0, len(x) - 1]
    found = {}
    for name, run in runs.items():
        truth = truths["naive static" if name == "static" else "naive"]
        exact = double(truth)(x[some].double())
        naive = double(truth).to(x.dtype)(x[some])
        found[name] = relative_error(run()[some], exact), relative_error(naive, exact)
    return found


def training(device: str, dtype: str, options: argparse.Namespace) -> Iterator[list[Row]]:
    """A step at 128 pixels; bfloat16 by autocast."""
    for batch in batches(options, device, [16]):
        case = {"case": options.network, "mode": "training", "device": device, "dtype": dtype, "batch": batch}
        x, labels = pictures(batch, 128, device, "float32", options), torch.arange(batch, device=device)
        errors = training_errors(device, dtype, x, labels, options)
        runs = {n: training_step(*training_loss(n, device, dtype, x, labels, options)) for n in CONTESTANTS}
        times = timed(runs, errors, case, options.rounds)
        yield rows_of(case, errors, times, peaks(case, 128, options))


def training_loss(
    name: str, device: str, dtype: str, x: Tensor, labels: Tensor, options: argparse.Namespace, smooth: bool = False
) -> tuple[nn.Module, Callable[[], Tensor]]:
    """A network and what gives its loss; its parameters are of the dtype of `x`."""
    model = prepare(network(name, options.network, True, smooth), device, "float32", options).to(x.dtype)

    def loss() -> Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
            y = model(x)
        return F.cross_entropy(y.to(x.dtype), labels)

    return model, loss


def training_errors(device: str, dtype: str, x: Tensor, labels: Tensor, options: argparse.Namespace) -> Errors:
    """Of the gradients of all parameters, with smooth activations (`network` says why)."""
    loss = partial(training_loss, device=device, labels=labels, options=options, smooth=True)
    errors = {}
    for truth, names in (("naive", ("ours", "condconv")), ("naive static", ("static",))):
        exact = gradient(*loss(truth, dtype="float64", x=x.double()))
        naive = distance(gradient(*loss(truth, dtype=dtype, x=x)), exact)
        errors |= {name: (distance(gradient(*loss(name, dtype=dtype, x=x)), exact), naive) for name in names}
    return errors


def gradient(model: nn.Module, loss: Callable[[], Tensor]) -> Tensor:
    """All gradients as one vector; the experts of every contestant come in the same order."""
    parameters = list(model.parameters())
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss(), parameters)])


def training_step(model: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return step


def peaks(case: Row, side: int, options: argparse.Namespace) -> dict[str, float]:
    """MiB for each contestant."""
    found = {}
    for name in CONTESTANTS:
        asked = {"contestant": name, "side": side, "channels_last": options.channels_last, **case}
        if case["device"] == "cpu":
            found[name] = in_fresh_process(__file__, {**asked, "threads": options.threads})
        else:
            found[name] = memory_of(**asked, threads=options.threads)
    return found


def memory_of(case, mode, device, dtype, batch, contestant, side, channels_last, threads) -> float:
    torch.set_num_threads(threads)
    options = argparse.Namespace(network=case, channels_last=channels_last)

    def infer() -> Callable[[], object]:
        model = prepare(network(contestant, case, False), device, dtype, options)
        x = pictures(batch, side, device, dtype, options)
        return torch.inference_mode()(partial(model, x))

    def train() -> Callable[[], object]:
        x, labels = pictures(batch, side, device, "float32", options), torch.arange(batch, device=device)
        return training_step(*training_loss(contestant, device, dtype, x, labels, options))

    return peak_mib(train if mode == "training" else infer, device)


# layers ---------------------------------------------------------------------------------------------------------------


def layer_grid(device: str, dtype: str, options: argparse.Namespace) -> Iterator[list[Row]]:
    for batch in batches(options, device, [1, 8, 32]):
        for shape in shapes(GRID, options):
            for mode in options.modes or ["inference"]:
                everybody = layers(shape[0], shape[1], *shape[3:])
                yield layer_case(shape, everybody, mode, device, dtype, batch, options)


def strategies(device: str, dtype: str, options: argparse.Namespace) -> Iterator[list[Row]]:
    for batch in batches(options, device, [128]):
        for shape in shapes(STRATEGY_SHAPES, options):
            for mode in options.modes or ["inference", "training"]:
                everybody = by_strategy(shape, batch, device)
                yield layer_case(shape, everybody, mode, device, dtype, batch, options)


def shapes(usual: tuple[Shape, ...], options: argparse.Namespace) -> tuple[Shape, ...]:
    if options.shape:
        numbers = tuple(map(int, options.shape.split(",")))
        if len(numbers) != 6:
            raise SystemExit(f"--shape wants channels in,channels out,side,kernel,stride,groups, got {options.shape!r}")
        return (numbers,)
    return usual[::6] if options.quick else usual


def by_strategy(shape: Shape, batch: int, device: str) -> Models:
    """Every strategy that takes this shape, and the static layer. A star marks the chosen one."""
    cin, cout, side, kernel, stride, groups = shape
    everybody = layers(cin, cout, kernel, stride, groups)
    conv, found = everybody["ours"], {"static": everybody["static"], "condconv": everybody["condconv"]}
    if groups == cin == cout:
        found["static ours"] = StaticDepthwise(conv)
    x, routing = torch.zeros(batch, cin, side, side, device=device), torch.zeros(batch, EXPERTS, device=device)
    weight = conv.weight.to(device)
    chosen = choose_strategy(x, weight, routing, conv.stride, conv.padding, groups)
    for name in STRATEGIES:
        layer = layers(cin, cout, kernel, stride, groups)["ours"]
        layer.strategy = name
        try:
            dynamic_conv2d(x[:1], weight, routing[:1], None, conv.stride, conv.padding, (1, 1), groups, name)
        except ValueError:  # not for this kind of layer
            continue
        found[f"{name}{'*' if name == chosen else ''}"] = layer
    return found


def layer_case(
    shape: Shape, everybody: Models, mode: str, device: str, dtype: str, batch: int, options: argparse.Namespace
) -> list[Row]:
    torch.manual_seed(2)
    cin, cout, side, *_ = shape
    conv = layers(cin, cout, *shape[3:])["ours"].to(device, DTYPES[dtype])
    x = prepare_input(torch.randn(batch, cin, side, side), device, dtype, options)
    routing = torch.rand(batch, EXPERTS).to(device, DTYPES[dtype])
    make = {"inference": inference_run, "training": training_run}[mode]
    runs = {name: make(prepare(layer, device, dtype, options), x, routing) for name, layer in everybody.items()}
    runs = {name: run for name, run in runs.items() if name not in PEERS or runs_at_all(run)}
    errors = layer_errors(runs, conv, x, routing, mode)
    case = {"case": title(shape), "mode": mode, "device": device, "dtype": dtype, "batch": batch}
    with torch.inference_mode(mode == "inference"):
        times = timed(runs, errors, case, options.rounds)
    return rows_of(case, errors, times, {})


def runs_at_all(peer: Callable[[], object]) -> bool:
    """Whether a peer runs; older ones do not take channels_last."""
    try:
        peer()
    except RuntimeError:
        return False
    return True


def prepare_input(x: Tensor, device: str, dtype: str, options: argparse.Namespace) -> Tensor:
    x = x.to(device, DTYPES[dtype])
    return x.contiguous(memory_format=torch.channels_last) if device == "cuda" or options.channels_last else x


def title(shape: Shape) -> str:
    cin, cout, side, kernel, stride, groups = shape
    kind = "depthwise" if groups == cin == cout else "pointwise" if kernel == 1 else "dense"
    channels = f"{cin}" if kind == "depthwise" else f"{cin} > {cout}"
    return f"{kind} {kernel} x {kernel}{f' stride {stride}' if stride > 1 else ''}, {channels} at {side} x {side}"


def inference_run(layer: nn.Module, x: Tensor, routing: Tensor) -> Callable[[], Tensor]:
    return partial(layer, x, routing)


def training_run(layer: nn.Module, x: Tensor, routing: Tensor) -> Callable[[], Tensor]:
    """Gradients of input, kernels and routing weights (static: of input and kernel) as one vector."""
    leaves = [x.detach().requires_grad_(), *layer.parameters(), routing.detach().requires_grad_()]

    def run() -> list[Tensor]:
        y = layer(leaves[0], leaves[-1])
        found = torch.autograd.grad(y, leaves, torch.ones_like(y), allow_unused=True)
        return [g for g in found if g is not None]

    return run


def layer_errors(runs: Runs, conv: DynamicConv, x: Tensor, routing: Tensor, mode: str) -> Errors:
    if mode == "inference":
        some = sorted({0, len(x) - 1})
        compare = relative_error
        give = partial(_some_rows, some)
    else:
        compare, give = distance, _one_vector
    errors = {}
    references: dict[bool, tuple[Tensor, float]] = {}
    for name, run in runs.items():
        static = name.startswith("static")
        if static not in references:
            exact = give(naive_run(double(conv), x.double(), routing.double(), mode, static))
            naive = give(naive_run(conv, x, routing, mode, static))
            references[static] = exact, compare(naive, exact)
        exact, naive_error = references[static]
        errors[name] = compare(give(run), exact), naive_error
    return errors


def _some_rows(some: list[int], run: Callable[[], Tensor]) -> Tensor:
    with torch.inference_mode():
        return run()[some]


def _one_vector(run: Callable[[], list[Tensor]]) -> Tensor:
    return torch.cat([gradient.flatten() for gradient in run()])


def naive_run(conv: DynamicConv, x: Tensor, routing: Tensor, mode: str, static: bool) -> Callable:
    """The definition; of the static layer: its one expert, always mixed with weight one."""
    weight = conv.expert_kernels()[0] if static else conv.weight
    coefficients = routing.new_ones(len(x), 1) if static else routing
    if mode == "inference":
        return partial(naive_layer, conv, x, coefficients, weight)

    class Definition(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(weight.detach().clone())

        def forward(self, x: Tensor, routing: Tensor) -> Tensor:
            return naive_layer(conv, x, coefficients if static else routing, self.weight)

    return training_run(Definition(), x, routing)


CASES = {"networks": networks, "training": training, "layers": layer_grid, "strategies": strategies}


def plot(path: Path) -> None:
    try:
        from _plots import draw
    except ModuleNotFoundError as error:
        print(f"no plot: {error.name} is missing; pip install 'parameternet[plot]'")
    else:
        print(f"{path.relative_to(ROOT)} and {draw(path).relative_to(ROOT)}")


if __name__ == "__main__":
    sys.exit(main())
