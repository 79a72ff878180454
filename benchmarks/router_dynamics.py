"""Measure routers during the first epoch of the claim recipe, layer by layer.

    python benchmarks/router_dynamics.py            every variant (some minutes each), then the table and the plot
    python benchmarks/router_dynamics.py --table

Every `EVERY` steps, one update is measured on a fixed batch of validation images, for each dynamic layer:

drift: mean change of a logit, in absolute value, by this one update;
saturated: share of routing weights below 0.02 or above 0.98;
experts: effective number of experts that an image uses, exp of the entropy of its shares;
relative_step: length of the update of the mean mixed kernel over the length of that kernel; of a static layer, too.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

import timm
import torch
from _timing import ROOT, header, read_csv, write_csv
from torch import Tensor, nn

from parameternet.layers import DynamicConv, record_routing_weights
from parameternet.training import load_recipe
from parameternet.training.distributed import place
from parameternet.training.report import Reporter
from parameternet.training.trainer import Trainer

RECIPE = ROOT / "configs" / "train" / "parameternet_50m_claim.yaml"
RESULT = ROOT / "benchmarks" / "results" / "router_dynamics.csv"
EVERY, IMAGES = 15, 128
COLUMNS = ("drift", "saturated", "experts", "relative_step")
VARIANTS = {
    "static": {"dynamic": False},
    "none": {"routing": "sigmoid", "routing_norm": "none"},
    "layer": {"routing": "sigmoid"},
    "none, softmax": {"routing_norm": "none", "routing": "softmax"},
    "layer, softmax": {"routing": "softmax"},
}


class Watched(Trainer):
    """Measures the layers before and after every `EVERY`th step of the first epoch."""

    def watch(self) -> list[dict[str, object]]:
        """Train one epoch; return a row for each watched step and layer."""
        self.rows, self.before = [], None
        self.images = next(iter(self.val_loader))[0][:IMAGES]
        self.train_epoch()
        return self.rows

    def step(self, images: Tensor, labels: Tensor) -> None:
        watched = self.progress.step % EVERY == 0
        before = state(self.learner.model, self.images) if watched else {}
        super().step(images, labels)
        after = state(self.learner.model, self.images) if watched else {}
        for name, (weights, kernel) in after.items():
            row = compare(*before[name], weights, kernel)
            self.rows.append({"step": self.progress.step, "layer": name, **row})


@torch.no_grad()
def state(model: nn.Module, images: Tensor) -> dict[str, tuple[Tensor | None, Tensor]]:
    """Layer -> routing weights of the images (None for a static layer), and the mean mixed kernel."""
    convs = {n: m for n, m in model.named_modules() if isinstance(m, DynamicConv)}
    if not convs:
        counterparts = timm.create_model("parameternet_50m").named_modules()
        names = [name for name, module in counterparts if isinstance(module, DynamicConv)]
        return {name: (None, model.get_submodule(name).weight.clone()) for name in names}
    # Batch statistics stay as they are: only the router's own change is to be seen.
    training = model.training
    model.eval()
    with record_routing_weights(model) as recording:
        model(images)
    model.train(training)
    out = {}
    for name, conv in convs.items():
        weights = recording.samples(name).to(conv.weight.dtype)
        experts = conv.weight.detach().unflatten(0, (conv.num_experts, -1))
        out[name] = weights, torch.tensordot(weights.mean(0), experts, 1)
    return out


def compare(old: Tensor | None, old_kernel: Tensor, new: Tensor | None, new_kernel: Tensor) -> dict[str, str]:
    """A row of the result, from before and after an update."""
    row = {"relative_step": float((new_kernel - old_kernel).norm() / old_kernel.norm().clamp_min(1e-12))}
    if new is not None and old is not None:
        shares = (new / new.sum(1, keepdim=True)).clamp_min(1e-9)
        row |= {
            "drift": float((torch.logit(new, 1e-6) - torch.logit(old, 1e-6)).abs().mean()),
            "saturated": float(((new < 0.02) | (new > 0.98)).float().mean()),
            "experts": float((-(shares * shares.log()).sum(1)).exp().mean()),
        }
    return {key: f"{row[key]:.4g}" if key in row else "" for key in COLUMNS}


def run(variant: str) -> list[dict[str, object]]:
    recipe = load_recipe(RECIPE)
    recipe.model_kwargs = VARIANTS[variant]
    torch.set_num_threads(recipe.threads or 1)
    with tempfile.TemporaryDirectory() as folder, place(recipe.device) as here:
        trainer = Watched(recipe, Path(folder), here, Reporter())
        rows = trainer.watch()
        trainer.close()
    return [{"variant": variant, **row} for row in rows]


def table(rows: list[dict[str, str]]) -> str:
    """Medians over layers (of `saturated`, means), of the first ten watched steps and of the last ten."""
    lines = ["| routing_norm | steps | " + " | ".join(COLUMNS) + " |", "| --- " * (2 + len(COLUMNS)) + "|"]
    for variant in VARIANTS:
        own = [row for row in rows if row["variant"] == variant]
        steps = sorted({int(row["step"]) for row in own})
        for span in filter(None, (steps[:10], steps[-10:])):
            chosen = [row for row in own if int(row["step"]) in span]
            cells = [[float(row[key]) for row in chosen if row[key]] for key in COLUMNS]
            middle = [statistics.mean if key == "saturated" else statistics.median for key in COLUMNS]
            words = [f"{of(values):.3g}" if values else "" for of, values in zip(middle, cells, strict=True)]
            lines.append(f"| {variant} | {span[0]} to {span[-1]} | {' | '.join(words)} |")
    return "\n".join(lines)


def plot(rows: list[dict[str, str]]) -> Path:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.4), layout="constrained")
    for axes, key in zip(figure.subplots(1, len(COLUMNS)), COLUMNS, strict=True):
        for index, variant in enumerate(VARIANTS):
            values: dict[int, list[float]] = {}
            for row in rows:
                if row["variant"] == variant and row[key]:
                    values.setdefault(int(row["step"]), []).append(float(row[key]))
            quartiles = [statistics.quantiles(values[step], n=4) for step in sorted(values)]
            if quartiles:
                low, middle, high = zip(*quartiles, strict=True)
                axes.plot(sorted(values), middle, color=f"C{index}", label=variant)
                axes.fill_between(sorted(values), low, high, color=f"C{index}", alpha=0.15)
        axes.set(xlabel="step", title=key.replace("_", " "))
        axes.grid(alpha=0.3)
        if key in ("drift", "relative_step"):
            axes.set_yscale("log")
    figure.legend(*figure.axes[-1].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    out = RESULT.with_suffix(".png")
    figure.savefig(out, dpi=110)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--table", action="store_true", help="run nothing")
    options = parser.parse_args()
    rows = read_csv(RESULT)[1] if RESULT.is_file() else []
    if not options.table:
        for variant in options.variants:
            rows = [row for row in rows if row["variant"] != variant] + run(variant)
            write_csv(RESULT, header(1, "cpu"), rows)
    rows = read_csv(RESULT)[1]
    print(table(rows), plot(rows), sep="\n")


if __name__ == "__main__":
    main()
