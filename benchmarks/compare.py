"""Compare variants of a training recipe at equal epochs and seeds.

    python benchmarks/compare.py claim configs/train/parameternet_50m_claim.yaml    missing runs, then the table
    python benchmarks/compare.py transfer configs/train/parameternet_600m_cifar10.yaml
    python benchmarks/compare.py freezing configs/train/parameternet_50m_routers_cifar10.yaml
    python benchmarks/compare.py claim RECIPE --table                               the table and the plot only
    python benchmarks/compare.py claim RECIPE --table --card weights/NAME           the same, for a checkpoint's card

claim: do experts buy accuracy at equal FLOPs? For every seed: the static baseline; a static network widened to the
multiply-adds of 4 experts at the training size; and 4 and 8 experts. Then, for the first seed alone: other learning
rates, other routers, and those of 0.1.0, which read the averages without normalisation (benchmarks/routers.py has more
routers). One expert with softmax is the static baseline; with sigmoid, it is scaled for each image.
transfer: what are pretrained weights worth? The network from the recipe's `init`, and from random weights.
freezing: what does the recipe's `freeze` cost in accuracy? With and without it.

A seed draws initial weights, order and crops, so that runs of one seed see the same images. Each run is a folder in
runs/compare and is resumed. Epochs go to benchmarks/results/RECIPE.csv when a run is finished; runs in that file are
not repeated. Figures are those of the last epoch, not of the best one. Differences from the first variant are paired by
seed: mean and standard deviation over seeds.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from _timing import ROOT, add_run, header, read_csv, read_runs

import parameternet  # noqa: F401  registers the networks
from parameternet.flops import count_flops
from parameternet.training import Recipe, load_recipe

COLUMNS = ("top1", "top5", "train_loss", "images_per_second")
Row = dict[str, str]


class Plan(NamedTuple):
    """Variants as changes of a recipe, which may be functions of it. Those of `always` run with every seed, the others
    with the first; the first variant is what the others are compared with."""

    question: str
    always: dict[str, dict[str, Any]]
    once: dict[str, dict[str, Any]]

    @property
    def variants(self) -> dict[str, dict[str, Any]]:
        return {**self.always, **self.once}

    @property
    def base(self) -> str:
        return next(iter(self.always))


# Widths at which static networks have the multiply-adds of 4 experts at 64 pixels.
WIDER = {"parameternet_50m": 0.56, "parameternet_300m": 1.73}
SIGMOID = {"routing": "sigmoid"}
OLD = {"routing": "sigmoid", "routing_norm": "none"}
MLP = {"routing_hidden": 32}

PLANS = {
    "claim": Plan(
        "How much accuracy do experts add? Only `static, wider` has the multiply-adds of 4 experts.",
        always={
            "static": {"model_kwargs": {"dynamic": False}},
            "static, wider": {"model_kwargs": lambda r: {"dynamic": False, "width": WIDER[r.model]}},
            "4 experts": {},
            "8 experts": {"model_kwargs": {"num_experts": 8}},
        },
        once={
            "static, lr / 2": {"model_kwargs": {"dynamic": False}, "lr": lambda r: r.lr / 2},
            "static, lr x 2": {"model_kwargs": {"dynamic": False}, "lr": lambda r: r.lr * 2},
            "4 experts, lr x 2": {"lr": lambda r: r.lr * 2},
            "4 experts, MLP router": {"model_kwargs": MLP},
            "8 experts, MLP router": {"model_kwargs": {"num_experts": 8, **MLP}},
            "1 expert, sigmoid": {"model_kwargs": {"num_experts": 1, **SIGMOID}},
            "2 experts, sigmoid": {"model_kwargs": {"num_experts": 2, **SIGMOID}},
            "4 experts, sigmoid": {"model_kwargs": SIGMOID},
            "8 experts, sigmoid": {"model_kwargs": {"num_experts": 8, **SIGMOID}},
            "1 expert, sigmoid MLP": {"model_kwargs": {"num_experts": 1, **SIGMOID, **MLP}},
            "4 experts, sigmoid MLP": {"model_kwargs": {**SIGMOID, **MLP}},
            "8 experts, sigmoid MLP": {"model_kwargs": {"num_experts": 8, **SIGMOID, **MLP}},
            "1 expert, router of 0.1.0": {"model_kwargs": {"num_experts": 1, **OLD}},
            "2 experts, router of 0.1.0": {"model_kwargs": {"num_experts": 2, **OLD}},
            "4 experts, router of 0.1.0": {"model_kwargs": OLD},
            "4 experts, router of 0.1.0, slower": {"model_kwargs": OLD, "scale_router_lr": True},
            "8 experts, router of 0.1.0": {"model_kwargs": {"num_experts": 8, **OLD}},
            "4 experts, softmax of 0.1.0": {"model_kwargs": {**OLD, "routing": "softmax"}},
            "4 experts, softmax of 0.1.0 at 30": {"model_kwargs": {**OLD, "routing": "softmax", "temperature": 30.0}},
            "4 experts, MLP router of 0.1.0": {"model_kwargs": {**OLD, **MLP}},
            "static, no clipping": {"model_kwargs": {"dynamic": False}, "clip_grad": None},
            "4 experts, router of 0.1.0, no clipping": {"model_kwargs": OLD, "clip_grad": None},
        },
    ),
    "transfer": Plan(
        "What are these weights worth as a start?",
        always={"from scratch": {"init": None}, "pretrained": {}},
        once={},
    ),
    "freezing": Plan(
        "What does freezing cost?",
        always={"everything trained": {"freeze": []}, "partly frozen": {}},
        once={},
    ),
}

VARIANTS = sorted({variant for plan in PLANS.values() for variant in plan.variants})


class Run(NamedTuple):
    """A variant with a seed."""

    variant: str
    seed: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("plan", choices=PLANS)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument(
        "--variants", nargs="+", choices=VARIANTS, metavar="VARIANT", help="only these, with every seed"
    )
    parser.add_argument("--set", dest="overrides", action="append", default=[], help="a change of the recipe for all")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    parser.add_argument("--table", action="store_true", help="run nothing")
    parser.add_argument("--card", nargs="+", type=Path, default=[], help="folders of checkpoints that are to show it")
    options = parser.parse_args()
    plan, recipe = PLANS[options.plan], load_recipe(options.recipe, options.overrides)
    result = ROOT / "benchmarks" / "results" / f"{options.recipe.stem}.csv"
    if not options.table:
        runs = wanted(plan, options.seeds, options.variants)
        missing = [run for run in runs if run not in measured(result, recipe)]
        with ThreadPoolExecutor(options.jobs) as pool:
            for run in pool.map(lambda run: train(plan, run, options.recipe, options.overrides), missing):
                collect(plan, run, options.recipe.stem, recipe, result)
    rows, picture = table(plan, recipe, result), plot(plan, recipe, result)
    print("\n".join(rows), picture, sep="\n")
    for folder in options.card:
        words = f"{plan.question} {conditions(recipe, options)}"
        (folder / f"{options.plan}.md").write_text("\n".join([words, "", *rows, ""]))
        shutil.copyfile(picture, folder / f"{options.plan}.png")


def wanted(plan: Plan, seeds: list[int], variants: list[str] | None) -> list[Run]:
    """Return `variants` with every seed; without them the plan: runs of every seed, then those of the first."""
    if variants:
        return [Run(variant, seed) for seed in seeds for variant in variants]
    always = [Run(variant, seed) for seed in seeds for variant in plan.always]
    return always + [Run(variant, seeds[0]) for variant in plan.once]


def folder_of(recipe: str, run: Run) -> Path:
    return ROOT / "runs" / "compare" / recipe / f"{run.variant.replace(' ', '_')}-{run.seed}"


def train(plan: Plan, run: Run, recipe: Path, overrides: list[str]) -> Run:
    """Train or resume a run in a process of its own; return the run."""
    folder = folder_of(recipe.stem, run)
    folder.mkdir(parents=True, exist_ok=True)
    changed = changes(load_recipe(recipe, overrides), plan.variants[run.variant])
    sets = [*overrides, f"seed={run.seed}", *(f"{key}={json.dumps(value)}" for key, value in changed.items())]
    command = [sys.executable, "-m", "parameternet", "train", str(recipe), "--output", str(folder)]
    with open(folder / "log.txt", "a") as log:
        done = subprocess.run([*command, *(part for change in sets for part in ("--set", change))], cwd=ROOT,
                              stdout=log, stderr=subprocess.STDOUT)  # fmt: skip
    print(f"{run.variant}, seed {run.seed}: {'done' if not done.returncode else f'see {folder}/log.txt'}", flush=True)
    return run


def changes(recipe: Recipe, variant: dict[str, Any]) -> dict[str, Any]:
    """Return a variant's fields; arguments of the network are added to those of the recipe."""
    given = {key: value(recipe) if callable(value) else value for key, value in variant.items()}
    return {
        key: {**getattr(recipe, key), **value} if isinstance(value, dict) else value for key, value in given.items()
    }


