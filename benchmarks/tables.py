"""Print README's tables of networks and checkpoints, as Markdown. A test holds README to them.

python benchmarks/tables.py
"""

import timm
import torch

import parameternet  # noqa: F401  registers the networks
from parameternet import weights
from parameternet.flops import count_flops

ORIGIN = {
    "parameternet_50m": "ours: GhostNet's stages at width 0.5",
    "parameternet_150m": "ours: GhostNet's stages at width 1.0",
    "parameternet_300m": "reconstruction",
    "parameternet_600m": "official",
}


def create(name: str, **kwargs) -> torch.nn.Module:
    with torch.device("meta"):
        return timm.create_model(name, num_classes=1000, **kwargs)


def parameters(model: torch.nn.Module) -> str:
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M"


def networks() -> list[str]:
    """A row a network: parameters with 4 experts and of the static twin, MACs at 224 px and 1,000 classes."""
    rows = []
    for name, origin in ORIGIN.items():
        model = create(name)
        flops = count_flops(model)
        static = parameters(create(name, dynamic=False))
        macs = f"{flops.total / 1e6:.1f} M | {flops.mixing / 1e6:.1f} M"
        rows.append(f"| `{name}` | {origin} | {parameters(model)} | {static} | {macs} |")
    return rows


def checkpoints() -> list[str]:
    """A row a checkpoint, from what its release measured."""
    rows = []
    for name in weights.known():
        config = weights.config(name)
        results, side = config["results"], config["pretrained_cfg"]["input_size"][-1]
        card = f"[`{name}`](weights/{name}/README.md)"
        rows.append(f"| {card} | Tiny-ImageNet | {side} px | {results['top1']:.2f} | {results['top5']:.2f} |")
    return rows


if __name__ == "__main__":
    print(*networks(), "", *checkpoints(), sep="\n")
