"""`dynamic_conv2d`: one kernel per sample, mixed from several experts.

For sample b, with routing weights alpha and expert kernels W_e: W_b = sum_e alpha_be W_e and y_b = W_b * x_b. The
experts are one 4-D tensor, expert-major: `weight[e * out : (e + 1) * out]` is the kernel of expert e. `dispatch.py`
chooses how the sum is computed, `strategies.py` computes it, `gradients.py` differentiates it.
"""

import warnings

import torch
from torch import Tensor

from .dispatch import STRATEGIES, convolve
from .strategies import ConvParams

__all__ = ["STRATEGIES", "dynamic_conv2d", "pair"]


def pair(value: int | tuple[int, ...]) -> tuple[int, int]:
    """Return (h, w) from one number or two."""
    if isinstance(value, int):
        return value, value
    h, w = value
    return int(h), int(w)


def dynamic_conv2d(
    x: Tensor,
    weight: Tensor,
    routing_weights: Tensor,
    bias: Tensor | None = None,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    strategy: str | None = None,
    output_bias: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """Convolve each sample with its own kernel, mixed from experts.

    Args:
        x: Input (B, in, H, W).
        weight: Kernels of all experts, expert-major, (E * out, in / groups, kh, kw).
        routing_weights: (B, E), any values; cast to the dtype of `weight`.
        bias: Biases of all experts, (E * out,), mixed like the kernels; or None.
        stride, padding, dilation: Numbers or (h, w) pairs; zeros are padded on both sides.
        groups: Groups of each sample's convolution.
        strategy: A name in `STRATEGIES`, used or rejected but never replaced; None: the fastest for this shape.
        output_bias: Added to the output of every sample, not mixed, (out,); or None.
        shift: Deprecated name of `output_bias`.

    Returns:
        (B, out, H', W'), with H' and W' as torch.nn.Conv2d has them. An empty batch gives an empty output.

    Raises:
        ValueError: Shapes, groups or the strategy do not match; the message shows the values.

    Backward mixes kernels again where that is faster or saves memory. Source: CondConv, arXiv:1904.04971; the
    expert-major 4-D weight is ours.
    """
    if shift is not None:
        output_bias = shift
    if not torch.jit.is_scripting():
        if shift is not None:
            warnings.warn("the argument shift is deprecated, use output_bias", DeprecationWarning, stacklevel=2)
        stride, padding, dilation = pair(stride), pair(padding), pair(dilation)
        if not torch.jit.is_tracing():
            _check(x, weight, routing_weights, bias, output_bias, groups)
    conv_params = ConvParams(stride, padding, dilation, groups)
    return convolve(x, weight, routing_weights, bias, conv_params, strategy, output_bias)


def _check(
    x: Tensor, weight: Tensor, routing_weights: Tensor, bias: Tensor | None, output_bias: Tensor | None, groups: int
) -> None:
    if x.ndim != 4:
        raise ValueError(f"x must be (batch, channels, height, width), got shape {tuple(x.shape)}")
    if weight.ndim != 4:
        raise ValueError(f"weight must be (experts * out, in / groups, kh, kw), got shape {tuple(weight.shape)}")
    if routing_weights.ndim != 2 or routing_weights.shape[0] != x.shape[0]:
        raise ValueError(
            f"routing_weights must be (batch, experts) with batch = {x.shape[0]}, got shape "
            f"{tuple(routing_weights.shape)}: one row for each sample of x"
        )
    experts = routing_weights.shape[1]
    if experts < 1 or weight.shape[0] % experts:
        raise ValueError(f"weight has {weight.shape[0]} kernels, which {experts} experts cannot share evenly")
    out = weight.shape[0] // experts
    if groups < 1 or x.shape[1] != weight.shape[1] * groups or out % groups:
        raise ValueError(
            f"x has {x.shape[1]} channels and each expert {out} kernels of {weight.shape[1]} channels, which "
            f"groups={groups} does not fit: channels must be {weight.shape[1]} * groups, "
            "and groups must divide the number of kernels"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be (experts * out,) = ({weight.shape[0]},), got {tuple(bias.shape)}")
    if output_bias is not None and output_bias.shape != (out,):
        raise ValueError(f"output_bias must be (out,) = ({out},), got {tuple(output_bias.shape)}")
