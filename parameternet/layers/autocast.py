"""What torch.autocast asks for."""

import torch

__all__ = ["autocast_dtype"]


def autocast_dtype(device: str) -> torch.dtype | None:
    """The dtype of torch.autocast where it is on for this kind of device, None where it is off or unknown."""
    # Some kinds of devices have no autocast at all, and must not be asked whether it is on.
    if device in ("cpu", "cuda") or torch.amp.is_autocast_available(device):
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return None
