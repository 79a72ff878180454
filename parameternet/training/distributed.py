"""Run in one process or in several started by torchrun: rank, device and communication."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from parameternet import distributed
from parameternet.distributed import Place, agree_on_life, join, local_rank
from parameternet.training.errors import RecipeError

__all__ = ["Place", "agree_on_life", "choose_device", "place"]


@contextmanager
def place(device: str = "auto") -> Iterator[Place]:
    """Yield this process's `Place`, after joining the other processes if torchrun has set RANK and WORLD_SIZE."""
    chosen = choose_device(device, local_rank())
    with join(chosen, "nccl" if chosen.type == "cuda" else "gloo") as here:
        yield here


def choose_device(name: str, local_rank: int | None = None) -> torch.device:
    """Return a device like `parameternet.distributed.choose_device`, and make a CUDA device the current one.

    A CUDA device always has an index.

    Raises:
        RecipeError: torch cannot use the device.
    """
    try:
        device = distributed.choose_device(name, local_rank)
    except ValueError as error:
        raise RecipeError(str(error)) from error
    if device.type != "cuda":
        return device
    device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    torch.cuda.set_device(device)  # rejects a device without an index
    return device
