"""How should a router read, start and answer, so that experts pay? One change at a time on the recipe of the claim.

    python benchmarks/routers.py                      missing runs of the first seed, then the table
    python benchmarks/routers.py --variants A B --seeds 0 1 2 --jobs 2
    python benchmarks/routers.py --table              what was measured

Every variant is ParameterNet-50M of configs/train/parameternet_50m_claim.yaml with its routers replaced by a `Probe` of
this file, so that the table can be made again whatever the package's default is. The static baseline and the package's
own routers are rows of `benchmarks/compare.py claim`. Runs are folders in runs/routers,
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
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from _timing import ROOT, add_run, header, read_csv, read_runs
from timm.models import register_model
from torch import Tensor, nn

from parameternet.layers import DynamicConv, Router

RECIPE = ROOT / "configs" / "train" / "parameternet_50m_claim.yaml"
RESULT = ROOT / "benchmarks" / "results" / "routers.csv"
COLUMNS = ("top1", "top5", "train_loss", "top1_mean", "top1_shares", "top1_sum", "experts", "spread")
L2 = {"norm": "l2", "start": 0.0}
RUNNING = {"norm": "running", "start": 0.0}
CENTRED = {"norm": "centred", "start": 0.0}
HIDDEN = {"start": None, "hidden": True}
# Arguments of `Probe`, and besides: `recipe`, fields of the recipe; `gate`, `Gated` convolutions; `draw`, a factor of
# the experts at the start; `first`, the first dynamic stage; others are arguments of parameternet_50m.
VARIANTS: dict[str, dict[str, Any]] = {
    "static, output gates": {"dynamic": False, "gate": True},
    "default of 0.1.0": {"norm": None, "start": None},
    "default of 0.1.0, clip 1": {"norm": None, "start": None, "recipe": {"clip_grad": 1.0}},
    "l2": L2,
    "l2, 1 expert": {**L2, "num_experts": 1},
    "l2, lr 6e-3": {**L2, "recipe": {"lr": 6e-3}},
    "l2, clip 1": {**L2, "recipe": {"clip_grad": 1.0}},
    "l2, near-zero start": {**L2, "start": 0.02},
    "l2, drawn start": {**L2, "start": 1.0},
    "l2, x 4": {**L2, "scale": 4.0},
    "l2, x 4, 1 expert": {**L2, "scale": 4.0, "num_experts": 1},
    "l2, experts / 2": {**L2, "draw": 0.5},
    "l2, experts x 2": {**L2, "draw": 2.0},
    "l2, static blended in": {**L2, "blend": 780},
    "l2, last stages": {**L2, "first": 6},
    "l2, softmax": {**L2, "act": "softmax"},
    "l2, softmax, from 30": {**L2, "act": "softmax", "cool": 780},
    "l2, softmax x 4": {**L2, "act": "softmax", "scale": 4.0},
    "l2, softmax x gain": {**L2, "act": "softmax_gain"},
    "l2, softmax, output gates": {**L2, "act": "softmax", "gate": True},
    "l2, hidden": {**L2, **HIDDEN},
    "l2, hidden, 1 expert": {**L2, **HIDDEN, "num_experts": 1},
    "l2, hidden, softmax x gain": {**L2, **HIDDEN, "act": "softmax_gain"},
    "rms": {"norm": "rms", "start": 0.0},
    "rms, hidden": {"norm": "rms", **HIDDEN},
    "layernorm / sqrt(C)": {"norm": "layernorm", "start": 0.0},
    "layernorm / sqrt(C), 1 expert": {"norm": "layernorm", "start": 0.0, "num_experts": 1},
    "layernorm / sqrt(C), softmax x gain": {"norm": "layernorm", "start": 0.0, "act": "softmax_gain"},
    "layernorm / sqrt(C), x 4": {"norm": "layernorm", "start": 0.0, "scale": 4.0},
    "layernorm / sqrt(C), hidden": {"norm": "layernorm", **HIDDEN},
    "layernorm, hidden": {"norm": "layernorm_unit", **HIDDEN},
    "layernorm / sqrt(C), softmax": {"norm": "layernorm", "start": 0.0, "act": "softmax"},
    "running": RUNNING,
    "running, x 4": {**RUNNING, "scale": 4.0},
    "running, drawn start": {**RUNNING, "start": 1.0},
    "centred": CENTRED,
    "centred, drawn start": {**CENTRED, "start": 1.0},
    "raw / sqrt(C), zero start": {"norm": None, "start": 0.0, "scale": None},
    "raw, zero start": {"norm": None, "start": 0.0},
    "raw, hidden": {"norm": None, **HIDDEN},
    "raw, hidden, 1 expert": {"norm": None, **HIDDEN, "num_experts": 1},
}


class Normalise(nn.Module):
    """Pooled vectors (B, C) of length 1 (l2, layernorm, running) or of root mean square 1 (rms, layernorm_unit).

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
        if self.norm == "layernorm_unit":
            return nn.functional.layer_norm(p, p.shape[1:])
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
        scale: Multiplies the normalised vector; None: 1 / sqrt(channels). Under Adam this is a learning rate of the
            last layer so many times higher.
        blend: Steps over which routing goes from the first expert alone to the router's own weights (KernelWarehouse).
        cool: Steps over which the temperature of softmax falls from 30 to 1 (dynamic convolution, ODConv).
    """

    def __init__(
        self, channels, num_experts, norm=None, start=None, act="sigmoid", hidden=False, scale=1.0, blend=0, cool=0
    ) -> None:
        super().__init__(channels, num_experts, "sigmoid", norm=None)
        self.normalise, self.act, self.factor = Normalise(channels, norm), act, scale or channels**-0.5
        self.blend, self.cool = blend, cool
        width = max(16, channels // 16) if hidden else channels
        self.body = nn.Sequential(nn.Linear(channels, width), nn.ReLU()) if hidden else nn.Identity()
        self.out = nn.Linear(width, num_experts + (act == "softmax_gain"))
        del self.weight, self.bias
        self.register_buffer("steps", torch.zeros(()))
        if start is not None:
            nn.init.normal_(self.out.weight, std=start) if start else nn.init.zeros_(self.out.weight)
            nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.steps += 1
        logits = self.out(self.body(self.normalise(x.float().mean((2, 3))) * self.factor))
        if self.cool:
            logits = logits / (1 + 29 * (1 - self.steps / self.cool).clamp_min(0))
        weights = self._activate(logits)
        if self.blend:
            first = nn.functional.one_hot(torch.zeros(len(x), dtype=torch.long), weights.shape[1])
            weights = weights.lerp(first.to(weights.dtype), float((1 - self.steps / self.blend).clamp_min(0)))
        return weights

    def _activate(self, logits: Tensor) -> Tensor:
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
def probe_parameternet_50m(pretrained=False, pretrained_cfg=None, probe="l2", **kwargs) -> nn.Module:
    changes = {key: value for key, value in VARIANTS[probe].items() if key != "recipe"}
    router = {key: changes.pop(key) for key in _PROBE if key in changes}
    gate, draw, first_stage = (changes.pop(key, start) for key, start in (("gate", False), ("draw", 1), ("first", 0)))
    model = timm.create_model("parameternet_50m", **kwargs, **changes)
    for name, conv in [(n, m) for n, m in model.named_modules() if isinstance(m, DynamicConv)]:
        if first_stage and (not name.startswith("blocks.") or int(name.split(".")[1]) < first_stage):
            _replace(model, name, _static(conv))
        else:
            conv.routing = Probe(conv.in_channels, conv.num_experts, **router)
            conv.weight.data *= draw
    if gate:
        _gate(model, router.get("norm") or "l2")
    model.pretrained_cfg = model.default_cfg = {**model.pretrained_cfg, "architecture": "probe_parameternet_50m"}
    if pretrained:
        model.load_state_dict(pretrained_cfg["state_dict"])
    return model


_PROBE = ("norm", "start", "act", "hidden", "scale", "blend", "cool")


def _static(conv: DynamicConv) -> nn.Module:
    shape = (conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation)
    return nn.Conv2d(*shape, conv.groups, bias=False)


def _gate(model: nn.Module, norm: str) -> None:
    """Put gates where the dynamic network has dynamic convolutions."""
    places = timm.create_model("parameternet_50m").named_modules()
    for name in [name for name, module in places if isinstance(module, DynamicConv)]:
        _replace(model, name, Gated(model.get_submodule(name), norm))


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


# a run ----------------------------------------------------------------------------------------------------------------


def run(variant: str, seed: int) -> None:
    """Train, ablate, and leave both in the run folder."""
    from parameternet.training import load_recipe
    from parameternet.training import run as train

    folder = folder_of(variant, seed)
    changes = {"seed": seed, "model_kwargs": {"probe": variant}, **VARIANTS[variant].get("recipe", {})}
    sets = ["model=probe_parameternet_50m", *(f"{key}={json.dumps(value)}" for key, value in changes.items())]
    train(load_recipe(RECIPE, sets), folder)
    if VARIANTS[variant].get("dynamic", True):
        (folder / "ablation.json").write_text(json.dumps(ablate(folder)))


def ablate(folder: Path) -> dict[str, float]:
    """Top-1 with routing replaced by means, and how routing varies, on the validation images."""
    from parameternet.layers.recording import record_routing_weights
    from parameternet.routing import ablate as measure
    from parameternet.training import load_recipe, validate

    data, measuring, recordings = load_recipe(RECIPE).val, {"workers": 0, "device": "cpu"}, []

    @contextmanager
    def keep(network: nn.Module) -> Iterator[None]:
        with record_routing_weights(network) as recording:
            recordings.append(recording)
            yield

    rows = {row.routing: row.top1 for row in measure(folder, data, without_experts=False, **measuring)}
    trained = float(read_csv(folder / "history.csv")[1][-1]["top1"])
    if abs(rows["own"] - trained) > 0.5:
        raise SystemExit(f"{folder} has top-1 {rows['own']} now, and had {trained} after training")
    validate(folder, data, around=keep, **measuring)
    weights = [torch.cat(calls) for calls in recordings[0].calls.values()]
    shares = [rows / rows.sum(1, keepdim=True) for rows in weights]
    entropy = torch.stack([-(s * s.clamp_min(1e-9).log()).sum(1).mean() for s in shares])
    return {
        "top1_own": rows["own"],
        "top1_mean": rows["mean weights"],
        "top1_shares": rows["mean sum"],
        "top1_sum": rows["mean shares"],
        "experts": float(entropy.exp().mean()),
        "spread": float(torch.stack([s.std(0).mean() for s in shares]).mean()),
    }


def folder_of(variant: str, seed: int) -> Path:
    words = "".join(c if c.isalnum() else "_" for c in variant)
    return ROOT / "runs" / "routers" / f"{words}-{seed}"


def collect(variant: str, seed: int) -> None:
    folder = folder_of(variant, seed)
    rows = read_csv(folder / "history.csv")[1] if (folder / "history.csv").is_file() else []
    path = folder / "ablation.json"
    found = json.loads(path.read_text()) if path.is_file() else {}
    if len(rows) != 5 or (not found and VARIANTS[variant].get("dynamic", True)):
        return
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
