"""What torch.autocast asks for, and how to leave it."""

from contextlib import AbstractContextManager, nullcontext

import torch

__all__ = ["autocast_dtype", "without_autocast"]


def autocast_dtype(device: str) -> torch.dtype | None:
    """The dtype of torch.autocast where it is on for this kind of device, None where it is off or unknown."""
    # Some kinds of devices have no autocast at all, and must not be asked whether it is on.
    if device in ("cpu", "cuda") or torch.amp.is_autocast_available(device):
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return None


def without_autocast(device: str) -> AbstractContextManager:
    """A context in which torch.autocast is off for this kind of device."""
    return nullcontext() if autocast_dtype(device) is None else torch.autocast(device, enabled=False)
