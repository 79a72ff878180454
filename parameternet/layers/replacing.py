"""Replace layers of a network."""

from functools import lru_cache

import torch
from timm.layers import BatchNormAct2d, CondConv2d
from torch import nn

from .dynamic_conv import DynamicConv

__all__ = ["keep_marks", "replace_layer"]


def replace_layer(model: nn.Module, name: str, new: nn.Module) -> None:
    """Replace the submodule `name` of `model` by `new`, keeping attributes that libraries set on the old one."""
    model.set_submodule(name, keep_marks(model.get_submodule(name), new))


def keep_marks(old: nn.Module, new: nn.Module) -> nn.Module:
    """Copy attributes that libraries set on `old` to `new`, and return `new`.

    Libraries set attributes on layers: Ultralytics' forward connects rows by their `.f`, `.i`, `.type` and `.np`.
    Copied are all attributes that the layer did not set itself, unless `new` has set them.
    """
    taken = {"forward", *_settings(), *vars(new), *new._parameters, *new._buffers, *new._modules}
    for mark, value in vars(old).items():
        if mark not in taken:
            setattr(new, mark, value)
    return new


@lru_cache(maxsize=1)
def _settings() -> frozenset[str]:
    """Return the attributes that replaceable layers set themselves."""
    with torch.device("meta"):  # on which no random numbers are drawn
        layers = DynamicConv(1, 1), nn.Conv2d(1, 1, 1), CondConv2d(1, 1), BatchNormAct2d(1)
    return frozenset(name for layer in layers for name in vars(layer))
