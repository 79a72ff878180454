"""How should a router read, start and answer, so that experts pay? One change at a time on the recipe of the claim.

    python benchmarks/routers.py                      every missing run of the first seed, then the table
    python benchmarks/routers.py --variants A B --seeds 0 1 2 --jobs 2
    python benchmarks/routers.py --table              what was measured

Every variant is ParameterNet-50M of configs/train/parameternet_50m_claim.yaml with its routers replaced by a `Probe` of
this file, so that the table can be made again whatever the package's default is. Runs are folders in runs/routers,
resumed where they were ended; results go to benchmarks/results/routers.csv.

After training, routing is ablated on the validation images: each layer's routing weights are replaced by their mean
over the data (`top1_mean`), their sum by the mean sum (`top1_shares`: what the choice of experts is worth), or their
shares by the mean shares (`top1_sum`: what the per-image gain is worth). `experts` is the effective number of experts
that an image uses (exp of the entropy of its shares), the mean over layers; `spread` the standard deviation of an
image's shares around the layer's mean shares.
"""

import argparse
import json
import os
import subprocess
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import timm
import torch
from _timing import ROOT, add_run, header, read_csv, read_runs
from timm.models import register_model
from torch import Tensor, nn

from parameternet.layers import DynamicConv
from parameternet.layers.dynamic_conv import Router

RECIPE = ROOT / "configs" / "train" / "parameternet_50m_claim.yaml"
RESULT = ROOT / "benchmarks" / "results" / "routers.csv"
COLUMNS = ("top1", "top5", "train_loss", "top1_mean", "top1_shares", "top1_sum", "experts", "spread")
L2 = {"norm": "l2", "start": 0.0}
RUNNING = {"norm": "running", "start": 0.0}
CENTRED = {"norm": "centred", "start": 0.0}
# Changes of the network; keys that `Probe` does not take are arguments of parameternet_50m.
VARIANTS: dict[str, dict[str, Any]] = {
    "static": {"dynamic": False},
    "static, wider": {"dynamic": False, "width": 0.56},
    "default of 0.1.0": {"norm": None, "start": None},
    "l2, zero start": L2,
    "l2, zero start, 1 expert": {**L2, "num_experts": 1},
    "l2, zero start, softmax": {**L2, "act": "softmax"},
    "l2, zero start, softmax x gain": {**L2, "act": "softmax_gain"},
    "l2, near-zero start": {**L2, "start": 0.02},
    "rms, zero start": {"norm": "rms", "start": 0.0},
    "layernorm / sqrt(C), zero start": {"norm": "layernorm", "start": 0.0},
    "running, zero start": RUNNING,
    "running, zero start, 1 expert": {**RUNNING, "num_experts": 1},
    "running, zero start, softmax": {**RUNNING, "act": "softmax"},
    "running, zero start, softmax x gain": {**RUNNING, "act": "softmax_gain"},
    "running, drawn start, softmax x gain": {**RUNNING, "start": 1.0, "act": "softmax_gain"},
    "running, drawn start": {**RUNNING, "start": 1.0},
    "running, drawn start, softmax": {**RUNNING, "start": 1.0, "act": "softmax"},
    "running, zero start, 8 experts": {**RUNNING, "num_experts": 8},
    "running, hidden 1/16": {**RUNNING, "start": None, "hidden": True},
    "running, hidden 1/16, softmax": {**RUNNING, "start": None, "hidden": True, "act": "softmax"},
    "centred, zero start": CENTRED,
    "centred, zero start, softmax": {**CENTRED, "act": "softmax"},
    "centred, drawn start, softmax": {**CENTRED, "start": 1.0, "act": "softmax"},
    "centred, drawn start, softmax x gain": {**CENTRED, "start": 1.0, "act": "softmax_gain"},
    "centred, drawn start": {**CENTRED, "start": 1.0},
    "l2, hidden 1/16": {**L2, "start": None, "hidden": True},
    "l2, hidden 1/16, softmax": {**L2, "start": None, "hidden": True, "act": "softmax"},
    "l2, hidden 1/16, softmax x gain": {**L2, "start": None, "hidden": True, "act": "softmax_gain"},
    "rms, hidden 1/16": {"norm": "rms", "start": None, "hidden": True},
    "rms, hidden 1/16, softmax x gain": {"norm": "rms", "start": None, "hidden": True, "act": "softmax_gain"},
    "rms, hidden 1/16, softmax": {"norm": "rms", "start": None, "hidden": True, "act": "softmax"},
    "rms, hidden 1/16, 1 expert": {"norm": "rms", "start": None, "hidden": True, "num_experts": 1},
    "raw, hidden 1/16": {"norm": None, "start": None, "hidden": True},
    "raw, hidden 1/16, 1 expert": {"norm": None, "start": None, "hidden": True, "num_experts": 1},
    "raw, hidden 1/16, softmax x gain": {"norm": None, "start": None, "hidden": True, "act": "softmax_gain"},
    "l2, hidden 1/16, 1 expert": {**L2, "start": None, "hidden": True, "num_experts": 1},
    "static, output gates": {"dynamic": False, "gate": True},
    "running, softmax, output gates": {**RUNNING, "act": "softmax", "gate": True},
    "running, zero start, scale 4": {**RUNNING, "scale": 4.0},
    "running, drawn start, scale 4": {**RUNNING, "start": 1.0, "scale": 4.0},
    "running, zero start, experts / 2": {**RUNNING, "draw": 0.5},
}


