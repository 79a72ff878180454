"""Support networks with their own `fuse` method, which handles only static convolutions."""

from typing import Any

from torch import nn

from ..layers import DynamicConv
from ..layers.folding import fold_batch_norm

__all__ = ["FuseDynamicFirst"]


class FuseDynamicFirst:
    """Fold batch norm into dynamic convolutions, then call the `fuse` of the network's own class.

    Ultralytics' networks, and others that follow YOLOv5, fold the `bn` of a block into its `conv`, drop it, and then
    use the block's `forward_fuse`. Their code cannot scale the kernels of several experts. This object replaces the
    method on the network that `upcycle` returns, and is included in its copies and checkpoints.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for module in self.model.modules():
            if isinstance(getattr(module, "conv", None), DynamicConv) and hasattr(module, "forward_fuse"):
                _fold(module)
        return type(self.model).fuse(self.model, *args, **kwargs)


def _fold(block: Any) -> None:
    if not hasattr(block, "bn"):
        return
    rest = fold_batch_norm(block.conv, block.bn)
    if not isinstance(rest, nn.Identity):
        raise ValueError(
            f"the batch norm of this {type(block).__name__} cannot be folded into its dynamic convolution: run the "
            "network without fuse()"
        )
    del block.bn
    block.forward = block.forward_fuse
