"""Do experts buy accuracy at equal FLOPs? A network, its static twin and its variants, all trained by one recipe.

    python benchmarks/claim.py configs/train/parameternet_50m_claim.yaml    every run that is missing, table and plot
    python benchmarks/claim.py RECIPE --table                              what was measured: Markdown, and the plot

The claim: the network with 4 experts and its static twin, same recipe, epochs and seeds (a seed draws initial weights,
order and crops, so that runs of one seed see the same pictures). The ablation, of the first seed alone: other numbers
of experts, softmax routing, a router with a hidden layer, each a change of the network with 4 experts.

Each run is a folder in runs/claim, which `parameternet train` goes on with where it was ended. Epochs go to
benchmarks/results/RECIPE.csv. Figures are those of the last epoch, not of the best one. Differences from the static
twin are paired by seed: mean and standard deviation over seeds.
"""

import argparse
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import timm
import torch
import yaml
from _timing import ROOT, header, read_csv, write_csv

import parameternet  # noqa: F401  registers the networks
from parameternet.flops import count_flops
from parameternet.training import Recipe, load_recipe

STATIC, DYNAMIC = "static", "4 experts"
VARIANTS = {
    STATIC: {"dynamic": False},
    DYNAMIC: {},
    "1 expert": {"num_experts": 1},
    "2 experts": {"num_experts": 2},
    "8 experts": {"num_experts": 8},
    "softmax": {"routing": "softmax"},
    "hidden layer of 32": {"routing_hidden": 32},
}
CLAIM, ABLATION = (STATIC, DYNAMIC), tuple(VARIANTS)[2:]
COLUMNS = ("top1", "top5", "train_loss", "images_per_second")
Row = dict[str, str]


class Run(NamedTuple):
    """A variant with a seed."""

    variant: str
    seed: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--set", dest="overrides", action="append", default=[], help="a change of the recipe")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    parser.add_argument("--table", action="store_true", help="run nothing")
    options = parser.parse_args()
    recipe = load_recipe(options.recipe, options.overrides)
    result = ROOT / "benchmarks" / "results" / f"{options.recipe.stem}.csv"
    if not options.table:
        with ThreadPoolExecutor(options.jobs) as pool:
            list(pool.map(lambda run: train(run, options.recipe, options.overrides), wanted(options)))
        collect(options.recipe.stem, recipe, result)
    print("\n".join(table(recipe, result)))
    print(plot(recipe, result))


def wanted(options: argparse.Namespace) -> list[Run]:
    """The claim for every seed, then the ablation for the first."""
    claim = [Run(variant, seed) for seed in options.seeds for variant in CLAIM]
    ablation = [Run(variant, options.seeds[0]) for variant in ABLATION]
    return [run for run in claim + ablation if run.variant in options.variants]


def folder_of(recipe: str, run: Run) -> Path:
    return ROOT / "runs" / "claim" / recipe / f"{run.variant.replace(' ', '_')}-{run.seed}"


def train(run: Run, recipe: Path, overrides: list[str]) -> None:
    """A process a run; a run that is whole already is left as it is."""
    folder = folder_of(recipe.stem, run)
    folder.mkdir(parents=True, exist_ok=True)
    base = load_recipe(recipe, overrides).model_kwargs
    changes = [*overrides, f"seed={run.seed}", f"model_kwargs={yaml.safe_dump({**base, **VARIANTS[run.variant]})}"]
    command = [sys.executable, "-m", "parameternet", "train", str(recipe), "--output", str(folder)]
    with open(folder / "log.txt", "a") as log:
        done = subprocess.run([*command, *(part for change in changes for part in ("--set", change))], cwd=ROOT,
                              stdout=log, stderr=subprocess.STDOUT)  # fmt: skip
    print(f"{run.variant}, seed {run.seed}: {'done' if not done.returncode else f'see {folder}/log.txt'}", flush=True)


