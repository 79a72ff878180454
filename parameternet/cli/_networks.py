"""Names of networks, and networks without weights: what `list` and `info` have in common."""

import difflib
from pathlib import Path
from typing import Any

import click
import timm

from parameternet import weights
from parameternet.models import catalogue, loading
from parameternet.models.loading import Source

__all__ = ["config", "input_size", "names", "resolve", "top1", "whereabouts"]


def names() -> list[str]:
    """Every checkpoint, and every architecture that has none."""
    known = catalogue.checkpoints()
    listed = []
    for architecture in catalogue.architectures():
        tagged = [name for name in known if name.partition(".")[0] == architecture]
        listed += tagged or [architecture]
    return listed


def resolve(name: str) -> str:
    """`name` if it is one of ours; a usage error with the nearest names otherwise."""
    everything = [*catalogue.architectures(), *catalogue.checkpoints()]
    if name in everything:
        return name
    near = difflib.get_close_matches(name, everything, n=3, cutoff=0.5)
    raise click.UsageError(
        f"no network {name!r}" + (f"; closest: {', '.join(near)}" if near else "") + ". All of them: parameternet list"
    )


def config(source: Source) -> dict[str, Any]:
    """The config of a model; of a recorded checkpoint that is not on this machine, what the registry says."""
    if source.kind == "architecture" or source.name in weights.known():
        path = weights.local(source.name) if source.name in weights.known() else None
        beside = path.with_name(weights.CONFIG_NAME) if path else None
        return weights.read_config(beside) if beside and beside.is_file() else _registered(source.name)
    return loading.read_config(source)


def _registered(name: str) -> dict[str, Any]:
    architecture = name.partition(".")[0]
    cfg = timm.get_pretrained_cfg(name if name in timm.list_pretrained(architecture) else architecture)
    return {"architecture": architecture, "pretrained_cfg": cfg.to_dict() if cfg else {}}


def input_size(described: dict[str, Any]) -> tuple[int, int, int]:
    """Channels, height and width that the network is evaluated at."""
    cfg = described["pretrained_cfg"]
    return tuple(cfg.get("test_input_size") or cfg.get("input_size") or (3, 224, 224))


def top1(described: dict[str, Any]) -> float | None:
    """Measured accuracy in percent, as the checkpoint's config records it."""
    return (described.get("results") or {}).get("top1")


def whereabouts(source: Source) -> str | None:
    """Where the weights are: a path, a package, or the Hub; None for a network that has none."""
    name = source.name
    if source.kind == "file":
        return _short(source.path)
    if source.kind == "hub":
        return f"Hub: {name}"
    if source.kind == "dense":
        return f"Hub: {timm.get_pretrained_cfg(name).hf_hub_id}"
    if name in catalogue.upcycled():
        repository = catalogue.config(name)["upcycled_from"]
        return (
            f"package {weights.PACKAGED[repository].module}" if weights.packaged(repository) else f"Hub: {repository}"
        )
    if name not in weights.known():
        return None
    path = weights.local(name)
    return _short(path) if path else f"Hub: {weights.hub()}/{name}"


def _short(path: Path) -> str:
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
