"""Query and disable torch.autocast."""

from contextlib import AbstractContextManager, nullcontext

import torch

__all__ = ["autocast_dtype", "without_autocast"]


def autocast_dtype(device: str) -> torch.dtype | None:
    """Return torch.autocast's dtype for this device type; None if autocast is off or unsupported."""
    # Querying autocast raises for device types that do not support it.
    if device in ("cpu", "cuda") or torch.amp.is_autocast_available(device):
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return None


def without_autocast(device: str) -> AbstractContextManager:
    """Return a context that disables torch.autocast for this device type."""
    return nullcontext() if autocast_dtype(device) is None else torch.autocast(device, enabled=False)
