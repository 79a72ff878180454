"""Replace a layer of a network by another one."""

from functools import lru_cache

import torch
from timm.layers import BatchNormAct2d, CondConv2d
from torch import nn

from .dynamic_conv import DynamicConv

__all__ = ["keep_marks", "replace_layer"]


def replace_layer(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` in the place of the submodule `name` of `model`, with the marks that others left on the old one."""
    model.set_submodule(name, keep_marks(model.get_submodule(name), new))


def keep_marks(old: nn.Module, new: nn.Module) -> nn.Module:
    """Copy to `new` what others wrote on `old`, and return `new`.

    Libraries write on the layers of a network: Ultralytics' rows carry `.f`, `.i`, `.type` and `.np`, by which its
    forward wires them. Whatever the layer did not set itself is copied, but for what `new` has set, too.
    """
    taken = {"forward", *_settings(), *vars(new), *new._parameters, *new._buffers, *new._modules}
    for mark, value in vars(old).items():
        if mark not in taken:
            setattr(new, mark, value)
    return new


@lru_cache(maxsize=1)
def _settings() -> frozenset[str]:
    """The attributes that replaceable layers set themselves."""
    with torch.device("meta"):  # which draws no random number
        layers = DynamicConv(1, 1), nn.Conv2d(1, 1, 1), CondConv2d(1, 1), BatchNormAct2d(1)
    return frozenset(name for layer in layers for name in vars(layer))
