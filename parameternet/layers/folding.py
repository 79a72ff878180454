"""Batch normalisation folded into the convolution before it: arithmetic on one pair of layers."""

import torch
from timm.layers import BatchNormAct2d, Conv2dSame, SyncBatchNormAct
from torch import nn

from .altered import alteration
from .dynamic_conv import DynamicConv
from .replacing import keep_marks
from .static import CollapsedConv, CollapsedConvSame, DepthwiseConv

__all__ = ["can_fold", "fold_batch_norm", "why_not"]


# Exact types: a subclass may compute something else from the same weights. For DynamicConv, `forward` is compared.
CONVOLUTIONS = (nn.Conv2d, Conv2dSame, DepthwiseConv, CollapsedConv, CollapsedConvSame)
NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, BatchNormAct2d, SyncBatchNormAct)


def can_fold(conv: nn.Module, norm: nn.Module) -> bool:
    """Is `norm(conv(x))` the same as some `conv'(x)`, as far as the two layers tell?"""
    return why_not(conv, norm) is None


def why_not(conv: nn.Module, norm: nn.Module) -> str | None:
    """Why the two layers cannot be folded; None if they can."""
    dynamic = isinstance(conv, DynamicConv) and type(conv).forward is DynamicConv.forward
    for role, layer in (("the convolution", conv), ("the norm", norm)):
        altered = alteration(layer)
        if altered:
            return f"{role}: {altered}"
    if not (dynamic or type(conv) in CONVOLUTIONS):
        return f"does not follow a convolution that is known, but a {type(conv).__name__}"
    if type(norm) not in NORMS:
        return f"a {type(norm).__name__} may compute something else"
    if norm.running_mean is None or norm.running_var is None:
        return "normalises with the statistics of each batch"
    if conv.out_channels != norm.num_features:
        return f"{conv.out_channels} channels are normalised as {norm.num_features}"
    dtype = next(conv.parameters()).dtype
    if not _scale_and_start(norm)[0].to(dtype).isfinite().all():
        return f"its scale does not fit {dtype}"
    return None


def _scale_and_start(norm: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """(scale, start), float64, for which `norm(y)` is `scale * y + start`."""
    assert isinstance(norm, nn.BatchNorm2d | nn.SyncBatchNorm)
    assert norm.running_mean is not None and norm.running_var is not None
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    start = -norm.running_mean.double() * scale
    return scale, start if norm.bias is None else start + norm.bias.double()


@torch.no_grad()
def fold_batch_norm(conv: nn.Module, norm: nn.Module) -> nn.Module:
    """Scale the kernels of `conv`, equally for every expert, so that its output is that of `norm(conv(x))`.

    Exact for any routing: the scale belongs to output channels and mixing is linear in the kernels. What normalisation
    adds is not mixed: it becomes `output_bias` of a DynamicConv and `bias` of a torch.nn.Conv2d. The running statistics
    are folded in training mode too, as timm's `reparameterize_model` does.

    Returns:
        What is left to do after `conv`: nn.Identity, the activation of a BatchNormAct2d, or `norm` itself, and `conv`
        as it was, where the pair is none of these.
    """
    if not can_fold(conv, norm):
        return norm
    assert isinstance(conv, nn.Conv2d | DynamicConv)
    scale, start = _scale_and_start(norm)
    experts = conv.weight.shape[0] // conv.out_channels
    # New tensors, so that others that hold the old ones, or views of them, are not changed.
    conv.weight = _scaled(conv.weight, scale.repeat(experts)[:, None, None, None])
    if isinstance(conv, DynamicConv) and conv.bias is not None:
        conv.bias = _scaled(conv.bias, scale.repeat(experts))
    name = "output_bias" if isinstance(conv, DynamicConv) else "bias"
    old = getattr(conv, name)
    if old is not None:
        start = start + old.double() * scale
    setattr(conv, name, nn.Parameter(start.to(conv.weight.dtype), requires_grad=conv.weight.requires_grad))
    after = (getattr(norm, "drop", None), getattr(norm, "act", None))
    rest = [layer for layer in after if isinstance(layer, nn.Module)]
    return _in_place_of(norm, nn.Sequential(*rest) if rest else nn.Identity())


def _in_place_of(norm: nn.Module, rest: nn.Module) -> nn.Module:
    for name in ("num_features", "eps", "momentum", "affine", "track_running_stats"):  # which others may read
        setattr(rest, name, getattr(norm, name))
    return keep_marks(norm, rest).train(norm.training)


def _scaled(parameter: torch.Tensor, scale: torch.Tensor) -> nn.Parameter:
    return nn.Parameter((parameter.double() * scale).to(parameter.dtype), requires_grad=parameter.requires_grad)
