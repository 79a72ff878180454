"""Fold batch normalisation into the convolution before it, for one pair of layers."""

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
    """Return whether `norm(conv(x))` equals some `conv'(x)`, judging by the two layers."""
    return why_not(conv, norm) is None


def why_not(conv: nn.Module, norm: nn.Module) -> str | None:
    """Return why the two layers cannot be folded; None if they can."""
    dynamic = isinstance(conv, DynamicConv) and type(conv).forward is DynamicConv.forward
    for role, layer in (("the convolution", conv), ("the norm", norm)):
        altered = alteration(layer)
        if altered:
            return f"{role}: {altered}"
    if not (dynamic or type(conv) in CONVOLUTIONS):
        return f"does not follow a known convolution, but a {type(conv).__name__}"
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
    """Return (scale, start), float64, so that `norm(y)` is `scale * y + start`."""
    assert isinstance(norm, nn.BatchNorm2d | nn.SyncBatchNorm)
    assert norm.running_mean is not None and norm.running_var is not None
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    start = -norm.running_mean.double() * scale
    return scale, start if norm.bias is None else start + norm.bias.double()


@torch.no_grad()
def fold_batch_norm(conv: nn.Module, norm: nn.Module) -> nn.Module:
    """Fold `norm` into `conv`, scaling every expert alike, so that its output is `norm(conv(x))`.

    Exact for any routing: the scale belongs to output channels and mixing is linear in the kernels. The shift of the
    normalisation is not mixed: it becomes `output_bias` of a DynamicConv or `bias` of a torch.nn.Conv2d. The running
    statistics are folded in training mode too, as timm's `reparameterize_model` does.

    Returns:
        The layer that remains after `conv`: nn.Identity, or the activation of a BatchNormAct2d. If the pair cannot be
        folded, `norm` itself, and `conv` is not changed.
    """
    if not can_fold(conv, norm):
        return norm
    assert isinstance(conv, nn.Conv2d | DynamicConv)
    scale, start = _scale_and_start(norm)
    experts = conv.weight.shape[0] // conv.out_channels
    # New tensors, because others may hold the old ones or views of them.
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
    for name in ("num_features", "eps", "momentum", "affine", "track_running_stats"):  # others may read it
        setattr(rest, name, getattr(norm, name))
    return keep_marks(norm, rest).train(norm.training)


def _scaled(parameter: torch.Tensor, scale: torch.Tensor) -> nn.Parameter:
    return nn.Parameter((parameter.double() * scale).to(parameter.dtype), requires_grad=parameter.requires_grad)
