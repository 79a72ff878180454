"""Available checkpoints and their configs: recorded ones, and upcycled timm weights."""

from typing import Any

import timm

from .. import weights
from . import dynamic_timm

__all__ = ["architectures", "checkpoint", "checkpoints", "config", "is_ours", "upcycled"]


def architectures() -> list[str]:
    """Return every network of this package registered with timm."""
    return [name for name in timm.list_models() if is_ours(name)]


def is_ours(architecture: str) -> bool:
    """Return whether a network belongs to this package and is registered with timm."""
    return timm.is_model(architecture) and timm.model_entrypoint(architecture.partition(".")[0]).__module__.startswith(
        "parameternet."
    )


def upcycled() -> list[str]:
    """Return checkpoints whose weights are upcycled from a dense network in timm's own repositories."""
    return [name for name in timm.list_pretrained("dynamic_*") if name.partition(".")[0] in dynamic_timm.SOURCES]


def checkpoints() -> list[str]:
    """Return the name of every checkpoint, `architecture.tag`."""
    return sorted({*weights.known(), *upcycled()})


def checkpoint(architecture: str) -> str | None:
    """Return the default (first) checkpoint of an architecture; None if it has none."""
    return next((name for name in checkpoints() if name.partition(".")[0] == architecture), None)


def config(name: str) -> dict[str, Any]:
    """Return the config.json of a checkpoint; for an upcycled one, build it, with the dense network's accuracy.

    Raises:
        UnknownWeights: the checkpoint does not exist.
        WeightsNotFound, WeightsDamaged: as for `weights.config`.
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
