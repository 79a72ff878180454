"""One process, or several started by torchrun: rank, device and communication."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from parameternet.distributed import Place, agree_on_life, join, local_rank
from parameternet.training.errors import RecipeError

__all__ = ["Place", "agree_on_life", "choose_device", "place"]


@contextmanager
def place(device: str = "auto") -> Iterator[Place]:
    """Yield this process's place, and join the others if torchrun has set RANK and WORLD_SIZE."""
    chosen = choose_device(device, local_rank())
    with join(chosen, "nccl" if chosen.type == "cuda" else "gloo") as here:
        yield here


def choose_device(name: str, local_rank: int | None = None) -> torch.device:
    """Return a device, for CUDA with its index; `auto` is the first accelerator, or the CPU.

    Args:
        local_rank: index of the GPU for `cuda`; None for the current one.

    Raises:
        RecipeError: torch cannot use the device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(f"cuda:{local_rank}" if name == "cuda" and local_rank is not None else name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise RecipeError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}; try device=cpu") from error
    if device.type != "cuda":
        return device
    device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    torch.cuda.set_device(device)  # rejects a device without an index
    return device