class Normalise(nn.Module):
    """Pooled vectors (B, C) at unit scale: length 1 (l2, layernorm, running) or root mean square 1 (rms).

    'centred' subtracts a running mean per channel and divides by the length of what is left plus a tenth of the mean's;
    'running' subtracts a running mean and divides by a running standard deviation per channel, as batch normalisation
    in evaluation mode does, and so takes a batch of 1; the first batch sets the statistics.
    """

    def __init__(self, channels: int, norm: str | None) -> None:
        super().__init__()
        self.norm = norm
        if norm in ("running", "centred"):
            self.register_buffer("mean", torch.zeros(channels))
            self.register_buffer("square", torch.ones(channels))
            self.register_buffer("steps", torch.zeros(()))

    def forward(self, p: Tensor) -> Tensor:
        root = p.shape[1] ** 0.5
        if self.norm == "l2":
            return p / p.norm(dim=1, keepdim=True).clamp_min(1e-6)
        if self.norm == "rms":
            return p * root / p.norm(dim=1, keepdim=True).clamp_min(1e-6)
        if self.norm == "layernorm":
            return nn.functional.layer_norm(p, p.shape[1:]) / root
        if self.norm == "centred":
            if self.training:
                self._update(p.detach())
            apart = p - self.mean
            return apart / (apart.norm(dim=1, keepdim=True) + 0.1 * self.mean.norm()).clamp_min(1e-6)
        if self.norm == "running":
            if self.training:
                self._update(p.detach())
            return (p - self.mean) * (self.square - self.mean**2).clamp_min(1e-5).rsqrt() / root
        return p

    def _update(self, p: Tensor) -> None:
        self.steps += 1
        share = float(max(1 / self.steps, 0.01))
        self.mean.lerp_(p.mean(0), share)
        self.square.lerp_(p.square().mean(0), share)