def collect(plan: Plan, run: Run, name: str, recipe: Recipe, result: Path) -> None:
    """Add the epochs of a finished run to the results."""
    epochs = [
        {"variant": run.variant, "seed": run.seed, "epoch": row["epoch"], **{key: row[key] for key in COLUMNS}}
        for row in _history(folder_of(name, run))
    ]
    if len(epochs) == recipe.epochs:
        device = recipe.device if recipe.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        head = [*header(recipe.threads or 1, device), settings(recipe)]
        add_run(result, (run.variant, str(run.seed)), epochs, list(plan.variants), head)


def conditions(recipe: Recipe, options: argparse.Namespace) -> str:
    """Describe the conditions in a sentence for a card."""
    return (
        f"Measured on `{recipe.model}`, {recipe.epochs} epochs at {recipe.input_size} px of {recipe.data_name}, the "
        "same recipe and seeds for all; top-1 and top-5 in percent after the last epoch, mean and standard deviation "
        "over seeds; differences are paired by seed; parameters and multiply-adds with 1,000 classes "
        f"(`python benchmarks/compare.py {options.plan} {options.recipe}`)."
    )


def settings(recipe: Recipe) -> str:
    """What runs must have in common to be compared."""
    return f"settings: {recipe.model}, {recipe.epochs} epochs at {recipe.input_size} px, batch {recipe.batch_size}"


