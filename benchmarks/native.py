"""What do native kernels gain over torch's operators?

    python benchmarks/native.py                                       10 minutes on two cores
    python benchmarks/native.py --channels-last                       the same in channels last
    python benchmarks/native.py --networks parameternet_50m --modes inference

Inference at 224 pixels with batch norm folded in, and a training step at 128 pixels (batch 16), each in several ways:

static    the static baseline (`dynamic=False`), in torch's operators
torch     ours in torch's operators, as where the kernels were not built
native    ours with the kernels of parameternet/layers/native

With --channels-last all are in this memory format, and there is one more way:

first     ours with the kernels, in contiguous memory, where there are kernels for more cases

Times are medians of runs that take turns; a ratio is the median over rounds, with quartiles. Outputs with and without
kernels, and in training the losses, have to agree. Results go to benchmarks/results/native_KIND.csv, by kind of
processor, and with --channels-last to native_channels_last_KIND.csv. To measure AVX2 on a processor with AVX-512, limit
all libraries:

    ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 PARAMETERNET_NATIVE=avx2 \\
        python benchmarks/native.py
"""

import argparse
from collections.abc import Callable
from unittest import mock

import torch
from _contestants import network
from _timing import ROOT, Row, Spread, header, interleave, kind_of_processor, ratio, relative_error, write_csv
from speed import pictures, training_loss, training_step

from parameternet.layers import native

RESULTS = ROOT / "benchmarks" / "results"
TOLERANCE = 1e-4
WAYS = ("static", "torch", "native")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["parameternet_600m", "dynamic_efficientnet_lite0"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32], help="for inference")
    parser.add_argument("--modes", nargs="+", default=["inference", "training"], choices=("inference", "training"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--channels-last", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if not native.level():
        raise SystemExit("there are no native kernels here: a C++ compiler builds them when the package is installed")
    cases = [("inference", batch) for batch in options.batches if "inference" in options.modes]
    cases += [("training", 16)] if "training" in options.modes else []
    options.ways = (*WAYS, "first") if options.channels_last else WAYS
    head, rows = header(options.threads, "cpu"), []
    for name in options.networks:
        options.network = name
        for mode, batch in cases:
            for row in measure(mode, batch, options):
                rows.append({"network": name, "mode": mode, "batch": batch, **row})
                print(rows[-1], flush=True)
    layout = "_channels_last" if options.channels_last else ""
    write_csv(RESULTS / f"native{layout}_{kind_of_processor('cpu')}.csv", head, rows)


def measure(mode: str, batch: int, options: argparse.Namespace) -> list[Row]:
    """A row for each way."""
    make = inference if mode == "inference" else training
    runs = {way: in_the_way(way, make(way, batch, laid_out(way, options))) for way in options.ways}
    error = relative_error(runs["native"]().double(), runs["torch"]().double())
    if not error <= TOLERANCE:
        raise SystemExit(f"{mode}, batch {batch}: with native kernels the result differs by {error:.1e}")
    with torch.inference_mode(mode == "inference"):
        times = interleave(runs, options.rounds, "cpu")
    return [row_of(way, times) for way in options.ways]


def laid_out(way: str, options: argparse.Namespace) -> argparse.Namespace:
    return argparse.Namespace(**{**vars(options), "channels_last": options.channels_last and way != "first"})


def in_the_way(way: str, run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """Without kernels, if the way is "static" or "torch"."""

    def without() -> torch.Tensor:
        with mock.patch.object(native, "_available", 0):
            return run()

    return run if way in ("native", "first") else without


def inference(way: str, batch: int, options: argparse.Namespace) -> Callable[[], torch.Tensor]:
    model = network("static" if way == "static" else "ours", options.network, False)
    if options.channels_last:
        model = model.to(memory_format=torch.channels_last)
    x = pictures(batch, 224, "cpu", "float32", options)
    return torch.inference_mode()(lambda: model(x))


def training(way: str, batch: int, options: argparse.Namespace) -> Callable[[], torch.Tensor]:
    """A step, which gives the loss before it."""
    x, labels = pictures(batch, 128, "cpu", "float32", options), torch.arange(batch)
    model, loss = training_loss("static" if way == "static" else "ours", "cpu", "float32", x, labels, options)
    last: list[torch.Tensor] = []

    def remembered() -> torch.Tensor:
        last[:] = [loss()]
        return last[0]

    step = training_step(model, remembered)

    def run() -> torch.Tensor:
        step()
        return last[0].detach()

    return run


def row_of(way: str, times: dict[str, list[float]]) -> Row:
    row: Row = {"way": way, "ms": f"{1e3 * Spread.of(times[way]).median:.1f}"}
    for base in ("static", "torch"):
        spread = ratio(times[way], times[base])
        row |= {f"to {base}": f"{spread.median:.2f}", f"to {base}, quartiles": f"{spread.low:.2f} to {spread.high:.2f}"}
    return row


if __name__ == "__main__":
    main()
