"""Load a model by name or path, in the same way for every command, recipe field and Python call.

>>> load("parameternet_50m.tin200").config["num_classes"]
200

The same text means the same model everywhere, whatever the current folder contains. Every known digest is verified
before a tensor reaches a network, and configs are restricted to an allow-list of keys.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import timm
from torch import Tensor, nn

from .. import weights
from ..text import address_error, printable
from . import catalogue, dynamic_timm
from .builder import build_from_config, buildable

__all__ = [
    "LoadedModel",
    "Source",
    "load",
    "parse_source",
    "read_config",
    "read_tensors",
    "refuse_dense",
    "weights_file",
]

BEST = "best.safetensors"  # of a run folder
KINDS = (
    "a checkpoint (parameternet_50m.tin200), an architecture that has one, a run folder, a folder with "
    f"{weights.FILE_NAME} and {weights.CONFIG_NAME}, a .safetensors file, local-dir:DIR or hf-hub:ORG/NAME[@REV]"
)


@dataclass(frozen=True)
class Source:
    """The location of a model.

    kind: 'checkpoint' (recorded, or timm's weights upcycled), 'dense' (timm's own), 'architecture' (registered,
        without weights), 'hub', or 'file' (a folder, a run folder, or a weights file).
    name: The full name of a checkpoint or architecture, or ORG/NAME[@REV]; for a file, its path.
    path: The weights file of kind 'file'.
    """

    text: str
    kind: str
    name: str
    path: Path | None = None

    @property
    def architecture(self) -> str | None:
        """Return the registered architecture, if the name contains it."""
        return self.name.partition(".")[0] if self.kind in ("checkpoint", "dense", "architecture") else None

    @property
    def path_name(self) -> str | None:
        """Return the name of the folder or file without its parent folders; None for other kinds."""
        given = self.text.removeprefix("local-dir:")
        return Path(given).expanduser().absolute().name if self.kind == "file" else None


class LoadedModel(NamedTuple):
    """A network in evaluation mode, its config in timm's Hub layout, and whether a digest verified its weights."""

    model: nn.Module
    config: dict[str, Any]
    verified: bool


# ---------------------------------------------------------------------------------------------------------------------
# From text to a location
# ---------------------------------------------------------------------------------------------------------------------


def parse_source(text: str | Path | Source) -> Source:
    """Return the location of the model that `text` names.

    Names with weights take precedence over folders and files; `./NAME` is always a path.

    Args:
        text: A checkpoint `architecture.tag`, of this package or of timm; an architecture (its first checkpoint); a run
            folder; a folder with model.safetensors and config.json; a .safetensors file; `local-dir:DIR`;
            `hf-hub:ORG/NAME[@REV]`. A `Path` is always a path.

    Raises:
        UnknownWeights: no such name; the message suggests the closest names.
        WeightsNotFound: no such file, or a folder without weights.
        WeightsError: a file in another format.
    """
    if isinstance(text, Source):
        return text
    if isinstance(text, Path):
        return _place(str(text), text)
    for prefix in ("hf-hub:", "hf_hub:"):
        if text.startswith(prefix):
            return _repository(text, text.removeprefix(prefix))
    if text.startswith("local-dir:"):
        return _place(text, Path(text.removeprefix("local-dir:")))
    return _registered(text) or _place(text, Path(text))


def _repository(text: str, name: str) -> Source:
    if name.partition("@")[0].count("/") != 1:
        raise weights.WeightsNotFound(f"a Hub repository must be given as hf-hub:ORG/NAME[@REV], got {printable(text)}")
    return Source(text, "hub", name)


def _registered(text: str) -> Source | None:
    name = catalogue.checkpoint(text) or text
    if name in catalogue.checkpoints():
        return Source(text, "checkpoint", name)
    if _is_timms(text):
        return Source(text, "dense", text)
    if text in catalogue.architectures() and not Path(text).exists():
        return Source(text, "architecture", text)
    return None


def _is_timms(name: str) -> bool:
    architecture = name.partition(".")[0]
    if not timm.is_model(architecture) or catalogue.is_ours(architecture):
        return False
    return name == architecture or name in timm.list_pretrained(architecture)


def _place(text: str, path: Path) -> Source:
    path = path.expanduser()
    if not path.exists():
        raise _nowhere(text, path)
    if not path.is_dir():
        if path.suffix.lower() != ".safetensors":
            raise weights.WeightsError(_other_format(path))
        return Source(text, "file", str(path), path)
    for name in (BEST, weights.FILE_NAME):
        if (path / name).is_file():
            return Source(text, "file", str(path), path / name)
    weights.read_config(path / weights.CONFIG_NAME)  # for an empty folder, report the missing config first
    raise weights.no_weights_in(path)


