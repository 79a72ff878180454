"""Read and write the checkpoints of a run: `last.ckpt` for resuming, `best.safetensors` for everything else."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from parameternet import files, weights
from parameternet.deprecation import moved
from parameternet.models.loading import BEST
from parameternet.training.errors import CheckpointError, FolderInUse

__all__ = ["BEST", "LAST", "claimed", "load_last", "save_last", "save_weights"]

LAST = "last.ckpt"
_MAGIC = b"parameternet-last-1 "  # then the SHA-256 of the rest, as 64 hexadecimal digits, and a newline
_HEADER = len(_MAGIC) + 65

__getattr__ = moved(__name__, {"read_weights": "parameternet.models.loading:read_tensors"})


def save_last(folder: Path, state: dict[str, Any]) -> None:
    """Write the state of a run to `last.ckpt` atomically.

    Args:
        state: tensors, numbers, text, lists and dictionaries.

    Raises:
        OSError: the file cannot be written; the old one is intact.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    payload = buffer.getbuffer()
    with files.atomic_write(folder / LAST) as file:
        file.write(_MAGIC + hashlib.sha256(payload).hexdigest().encode() + b"\n")
        file.write(payload)


def load_last(folder: Path) -> dict[str, Any]:
    """Read `last.ckpt` and verify its digest. Tensors are loaded to the CPU, with `weights_only=True`.

    Raises:
        CheckpointError: the file is missing, damaged, or in another format.
    """
    path = folder / LAST
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}; is {folder} a run folder?") from error
    payload = memoryview(content)[_HEADER:]
    if content[:_HEADER] != _MAGIC + hashlib.sha256(payload).hexdigest().encode() + b"\n":
        raise CheckpointError(f"{path} is damaged: its SHA-256 does not match; restore a copy or start again")
    return torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)


def save_weights(path: Path, state: dict[str, Tensor], config: dict[str, Any]) -> None:
    """Write weights as safetensors, with the network's config (timm's Hub format) in the metadata."""
    state = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    weights.save(state, path, {"config": json.dumps(config)})


@contextmanager
def claimed(lock: Path, what: str, timeout: float = 0.0) -> Iterator[None]:
    """Hold a lock file while the block runs; see `files.lock`.

    Raises:
        FolderInUse: another process, or another thread of this one, holds it.
    """
    with ExitStack() as held:
        try:
            held.enter_context(files.lock(lock, what, timeout=timeout))
        except files.Locked as error:
            raise FolderInUse(str(error)) from error
        yield
