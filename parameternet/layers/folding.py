"""Batch normalisation folded into the convolution before it: arithmetic on one pair of layers."""

import torch
from timm.layers import BatchNormAct2d, Conv2dSame, SyncBatchNormAct
from torch import nn

from .dynamic_conv import DynamicConv
from .static import DepthwiseConv

__all__ = ["can_fold", "fold_batch_norm"]


# Exact types: a subclass may compute something else from the same weights. One of DynamicConv tells by its `forward`.
CONVOLUTIONS = (nn.Conv2d, Conv2dSame, DepthwiseConv)
NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, BatchNormAct2d, SyncBatchNormAct)


def can_fold(conv: nn.Module, norm: nn.Module) -> bool:
    """Is `norm(conv(x))` the same as some `conv'(x)`, as far as the two layers tell?"""
    dynamic = isinstance(conv, DynamicConv) and type(conv).forward is DynamicConv.forward
    if not (dynamic or type(conv) in CONVOLUTIONS) or type(norm) not in NORMS:
        return False
    observed = any(m._forward_hooks or m._forward_pre_hooks or hasattr(m, "parametrizations") for m in (conv, norm))
    return norm.running_mean is not None and conv.out_channels == norm.num_features and not observed


@torch.no_grad()
def fold_batch_norm(conv: nn.Module, norm: nn.Module) -> nn.Module:
    """Scale the kernels of `conv`, every expert's alike, so that it gives what `norm` made of its output.

    Exact for any routing: the scale belongs to output channels and mixing is linear in the kernels. What normalisation
    adds is not mixed: it becomes `shift` of a DynamicConv and `bias` of a torch.nn.Conv2d. The running statistics are
    folded, whether the layers are in training mode or not, as timm's `reparameterize_model` has it.

    Returns:
        What is left to do after `conv`: nn.Identity, the activation of a BatchNormAct2d, or `norm` itself, and `conv`
        as it was, where the pair is none of these.
    """
    if not can_fold(conv, norm):
        return norm
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    start = -norm.running_mean.double() * scale
    if norm.bias is not None:
        start = start + norm.bias.double()
    experts = conv.weight.shape[0] // conv.out_channels
    _scale(conv.weight, scale.repeat(experts)[:, None, None, None])
    if isinstance(conv, DynamicConv):
        if conv.bias is not None:
            _scale(conv.bias, scale.repeat(experts))
        name, old = "shift", conv.shift
    else:
        name, old = "bias", conv.bias
    if old is not None:
        start = start + old.double() * scale
    setattr(conv, name, nn.Parameter(start.to(conv.weight.dtype), requires_grad=conv.weight.requires_grad))
    rest = [layer for layer in (getattr(norm, "drop", None), getattr(norm, "act", None)) if layer is not None]
    return (nn.Sequential(*rest) if rest else nn.Identity()).train(norm.training)


def _scale(parameter: nn.Parameter, scale: torch.Tensor) -> None:
    parameter.copy_(parameter.double() * scale)