class Probe(Router):
    """A router that reads a normalised vector.

    Args:
        norm: As of `Normalise`; None: as it is.
        start: Standard deviation of the logits' weights at the start; None: as torch.nn.Linear is drawn.
        act: sigmoid, softmax, or softmax_gain (softmax shares times twice a sigmoid).
        hidden: A hidden layer of a sixteenth, at least 16.
        scale: Multiplies the normalised vector.
    """

    def __init__(self, channels, num_experts, norm=None, start=None, act="sigmoid", hidden=False, scale=1.0) -> None:
        super().__init__(channels, num_experts)
        self.normalise, self.act, self.scale = Normalise(channels, norm), act, scale
        width = max(16, channels // 16) if hidden else channels
        self.body = nn.Sequential(nn.Linear(channels, width), nn.ReLU()) if hidden else nn.Identity()
        self.out = nn.Linear(width, num_experts + (act == "softmax_gain"))
        del self.weight, self.bias
        if start is not None:
            nn.init.normal_(self.out.weight, std=start) if start else nn.init.zeros_(self.out.weight)
            nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.out(self.body(self.normalise(x.float().mean((2, 3))) * self.scale))
        if self.act == "softmax":
            return logits.softmax(1)
        if self.act == "softmax_gain":
            return logits[:, :-1].softmax(1) * 2 * logits[:, -1:].sigmoid()
        return logits.sigmoid()


class Gated(nn.Module):
    """A convolution whose output channels are scaled by twice a sigmoid of its normalised, pooled input."""

    def __init__(self, conv: nn.Module, norm: str) -> None:
        super().__init__()
        self.conv = conv
        self.gate = Probe(conv.in_channels, conv.out_channels, norm, hidden=True)
        nn.init.zeros_(self.gate.out.weight)
        nn.init.zeros_(self.gate.out.bias)

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name) if name in ("conv", "gate") else getattr(self.conv, name)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) * (2 * self.gate(x))[:, :, None, None]


@register_model
def probe_parameternet_50m(pretrained=False, variant="static", **kwargs) -> nn.Module:
    changes = dict(VARIANTS[variant])
    router = {key: changes.pop(key) for key in ("norm", "start", "act", "hidden", "scale") if key in changes}
    gate, draw = changes.pop("gate", False), changes.pop("draw", 1.0)
    model = timm.create_model("parameternet_50m", **kwargs, **changes)
    for conv in [m for m in model.modules() if isinstance(m, DynamicConv)]:
        conv.routing = Probe(conv.in_channels, conv.num_experts, **router)
        conv.weight.data *= draw
    if gate:
        _gate(model, router.get("norm") or "running")
    return model


def _gate(model: nn.Module, norm: str) -> None:
    """Put gates where the dynamic network has dynamic convolutions."""
    places = timm.create_model("parameternet_50m").named_modules()
    for name in [name for name, module in places if isinstance(module, DynamicConv)]:
        parent, _, last = name.rpartition(".")
        owner = model.get_submodule(parent)
        setattr(owner, last, Gated(getattr(owner, last), norm))


# a run ----------------------------------------------------------------------------------------------------------------


def run(variant: str, seed: int) -> None:
    """Train, ablate, and leave both in the run folder."""
    from parameternet.training import load_recipe
    from parameternet.training import run as train

    folder = folder_of(variant, seed)
    sets = ["model=probe_parameternet_50m", f"seed={seed}", f"model_kwargs={json.dumps({'variant': variant})}"]
    train(load_recipe(RECIPE, sets), folder)
    (folder / "ablation.json").write_text(json.dumps(ablate(variant, folder)))