def collect(name: str, recipe: Recipe, result: Path) -> None:
    """All epochs of all whole runs in one file."""
    found = [
        (Run(variant, seed), rows)
        for variant in VARIANTS
        for seed in range(10)
        if len(rows := _history(folder_of(name, Run(variant, seed)))) == recipe.epochs
    ]
    rows = [
        {"variant": run.variant, "seed": run.seed, "epoch": row["epoch"], **{key: row[key] for key in COLUMNS}}
        for run, rows in found
        for row in rows
    ]
    if not rows:
        raise SystemExit("no run is whole yet")
    settings = f"{recipe.model}, {recipe.epochs} epochs at {recipe.input_size} px, batch {recipe.batch_size}"
    write_csv(result, [*header(recipe.threads or 1, recipe.device), settings], rows)


def _history(folder: Path) -> list[Row]:
    path = folder / "history.csv"
    return read_csv(path)[1] if path.is_file() else []


# what came out --------------------------------------------------------------------------------------------------------


def measured(result: Path) -> dict[Run, list[Row]]:
    """Epochs of each run."""
    runs: dict[Run, list[Row]] = {}
    for row in read_csv(result)[1]:
        runs.setdefault(Run(row["variant"], int(row["seed"])), []).append(row)
    return runs


def scores(runs: dict[Run, list[Row]], variant: str, key: str) -> dict[int, float]:
    """By seed, after the last epoch."""
    return {run.seed: float(rows[-1][key]) for run, rows in runs.items() if run.variant == variant}


def cost(recipe: Recipe, variant: str) -> tuple[float, float]:
    """Millions of parameters, and of multiply-adds at the recipe's size, for 1,000 classes."""
    with torch.device("meta"):
        model = timm.create_model(recipe.model, **{**recipe.model_kwargs, **VARIANTS[variant]})
    macs = count_flops(model, (3, recipe.test_size, recipe.test_size)).total
    return sum(p.numel() for p in model.parameters()) / 1e6, macs / 1e6


def table(recipe: Recipe, result: Path) -> list[str]:
    """A row a variant: cost, accuracy, difference from the static twin."""
    runs = measured(result)
    static = scores(runs, STATIC, "top1")
    lines = []
    for variant in dict.fromkeys(run.variant for run in runs):
        parameters, macs = cost(recipe, variant)
        top1, top5 = (scores(runs, variant, key) for key in ("top1", "top5"))
        apart = [value - static[seed] for seed, value in top1.items() if seed in static]
        cells = (
            variant, f"{parameters:.2f} M", f"{macs:.1f} M", str(len(top1)), _spread(top1.values()),
            _spread(top5.values()), "" if variant == STATIC else _spread(apart, sign="+"),
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _spread(values, sign: str = "") -> str:
    values = list(values)
    if not values:
        return "-"
    middle = f"{statistics.mean(values):{sign}.1f}"
    return middle if len(values) == 1 else f"{middle} ± {statistics.stdev(values):.1f}"


def plot(recipe: Recipe, result: Path) -> Path:
    """Top-1 over epochs, against multiply-adds, and against parameters."""
    from matplotlib.figure import Figure

    head, runs = read_csv(result)[0], measured(result)
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    epochs, macs, parameters = figure.subplots(1, 3)
    for index, variant in enumerate(dict.fromkeys(run.variant for run in runs)):
        colour = "0.3" if variant == STATIC else f"C{index - 1}"
        curves = [[float(row["top1"]) for row in rows] for run, rows in runs.items() if run.variant == variant]
        middle = [statistics.mean(values) for values in zip(*curves, strict=True)]
        epochs.plot(range(1, len(middle) + 1), middle, color=colour, marker=".", label=variant)
        values = list(scores(runs, variant, "top1").values())
        for axes, x in zip((parameters, macs), cost(recipe, variant), strict=True):
            axes.errorbar(x, statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None,
                          color=colour, marker="o", capsize=3)  # fmt: skip
            axes.annotate(variant, (x, statistics.mean(values)), (6, 0), textcoords="offset points", fontsize=8,
                          va="center", color=colour)  # fmt: skip
    for axes, label in ((epochs, "epoch"), (macs, "multiply-adds, millions"), (parameters, "parameters, millions")):
        axes.set(xlabel=label, ylabel="top-1, %")
        axes.grid(alpha=0.3)
        if axes is not epochs:
            axes.margins(x=0.3)
    epochs.legend(fontsize=8, frameon=False)
    figure.suptitle("\n".join(head), fontsize=7)
    out = result.with_suffix(".png")
    figure.savefig(out, dpi=110)
    return out


if __name__ == "__main__":
    main()
