"""How many images per second do the networks train at, and where does the time go?

    python benchmarks/throughput.py                                       10 minutes
    python benchmarks/throughput.py --networks parameternet_50m --sides 64

A step of training (forward, backward, update by AdamW) on random images, for 200 classes, on one core of a CPU as in
the recipes of configs/train: our network and its static baseline, in float32 and in bfloat16 (autocast), and each in
channels last. What a run itself reaches, with data, is in its history.csv.

Images per second are medians of steps that take turns. Where the time goes is a profile of one step of ours in
bfloat16. Results go to benchmarks/results/throughput_KIND.csv and throughput_profile_KIND.csv, by kind of processor.
"""

import argparse
import itertools
from collections import Counter
from collections.abc import Callable

import timm
import torch
import torch.nn.functional as F
from _timing import ROOT, Row, Spread, header, interleave, kind_of_processor, write_csv

import parameternet  # noqa: F401  registers the networks
from parameternet.memory import keep_freed_memory

RESULTS = ROOT / "benchmarks" / "results"
WAYS = tuple(itertools.product(("ours", "static"), ("float32", "bfloat16"), ("", "channels last")))
# What an operator is counted as, by the first of these that its name contains.
KINDS = {
    "batch_norm": "batch norm",
    "conv": "convolutions",  # static, depthwise and of single positions
    "Conv": "convolutions",
    "mm": "matrix products",
    "copy_": "copies and casts",
    "cat": "copies and casts",
    "Optimizer": "update",
    "_foreach": "update",
    "adamw": "update",
    "hardswish": "activations",
    "relu": "activations",
    "threshold": "activations",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["parameternet_50m", "parameternet_300m", "parameternet_600m"])
    parser.add_argument("--sides", nargs="+", type=int, default=[48, 64], help="of the images, in pixels")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()  # as the command line does
    head, rows, profiles = header(options.threads, "cpu"), [], []
    for name, side in itertools.product(options.networks, options.sides):
        case = {"network": name, "side": side, "batch": options.batch}
        steps = {way: training_step(name, side, options.batch, *way) for way in WAYS}
        times = interleave({" ".join(way).strip(): step for way, step in steps.items()}, options.rounds, "cpu")
        for way, seconds in times.items():
            rate = Spread.of([options.batch / s for s in seconds])
            rows.append(
                {
                    **case,
                    "way": way,
                    "images/s": f"{rate.median:.0f}",
                    "quartiles": f"{rate.low:.0f} to {rate.high:.0f}",
                }
            )
            print(rows[-1], flush=True)
        profiles.append(case | profile(steps["ours", "bfloat16", ""]))
        print(profiles[-1], flush=True)
    kind = kind_of_processor("cpu")
    write_csv(RESULTS / f"throughput_{kind}.csv", head, rows)
    write_csv(RESULTS / f"throughput_profile_{kind}.csv", head, profiles)


def training_step(name: str, side: int, batch: int, whose: str, dtype: str, layout: str) -> Callable[[], None]:
    torch.manual_seed(0)
    form = torch.channels_last if layout else torch.contiguous_format
    model = timm.create_model(name, num_classes=200, dynamic=whose == "ours").train().to(memory_format=form)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    x = torch.randn(batch, 3, side, side).contiguous(memory_format=form)
    labels = torch.randint(200, (batch,))

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = F.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()

    return step


def profile(step: Callable[[], None]) -> Row:
    """Percentages of a step by kind of operator."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        step()
    times = Counter(dict.fromkeys([*KINDS.values(), "the rest"], 0.0))
    for event in profiler.key_averages():
        kind = next((kind for part, kind in KINDS.items() if part in event.key), "the rest")
        times[kind] += event.self_cpu_time_total
    return {kind: f"{100 * time / times.total():.0f}" for kind, time in times.items()}


if __name__ == "__main__":
    main()