def _nowhere(text: str, path: Path) -> weights.WeightsNotFound:
    shown = printable(text)
    if address := address_error(text):
        return weights.WeightsNotFound(f"{address}; for a Hub repository, use hf-hub:ORG/NAME")
    if text.startswith("local-dir:") or path.name != text or path.suffix == ".safetensors":
        what = "file" if path.suffix == ".safetensors" else "folder or file"
        return weights.WeightsNotFound(
            f"no weights at {printable(str(path))}: no such {what}. {shown!r} is not a folder, a file or a registered "
            f"name; use {KINDS}"
        )
    names = [*catalogue.checkpoints(), *timm.list_models()]
    near = difflib.get_close_matches(text, names, n=2) or difflib.get_close_matches(text.partition(".")[0], names, n=2)
    return weights.UnknownWeights(
        f"{shown!r} is not a folder, a file or the name of a model, and no weights are recorded for {shown}"
        + (f"; closest: {', '.join(near)}" if near else "")
        + f". Use {KINDS}; `parameternet list` shows the names"
    )


def _other_format(path: Path) -> str:
    return (
        f"{printable(str(path))} is not a .safetensors file; other formats are rejected because they can run code. "
        f"If it is a PyTorch checkpoint, {weights.conversion(path)}"
    )


# ---------------------------------------------------------------------------------------------------------------------
# From a location to a config and tensors
# ---------------------------------------------------------------------------------------------------------------------


def load(source: str | Path | Source, *, dense: bool = False, architecture: str | None = None) -> LoadedModel:
    """Load a network with verified weights, in evaluation mode.

    Args:
        source: As for `parse_source`.
        dense: Also accept timm's own networks, not only those of this package.
        architecture: timm's name of the network, for a file that has no config.

    Returns:
        The network, its config, and whether a digest verified the weights: the recorded one, the Hub's, or the one
        that `weights.save` writes to the header.

    Raises:
        UnknownWeights, WeightsNotFound: no such model; the message lists the accepted kinds of models.
        WeightsDamaged: weights or config are invalid, or contradict each other.
        ValueError: the weights are of a timm network, and `dense` is False.
    """
    source = parse_source(source)
    if not dense:
        refuse_dense(source)
    tensors, words, verified = _read(source)
    config = _config(source, words, tensors, architecture)
    if not dense and not catalogue.is_ours(config["architecture"]):
        raise ValueError(f"{printable(config['architecture'])} is not a network of this package: use timm instead")
    tensors = _under_timms_names(source, tensors)
    with buildable(config, f"the config or the weights of {printable(source.text)}"):
        return LoadedModel(build_from_config(config, state_dict=tensors).eval(), config, verified)


def refuse_dense(source: Source) -> None:
    """Reject timm's own networks where only networks of this package are accepted.

    Raises:
        UnknownWeights: the source is a timm network.
    """
    if source.kind == "dense":
        raise weights.UnknownWeights(
            f"no weights are recorded for {source.name} in this package: it is a dense timm network. "
            f"`parameternet upcycle {source.name} -o DIR` converts it to a dynamic one"
        )


def weights_file(source: Source) -> tuple[Path, tuple[str, ...]]:
    """Return the weights file of a source, downloaded if necessary, and the SHA-256 digests accepted for it, if known.

    Pass both to `weights.read_all`, which verifies the file.

    Raises:
        UnknownWeights, WeightsNotFound: as for `load`.
    """
    return weights.locate(_location(source))


def read_tensors(source: str | Path | Source) -> dict[str, Tensor]:
    """Return the verified tensors of a model, with timm's names.

    Raises:
        UnknownWeights, WeightsNotFound, WeightsDamaged: as for `load`.
    """
    source = parse_source(source)
    return _under_timms_names(source, _read(source)[0])


def read_config(source: str | Path | Source) -> dict[str, Any]:
    """Return the config of a model in timm's Hub layout, without building it; a local weights file is verified.

    A file's own metadata takes precedence over the config.json next to it.

    Raises:
        UnknownWeights, WeightsNotFound, WeightsDamaged: as for `load`.
    """
    source = parse_source(source)
    words = weights.read_all(source.path)[1] if source.kind == "file" else {}
    return _config(source, words)


def _read(source: Source) -> tuple[dict[str, Tensor], dict[str, str], bool]:
    """Return the tensors, the metadata in the file's header, and whether a digest verified the tensors."""
    path, sha256 = weights_file(source)
    tensors, words = weights.read_all(path, *sha256)
    return tensors, words, bool(sha256) or weights.DIGEST in words