def ablate(variant: str, folder: Path) -> dict[str, float]:
    """Top-1 with routing replaced by means, and how routing varies, on the validation images."""
    from parameternet import weights
    from parameternet.data.sources import Source, open_dataset
    from parameternet.training import load_recipe
    from parameternet.training.data import eval_loader
    from parameternet.training.distributed import place

    recipe = load_recipe(RECIPE)
    model = timm.create_model("probe_parameternet_50m", variant=variant, num_classes=100)
    model.load_state_dict(weights.read(folder / "best.safetensors"))
    model.eval()
    routers = [m.routing for m in model.modules() if isinstance(m, DynamicConv)]
    if not routers:
        return {}
    config = {"input_size": (3, 64, 64), "mean": recipe.mean, "std": recipe.std, "crop_pct": 1.0,
              "interpolation": "bicubic"}  # fmt: skip
    source = Source(open_dataset(recipe.val, "validation"), "validation")
    with place("cpu") as here:
        batches = list(eval_loader(source, config, 250, 0, here, print))
    mode, seen = "own", defaultdict(list)

    def hook(router: nn.Module, _: Any, found: Tensor) -> Tensor | None:
        if mode == "own":
            seen[router].append(found)
            return None
        mean, total = means[router], found.sum(1, keepdim=True)
        if mode == "mean":
            return mean.expand_as(found)
        return found / total * mean.sum() if mode == "shares" else mean / mean.sum() * total

    handles = [router.register_forward_hook(hook) for router in routers]
    top1 = {}
    with torch.inference_mode():
        for mode in ("own", "mean", "shares", "sum"):
            if mode == "mean":
                means = {router: torch.cat(rows).mean(0) for router, rows in seen.items()}
            right = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in batches)
            top1[mode] = 100 * right / sum(len(labels) for _, labels in batches)
    for handle in handles:
        handle.remove()
    shares = [rows / rows.sum(1, keepdim=True) for rows in map(torch.cat, seen.values())]
    entropy = [-(s * s.clamp_min(1e-9).log()).sum(1).mean() for s in shares]
    return {
        "top1_own": top1["own"],
        **{f"top1_{mode}": top1[mode] for mode in ("mean", "shares", "sum")},
        "experts": float(torch.stack(entropy).exp().mean()),
        "spread": float(torch.stack([s.std(0).mean() for s in shares]).mean()) if len(shares[0]) > 1 else 0.0,
    }


def folder_of(variant: str, seed: int) -> Path:
    words = "".join(c if c.isalnum() else "_" for c in variant)
    return ROOT / "runs" / "routers" / f"{words}-{seed}"


def collect(variant: str, seed: int) -> None:
    folder = folder_of(variant, seed)
    rows = read_csv(folder / "history.csv")[1] if (folder / "history.csv").is_file() else []
    if not (folder / "ablation.json").is_file():
        return
    found = json.loads((folder / "ablation.json").read_text())
    epochs = [
        {"variant": variant, "seed": seed, "epoch": row["epoch"]}
        | {key: row[key] for key in COLUMNS[:3]}
        | {key: f"{found[key]:.4g}" if row is rows[-1] and key in found else "" for key in COLUMNS[3:]}
        for row in rows
    ]
    head = [*header(1, "cpu"), "settings: parameternet_50m, 5 epochs at 64 px, batch 128"]
    add_run(RESULT, (variant, str(seed)), epochs, list(VARIANTS), head)


def table() -> str:
    lines = ["| router | seeds | top-1 | train loss | mean weights | own shares | own sum | experts | spread |",
             "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    runs = read_runs(RESULT, "settings: parameternet_50m, 5 epochs at 64 px, batch 128")
    for variant in dict.fromkeys(variant for variant, _ in runs):
        last = [rows[-1] for (name, _), rows in runs.items() if name == variant]
        cells = [_mean(last, key) for key in ("top1", *COLUMNS[2:])]
        lines.append(f"| {variant} | {len(last)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _mean(rows: list[dict[str, str]], key: str) -> str:
    values = [float(row[key]) for row in rows if row[key]]
    return f"{sum(values) / len(values):.2f}" if values else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--run", nargs=2, metavar=("VARIANT", "SEED"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        return run(options.run[0], int(options.run[1]))
    if not options.table:
        known = (
            read_runs(RESULT, "settings: parameternet_50m, 5 epochs at 64 px, batch 128") if RESULT.is_file() else {}
        )
        wanted = [(v, s) for s in options.seeds for v in options.variants if (v, str(s)) not in known]
        with ThreadPoolExecutor(options.jobs) as pool:
            for variant, seed in pool.map(lambda one: _process(*one), wanted):
                collect(variant, seed)
    print(table())


def _process(variant: str, seed: int) -> tuple[str, int]:
    folder = folder_of(variant, seed)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder.with_suffix(".log"), "a") as log:
        subprocess.run([sys.executable, __file__, "--run", variant, str(seed)], cwd=ROOT, stdout=log, stderr=log,
                       env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    print(f"{variant}, seed {seed}: done", flush=True)
    return variant, seed


if __name__ == "__main__":
    main()
