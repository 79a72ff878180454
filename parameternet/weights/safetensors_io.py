"""Read and save safetensors, with a digest of the tensors in the header."""

import hashlib
import io
import json
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import write_bytes
from .errors import WeightsDamaged, WeightsError, WeightsNotFound, mend
from .registry import FILE_NAME, is_recorded_pickle

__all__ = [
    "CONFIG_DIGEST",
    "DIGEST",
    "WRITER",
    "check_file",
    "conversion",
    "metadata",
    "read",
    "read_all",
    "read_bytes",
    "save",
    "tensors_digest",
    "text_digest",
]


DIGEST = "tensors_sha256"
CONFIG_DIGEST = "config_sha256"  # of the config in a file's header, which the digest of the tensors does not cover
WRITER = "parameternet"
_PICKLES = (b"PK\x03\x04", b"\x80")  # a torch.save archive, and a bare pickle of older versions


def read(path: str | Path, *sha256: str) -> dict[str, Tensor]:
    """Read a safetensors file to the CPU and verify it.

    The bytes are read once, so the bytes that are hashed are the bytes that are parsed.

    Args:
        path: The file.
        sha256: The file's expected digest, if known; any one of them, if several are given.

    Raises:
        WeightsNotFound: no such file.
        WeightsDamaged: not safetensors, truncated, or its content does not match `sha256` or its own digest.
        WeightsError: another format; the message has the command that converts it.
    """
    return read_all(path, *sha256)[0]


def read_all(path: str | Path, *sha256: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read tensors like `read`, and the header's metadata, from the same bytes."""
    path = Path(path).expanduser()
    data = read_bytes(path)
    check_file(path, data, *sha256)
    if is_recorded_pickle(sha256):
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True), {}
    tensors, words = _parse(path, data)
    _check_tensors(path, tensors, words, warn=not sha256)
    return tensors, words


def metadata(path: str | Path) -> dict[str, str]:
    """Return the metadata in a safetensors file's header: that passed to `save`, `tensors_sha256` and `writer`.

    Raises:
        WeightsNotFound, WeightsDamaged, WeightsError: as for `read`.
    """
    path = Path(path).expanduser()
    return _parse(path, read_bytes(path))[1]


def save(state_dict: Mapping[str, Tensor], path: str | Path, metadata: Mapping[str, Any] | None = None) -> None:
    """Write `state_dict` atomically as safetensors, with a digest of the tensors in the header.

    The same tensors and metadata always give the same bytes, and so the same SHA-256.

    Args:
        state_dict: Names to tensors, on any device.
        path: The file to write; its folder must exist.
        metadata: Further entries of the file's header; values are converted to text.
    """
    tensors = {name: _standalone(name, tensor) for name, tensor in state_dict.items()}
    words = {str(key): str(value) for key, value in (metadata or {}).items()}
    if "config" in words:
        words[CONFIG_DIGEST] = text_digest(words["config"])
    words |= {"format": "pt", "writer": WRITER, DIGEST: tensors_digest(tensors)}
    write_bytes(path, _serialise(tensors, words))


def tensors_digest(state_dict: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of tensors sorted by name: for each, a line of JSON `[name, dtype, shape]`, then its bytes.

    The digest does not depend on how the tensors are stored.
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
    """Return the SHA-256 of a text's UTF-8 bytes."""
    return hashlib.sha256(text.encode()).hexdigest()


def conversion(path: Path) -> str:
    """Return the command line that converts a PyTorch pickle to safetensors."""
    target = path.with_suffix(".safetensors") if path.suffix else path.with_name(FILE_NAME)
    return (
        f"""convert it with  {Path(sys.executable).name} -c "import torch; from parameternet import weights; """
        f"""weights.save(torch.load('{path}', weights_only=True), '{target}')" """.rstrip()
    )


def read_bytes(path: Path) -> bytes:
    """Return the file's content.

    Raises:
        WeightsNotFound: no such file.
        WeightsError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise WeightsNotFound(f"no such file: {path}") from None
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror or error}") from error


def check_file(path: Path, data: bytes, *sha256: str) -> None:
    """Raise `WeightsDamaged` if `data`, the content of `path`, matches none of `sha256`; pass if that is empty."""
    got = hashlib.sha256(data).hexdigest()
    if sha256 and got not in sha256:
        raise WeightsDamaged(
            f"{path} ({len(data):,} bytes) is not the recorded file: expected SHA-256 {' or '.join(sha256)}, got "
            f"{got}. {mend(path)}"
        )


def _standalone(name: str, tensor: Any) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise TypeError(
            f"a state dict maps names to tensors, but {name!r} is a {type(tensor).__name__}: "
            "if the checkpoint is nested, pass its inner dict"
        )
    return tensor.detach().cpu().contiguous().clone()  # safetensors rejects tensors that share memory


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
            f"{path} ({len(data):,} bytes) is not a complete safetensors file: {error}. {mend(path)}"
        ) from error


def _check_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str], warn: bool) -> None:
    recorded = metadata.get(DIGEST)
    if recorded is None and metadata.get("writer") == WRITER:
        raise WeightsDamaged(f"{path} was written with a digest of its tensors, which is now missing. {mend(path)}")
    if recorded is None:
        if warn:
            warnings.warn(
                f"{path} has no digest, so its tensors cannot be verified; parameternet.weights.save writes one",
                stacklevel=4,
            )
        return
    got = tensors_digest(tensors)
    if got != recorded:
        raise WeightsDamaged(
            f"the tensors in {path} are not those that were saved: expected digest {recorded}, got {got}. {mend(path)}"
        )
