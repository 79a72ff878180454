"""Which checkpoints there are, and the config of each: those that are recorded, and timm's that are upcycled."""

from typing import Any

import timm

from .. import weights
from . import dynamic_timm

__all__ = ["architectures", "checkpoint", "checkpoints", "config", "is_ours", "upcycled"]


def architectures() -> list[str]:
    """Every network of this package that timm knows."""
    return [name for name in timm.list_models() if is_ours(name)]


def is_ours(architecture: str) -> bool:
    """Whether a network is one of this package, registered with timm."""
    return timm.is_model(architecture) and timm.model_entrypoint(architecture.partition(".")[0]).__module__.startswith(
        "parameternet."
    )


def upcycled() -> list[str]:
    """Checkpoints whose weights are those of a dense network in timm's own repositories."""
    return [name for name in timm.list_pretrained("dynamic_*") if name.partition(".")[0] in dynamic_timm.SOURCES]


def checkpoints() -> list[str]:
    """Every checkpoint, `architecture.tag`."""
    return sorted({*weights.known(), *upcycled()})


def checkpoint(architecture: str) -> str | None:
    """The checkpoint that an architecture's name alone means: its first one; None if it has none."""
    return next((name for name in checkpoints() if name.partition(".")[0] == architecture), None)


def config(name: str) -> dict[str, Any]:
    """The config.json of a checkpoint; of an upcycled one as it would be, with the dense network's figures.

    Raises:
        UnknownWeights: there is no such checkpoint.
        WeightsNotFound, WeightsDamaged: as `weights.config`.
    """
    if name in weights.known():
        return weights.config(name)
    if name not in upcycled():
        raise weights.UnknownWeights(weights.unknown(name, checkpoints()))
    architecture, _, tag = name.partition(".")
    cfg, source = timm.get_pretrained_cfg(name).to_dict(), dynamic_timm.SOURCES[architecture]
    results = {"top1": source.top1, "top5": source.top5, "data": "ImageNet-1k", "images": 50_000}
    return {
        "architecture": architecture,
        "num_classes": cfg["num_classes"],
        **dynamic_timm.labels(),
        "pretrained_cfg": {**cfg, "tag": tag},
        "upcycled_from": cfg["hf_hub_id"],
        "results": results,
    }
