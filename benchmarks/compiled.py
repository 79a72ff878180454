"""What does torch.compile gain, for a static network and for ours?

    python benchmarks/compiled.py                                 parameternet_600m: half an hour on two cores
    python benchmarks/compiled.py --network parameternet_50m --batches 1

Inference at 224 pixels with batch norm folded in, and a training step at 128 pixels (batch 16), each in five ways:

static, static compiled    the static baseline (`dynamic=False`)
ours, ours compiled        DynamicConv is one operator in the compiled graph, which chooses a strategy by the actual
                           shapes when it runs
ours composite, compiled   DynamicConv is written out in the graph, as it is for torch.export, so that inductor sees
                           and fuses all of its parts

Times are medians with quartiles of runs that take turns; a ratio is the median over rounds, each round by itself. The
first call of every compiled network must give the outputs of the eager one, and in training its loss. `compile s` is
the first call, compilation included. Results go to benchmarks/results/compiled_KIND.csv, by kind of processor.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from unittest import mock

import torch
from _contestants import network
from _timing import ROOT, Row, Spread, header, interleave, kind_of_processor, ratio, relative_error, write_csv
from speed import pictures, training_loss, training_step

from parameternet.layers import dispatch

RESULTS = ROOT / "benchmarks" / "results"
TOLERANCE = 1e-4
WAYS = ("static", "static compiled", "ours", "ours compiled", "ours composite, compiled")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="parameternet_600m")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32], help="for inference")
    parser.add_argument("--modes", nargs="+", default=["inference", "training"], choices=("inference", "training"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    options.channels_last = False
    torch.set_num_threads(options.threads)
    head, rows = header(options.threads, "cpu"), []
    cases = [("inference", batch) for batch in options.batches if "inference" in options.modes]
    cases += [("training", 16)] if "training" in options.modes else []
    for mode, batch in cases:
        for row in measure(mode, batch, options):
            rows.append({"network": options.network, "mode": mode, "batch": batch, **row})
            print(rows[-1], flush=True)
        write_csv(RESULTS / f"compiled_{kind_of_processor('cpu')}.csv", head, rows)


def measure(mode: str, batch: int, options: argparse.Namespace) -> list[Row]:
    """A row for each way."""
    torch._dynamo.reset()
    runs, seconds, first = {}, {}, {}
    for way in WAYS:
        run = inference(way, batch, options) if mode == "inference" else training(way, batch, options)
        start = time.perf_counter()
        first[way] = run().double()
        seconds[way] = time.perf_counter() - start
        print(f"{mode}, batch {batch}, {way}: first call {seconds[way]:.0f} s", flush=True)
        if relative_error(first[way], first[eager(way)]) > TOLERANCE:
            raise SystemExit(f"{mode}, batch {batch}: {way} computes something else than {eager(way)}")
        runs[way] = run
    with torch.inference_mode(mode == "inference"):
        times = interleave(runs, options.rounds, "cpu")
    return [row_of(way, times, seconds[way]) for way in WAYS]


def eager(way: str) -> str:
    return way.split()[0]


def row_of(way: str, times: dict[str, list[float]], first: float) -> Row:
    row: Row = {"way": way, "compile s": f"{first:.0f}" if way.endswith("compiled") else ""}
    row |= {"ms": f"{1e3 * Spread.of(times[way]).median:.1f}"}
    for name, base in (
        ("times eager", eager(way)),
        ("times static", "static"),
        ("times static compiled", "static compiled"),
    ):
        spread = ratio(times[way], times[base])
        row |= {name: f"{spread.median:.2f}", f"{name}, quartiles": f"{spread.low:.2f} to {spread.high:.2f}"}
    return row


def inference(way: str, batch: int, options: argparse.Namespace) -> Callable[[], torch.Tensor]:
    model = network("static" if way.startswith("static") else "ours", options.network, False)
    x = pictures(batch, 224, "cpu", "float32", options)
    return torch.inference_mode()(as_asked(way, partial(compiled(way, model), x)))


def training(way: str, batch: int, options: argparse.Namespace) -> Callable[[], torch.Tensor]:
    """A step, which gives the loss before it."""
    name = "static" if way.startswith("static") else "ours"
    x, labels = pictures(batch, 128, "cpu", "float32", options), torch.arange(batch)
    model, loss = training_loss(name, "cpu", "float32", x, labels, options)
    if way.endswith("compiled"):
        model.compile(dynamic=False)
    last: list[torch.Tensor] = []

    def remembered() -> torch.Tensor:
        last[:] = [loss()]
        return last[0]

    step = training_step(model, remembered)

    def run() -> torch.Tensor:
        step()
        return last[0].detach()

    return as_asked(way, run)


def compiled(way: str, model: torch.nn.Module) -> Callable:
    return torch.compile(model, dynamic=False) if way.endswith("compiled") else model


def as_asked(way: str, run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """With DynamicConv as an operator, or written out."""
    if "composite" not in way:
        return run

    def composite() -> torch.Tensor:
        with mock.patch.object(dispatch, "compiles_for_python", lambda: False):
            return run()

    return composite


if __name__ == "__main__":
    main()