def _under_timms_names(source: Source, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename a package's tensors to timm's names; for an upcycled checkpoint, to the names of the dense network."""
    upcycled = dynamic_timm.SOURCES.get(source.architecture or "")
    architecture = upcycled.name if upcycled else source.architecture
    return dynamic_timm.by_order(tensors, architecture) if architecture else tensors


def _location(source: Source) -> Mapping[str, Any]:
    """Return the location of the weights, as arguments of `weights.locate`."""
    if source.kind == "architecture":
        raise weights.UnknownWeights(weights.unknown(source.name, catalogue.checkpoints()))
    if source.kind == "file":
        return {"file": str(source.path)}
    if source.kind == "hub":
        return {"source": "hf-hub", "hf_hub_id": source.name}
    if source.name in weights.known():
        architecture, _, tag = source.name.partition(".")
        return {"architecture": architecture, "tag": tag}
    return {"hf_hub_id": _config(source, {})["pretrained_cfg"]["hf_hub_id"]}


def _config(
    source: Source, words: Mapping[str, str], tensors: Mapping[str, Tensor] | None = None, named: str | None = None
) -> dict[str, Any]:
    """Return the config of a source: the file's own metadata, or else `config.json`.

    Raises:
        WeightsDamaged: they contradict each other, or one is invalid.
        WeightsNotFound: neither exists.
    """
    if source.kind == "checkpoint":
        found = catalogue.config(source.name)
        cfg = {**found["pretrained_cfg"], "tag": source.name.partition(".")[2]}
        separate, place = {**found, "pretrained_cfg": cfg}, f"the config.json of {source.name}"
    elif source.kind == "hub":
        separate, place = weights.config(f"hf-hub:{source.name}"), f"the config.json of {source.text}"
    elif source.kind == "file":
        path = source.path.with_name(weights.CONFIG_NAME)
        separate, place = weights.read_config(path) if path.is_file() else None, str(path)
    else:
        return _of_timm(source.name)
    own, header = _embedded(source, words), f"the header of {source.path or source.text}"
    if own and separate:
        _check_agree(own, separate, header, place)
    config = own or separate
    if named and config:
        _check_agree({**config, "architecture": named}, config, "the given arguments", header)
    if named and not config:
        return _of_architecture(source, named, tensors or {})
    if config is None:
        raise weights.WeightsNotFound(
            f"{source.path} does not say which network it is for: its header has no config, and there is no {place}. "
            f"Put {weights.CONFIG_NAME} next to it, or for upcycle pass --architecture, one of timm.list_models()"
        )
    return config


def _embedded(source: Source, words: Mapping[str, str]) -> dict[str, Any] | None:
    """Return the config in a file's header, verified by its digest if there is one."""
    if "config" not in words:
        return None
    where = f"the config in the header of {source.path or source.text}"
    recorded = words.get(weights.CONFIG_DIGEST)
    if recorded and recorded != weights.text_digest(words["config"]):
        raise weights.WeightsDamaged(f"{where} does not match its digest. Download or copy the file again")
    return weights.parse_config(words["config"], where)


def _check_agree(own: dict[str, Any], separate: dict[str, Any], header: str, place: str) -> None:
    facts: dict[str, Callable[[dict[str, Any]], Any]] = {
        "architecture": lambda config: config["architecture"],
        "num_classes": lambda config: config.get("num_classes") or config["pretrained_cfg"].get("num_classes"),
        "label_names": lambda config: config.get("label_names") or config["pretrained_cfg"].get("label_names"),
    }
    for key, get in facts.items():
        one, other = get(own), get(separate)
        if one is not None and other is not None and one != other:
            raise weights.WeightsDamaged(
                f"{key} is {_short(one)} in {header}, but {_short(other)} in {place}: they describe different models. "
                "Remove the one that is wrong"
            )


def _short(value: Any) -> str:
    text = printable(repr(value))
    return text if len(text) <= 80 else f"{text[:80]}…"


def _of_timm(name: str) -> dict[str, Any]:
    """Return the config of a timm network or an architecture of this package, from timm's registry."""
    architecture = name.partition(".")[0]
    cfg = timm.get_pretrained_cfg(name)
    cfg = cfg.to_dict() if cfg else {}
    if not catalogue.is_ours(architecture) and not cfg.get("hf_hub_id"):
        raise weights.WeightsNotFound(f"timm has no weights for {name} on the Hub; give your own file or folder")
    config = {"architecture": architecture, "pretrained_cfg": {**cfg, "url": ""}}
    if "num_classes" in cfg:
        config["num_classes"] = cfg["num_classes"]
    of_imagenet = cfg.get("num_classes") == 1000 and "in1k" in (cfg.get("tag") or "")
    return {**config, **(dynamic_timm.labels() if of_imagenet else {})}


def _of_architecture(source: Source, name: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return a config for a file without one, for the architecture named by the caller."""
    if not timm.is_model(name):
        raise ValueError(f"{source.path} does not say which network it is for, and timm has no model {name!r}")
    cfg = timm.get_pretrained_cfg(name)
    cfg = cfg.to_dict() if cfg else {}
    classifier = f"{cfg.get('classifier')}.weight"
    classes = len(tensors[classifier]) if classifier in tensors else cfg.get("num_classes", 1000)
    return {"architecture": name, "num_classes": classes, "pretrained_cfg": {**cfg, "num_classes": classes}}