def _history(folder: Path) -> list[Row]:
    path = folder / "history.csv"
    return read_csv(path)[1] if path.is_file() else []


# what came out --------------------------------------------------------------------------------------------------------


def measured(result: Path, recipe: Recipe) -> dict[Run, list[Row]]:
    """Read the epochs of each run; empty if there is no file yet."""
    runs = read_runs(result, settings(recipe))
    return {Run(variant, int(seed)): rows for (variant, seed), rows in runs.items()}


def scores(runs: dict[Run, list[Row]], variant: str, key: str) -> dict[int, float]:
    """By seed, after the last epoch."""
    return {run.seed: float(rows[-1][key]) for run, rows in runs.items() if run.variant == variant}


def cost(recipe: Recipe, variant: dict[str, Any]) -> tuple[float, float]:
    """Millions of parameters, and of multiply-adds at the recipe's size, for 1,000 classes."""
    with torch.device("meta"):
        model = timm.create_model(
            recipe.model, num_classes=1000, **changes(recipe, variant).get("model_kwargs", recipe.model_kwargs)
        )
    macs = count_flops(model, (3, recipe.test_size, recipe.test_size)).total
    return sum(p.numel() for p in model.parameters()) / 1e6, macs / 1e6


def table(plan: Plan, recipe: Recipe, result: Path) -> list[str]:
    """A row per variant: cost, accuracy, difference from the first variant."""
    if not result.is_file():
        raise SystemExit("no run is whole yet")
    runs = measured(result, recipe)
    base = scores(runs, plan.base, "top1")
    lines = [
        f"| | parameters | multiply-adds at {recipe.test_size} px | seeds | top-1 | top-5 | against {plan.base} |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for variant in dict.fromkeys(run.variant for run in runs):
        parameters, macs = cost(recipe, plan.variants[variant])
        top1, top5 = (scores(runs, variant, key) for key in ("top1", "top5"))
        apart = [value - base[seed] for seed, value in top1.items() if seed in base]
        cells = (
            variant, f"{parameters:.2f} M", f"{macs:.1f} M", str(len(top1)), _spread(top1.values()),
            _spread(top5.values()), "" if variant == plan.base else _spread(apart, sign="+"),
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _spread(values, sign: str = "") -> str:
    values = list(values)
    if not values:
        return "-"
    middle = f"{statistics.mean(values):{sign}.1f}"
    return middle if len(values) == 1 else f"{middle} ± {statistics.stdev(values):.1f}"


def plot(plan: Plan, recipe: Recipe, result: Path) -> Path:
    """Top-1 and top-5 over epochs and, if the variants cost different, against multiply-adds and parameters."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    colours = colormaps["tab20"]

    head, runs = read_csv(result)[0], measured(result, recipe)
    costs = {variant: cost(recipe, plan.variants[variant]) for variant in dict.fromkeys(run.variant for run in runs)}
    columns = 1 if len(set(costs.values())) == 1 else 3
    figure = Figure(figsize=(4 + 3 * columns, 7.6), layout="constrained")
    for (epochs, *against), key in zip(figure.subplots(2, columns, squeeze=False), ("top1", "top5"), strict=True):
        for index, variant in enumerate(costs):
            colour = "0.3" if variant == plan.base else colours(index - 1)
            curves = [[float(row[key]) for row in rows] for run, rows in runs.items() if run.variant == variant]
            middle = [statistics.mean(values) for values in zip(*curves, strict=True)]
            epochs.plot(range(1, len(middle) + 1), middle, color=colour, marker=".", label=variant)
            values = list(scores(runs, variant, key).values())
            for axes, x in zip(reversed(against), costs[variant], strict=False):
                spread = statistics.stdev(values) if len(values) > 1 else None
                axes.errorbar(x, statistics.mean(values), spread, color=colour, marker="o", capsize=3)
        epochs.xaxis.set_major_locator(MaxNLocator(integer=True))
        for axes, label in zip(
            (epochs, *against), ("epoch", "multiply-adds, millions", "parameters, millions"), strict=False
        ):
            axes.set(xlabel=label, ylabel=f"{key.replace('top', 'top-')}, %")
            axes.grid(alpha=0.3)
    lines = figure.axes[0].get_legend_handles_labels()
    figure.legend(*lines, loc="outside lower center", ncols=columns + 1, fontsize=8, frameon=False)
    figure.suptitle("\n".join(head), fontsize=7)
    out = result.with_suffix(".png")
    figure.savefig(out, dpi=110)
    return out


if __name__ == "__main__":
    main()
