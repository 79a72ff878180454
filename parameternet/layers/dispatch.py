"""Choose the strategy and the execution path of a dynamic convolution: compiled, traced, autograd or inference.

`STRATEGIES` is the table of strategies. `choose_strategy` picks one by shape, `check_strategy` rejects one that does
not support the convolution, and `convolve` runs it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from . import triton_depthwise
from .autocast import autocast_dtype, without_autocast
from .compiled import compiles_for_python, make_operator, records_a_graph
from .gradients import MixedConvolution, gains_by_float32_gradients, gains_by_own_gradient
from .strategies import (
    ConvParams,
    are_few,
    are_few_in_half,
    batched_matmul,
    batched_matmul_in_parts,
    gated_inputs,
    gated_outputs,
    grouped,
    grouped_in_parts,
    is_depthwise,
    is_pointwise,
    kernels_are_large,
    mix,
    runs_channels_last,
    runs_natively,
    shifted,
    wide,
)

__all__ = ["STRATEGIES", "Strategy", "check_strategy", "choose_strategy", "convolve"]

Forward = Callable[[Tensor, Tensor, Tensor, Tensor | None, ConvParams], Tensor]


@dataclass(frozen=True)
class Strategy:
    """A way to compute y_b = (sum_e alpha_be W_e) * x_b.

    forward: `(x, weight, routing_weights, output_bias, conv_params) -> y` in differentiable, traceable operations.
    forward_inference: The same, for when neither gradients nor a graph are needed.
    takes: Supported convolutions: 'all', 'pointwise' or 'depthwise', as checked by `check_strategy`.
    keeps_kernels: Backward needs the mixed kernels of all samples, which can be kept or mixed again.
    """

    forward: Forward
    forward_inference: Forward
    takes: str = "all"
    keeps_kernels: bool = False

    def __call__(self, *arguments) -> Tensor:
        return self.forward(*arguments)


STRATEGIES = {
    "grouped": Strategy(grouped, grouped_in_parts, keeps_kernels=True),
    "batched_matmul": Strategy(batched_matmul, batched_matmul_in_parts, "pointwise", keeps_kernels=True),
    "gated_inputs": Strategy(gated_inputs, gated_inputs, "pointwise"),
    "gated_outputs": Strategy(gated_outputs, gated_outputs, "pointwise"),
    "shifted": Strategy(shifted, shifted, "depthwise"),
    "wide": Strategy(wide, wide),
}


# ---------------------------------------------------------------------------------------------------------------------
# Strategy
# ---------------------------------------------------------------------------------------------------------------------


def check_strategy(strategy: str, weight: Tensor, padding: tuple[int, int], groups: int, num_experts: int) -> None:
    """Reject a strategy that cannot compute this convolution.

    Raises:
        ValueError: An unknown name, or a strategy that does not support this kind of convolution.
    """
    takes = _takes_scripted(strategy) if torch.jit.is_scripting() else _takes(strategy)
    if takes == "pointwise" and not is_pointwise(weight, padding, groups):
        raise ValueError(
            f"strategy '{strategy}' takes only 1 x 1 kernels without padding and groups, got kernels of "
            f"{weight.shape[2]} x {weight.shape[3]}, padding={padding}, groups={groups}; try 'grouped'"
        )
    if takes == "depthwise" and not is_depthwise(weight, groups, num_experts):
        raise ValueError(
            f"strategy '{strategy}' takes only depthwise kernels, in = out = groups, got {weight.shape[1] * groups} "
            f"channels in, {weight.shape[0] // num_experts} out, groups={groups}; try 'grouped'"
        )


@torch.jit.unused
def _takes(strategy: str) -> str:
    if strategy not in STRATEGIES:
        raise ValueError(f"unknown strategy '{strategy}'; there are {', '.join(STRATEGIES)}")
    return STRATEGIES[strategy].takes


def _takes_scripted(strategy: str) -> str:
    """Return the column `takes` from a chain of ifs: TorchScript cannot read a table of functions."""
    if strategy == "batched_matmul" or strategy == "gated_inputs" or strategy == "gated_outputs":
        return "pointwise"
    if strategy == "shifted":
        return "depthwise"
    if strategy != "grouped" and strategy != "wide":
        raise ValueError(f"unknown strategy '{strategy}'")
    return "all"


def choose_strategy(
    x: Tensor,
    weight: Tensor,
    routing_weights: Tensor,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    groups: int = 1,
    recorded: bool = False,
) -> str:
    """Return the name of the fastest strategy.

    `recorded`: A graph is being recorded. It must not depend on the image size, nor on the batch size if that is
    dynamic.
    """
    one = routing_weights.shape[1] == 1  # 'wide' is then a static convolution whose output is scaled
    if one and recorded:
        return "wide"
    if is_pointwise(weight, padding, groups):
        if recorded:
            return "batched_matmul"
        # Rounded up: the number of strided positions 0, s, 2s, ...
        positions = ((x.shape[2] + stride[0] - 1) // stride[0]) * ((x.shape[3] + stride[1] - 1) // stride[1])
        out = weight.shape[0] // routing_weights.shape[1]
        if x.is_cuda:
            return _pointwise_on_cuda(x, weight, routing_weights, positions)
        if torch.jit.is_scripting() or x.device.type != "cpu" or x.dtype not in (torch.bfloat16, torch.float16):
            few = are_few(positions)
        else:
            few = are_few_in_half(positions, weight, routing_weights)
        # The side with fewer channels takes 0.7 to 0.8 of the time of the other (64 x 912 -> 304 and 152 -> 1824).
        if few:
            return "gated_outputs" if out <= x.shape[1] else "gated_inputs"
        return "wide" if one else "batched_matmul"
    if one and not is_depthwise(weight, groups, 1):
        return "wide"
    # A depthwise kernel for each sample trains faster than one for all: 390 against 480 ms a step of upcycled
    # EfficientNet-Lite0 with one expert, 32 images of 96 pixels, one core.
    if not recorded or _batch_is_fixed(x):
        return "grouped"
    # Compilers of traced programs fuse the sum over the taps, but in a torch.export graph it is 70 operations.
    traced = torch.jit.is_tracing() and is_depthwise(weight, groups, routing_weights.shape[1])
    return "shifted" if traced else "wide"


def _pointwise_on_cuda(x: Tensor, weight: Tensor, routing_weights: Tensor, positions: int) -> str:
    """Choose by memory traffic: mixed kernels are large compared with inputs or outputs if there are few positions.

    Training 512 samples in bfloat16 on one H200, milliseconds of mixing and of the other: 0.89 and 0.34 for 212 -> 638
    channels at 4 x 4, 0.88 and 0.35 for 1276 -> 106; 0.16 and 0.17 for 380 -> 76; 0.11 and 0.18 for 152 -> 190.
    """
    experts, channels = routing_weights.shape[1], x.shape[1]
    out = weight.shape[0] // experts
    if experts > 1 and max(channels, out) <= 6 * experts * positions:
        return "batched_matmul"
    return "gated_inputs" if experts > 1 and channels <= out else "wide"


@torch.jit.unused
def _batch_is_fixed(x: Tensor) -> bool:
    """Return whether this is torch.export with a fixed batch size; traces always allow others."""
    return not torch.jit.is_tracing() and isinstance(x.shape[0], int)


# ---------------------------------------------------------------------------------------------------------------------
# Execution path
# ---------------------------------------------------------------------------------------------------------------------


def convolve(
    x: Tensor,
    weight: Tensor,
    routing_weights: Tensor,
    bias: Tensor | None,
    conv_params: ConvParams,
    strategy: str | None,
    output_bias: Tensor | None,
) -> Tensor:
    """Compute `dynamic_conv2d` without checking shapes; a requested strategy is still checked."""
    if strategy is not None:
        check_strategy(strategy, weight, conv_params.padding, conv_params.groups, routing_weights.shape[1])
    elif not torch.jit.is_scripting() and _compiles_one(x):
        return _convolve_one(x, weight, routing_weights, bias, conv_params, output_bias)
    if torch.jit.is_scripting():
        routing_weights = routing_weights.to(weight.dtype)
        y = _convolve_scripted(x, weight, routing_weights, conv_params, strategy, output_bias)
    else:
        dtype = autocast_dtype(x.device.type)
        if dtype is not None and x.dtype != torch.float64:
            with without_autocast(x.device.type):
                x, weight = x.to(dtype), weight.to(dtype)
                return convolve(x, weight, routing_weights, bias, conv_params, strategy, output_bias)
        # A comparison is cheaper than a no-op cast, which is noticeable at batch 1.
        if routing_weights.dtype != weight.dtype:
            routing_weights = routing_weights.to(weight.dtype)
        if output_bias is not None and output_bias.dtype != weight.dtype:
            output_bias = output_bias.to(weight.dtype)
        y = _convolve(x, weight, routing_weights, conv_params, strategy, output_bias)
    if bias is not None:
        y = y + mix(bias.to(weight.dtype), routing_weights)[:, :, None, None]
    return y


@torch.jit.unused
def _compiles_one(x: Tensor) -> bool:
    """Return whether torch.compile is recording a graph for a single sample; it always makes one for batch size 1."""
    return x.shape[0] == 1 and compiles_for_python() and autocast_dtype(x.device.type) is None


@torch.jit.unused
def _convolve_one(
    x: Tensor,
    weight: Tensor,
    routing_weights: Tensor,
    bias: Tensor | None,
    conv_params: ConvParams,
    output_bias: Tensor | None,
) -> Tensor:
    """Convolve a single sample with its mixed kernel, in operations that a compiler sees.

    Calling our operator instead costs more than the arithmetic of a small layer. In eager mode this gains nothing on
    one thread, and takes 1.06 to 1.09 times as long as matrix products on two (parameternet_600m).
    """
    dtype = weight.dtype
    routing_weights = routing_weights.to(dtype)
    kernel = mix(weight, routing_weights).view(-1, *weight.shape[1:])
    if bias is not None:
        mixed_bias = mix(bias.to(dtype), routing_weights).flatten()
        output_bias = mixed_bias if output_bias is None else mixed_bias + output_bias
    if output_bias is not None:
        output_bias = output_bias.to(dtype)
    stride, padding, dilation, groups = conv_params
    return F.conv2d(x, kernel, output_bias, stride, padding, dilation, groups)


@torch.jit.unused
def _convolve(
    x: Tensor,
    weight: Tensor,
    routing_weights: Tensor,
    conv_params: ConvParams,
    strategy: str | None,
    output_bias: Tensor | None,
) -> Tensor:
    """Choose the execution path: compiled op, traced graph, autograd, or inference."""
    if x.shape[0] == 0:
        return _convolve_nothing(x, weight, routing_weights, conv_params, output_bias)
    recorded = records_a_graph()
    if recorded and compiles_for_python():
        return convolve_compiled(x, weight, routing_weights, conv_params, strategy, output_bias)
    if strategy is None:
        stride, padding, _, groups = conv_params
        strategy = choose_strategy(x, weight, routing_weights, stride, padding, groups, recorded)
    chosen = STRATEGIES[strategy]
    if recorded:
        return chosen.forward(x, weight, routing_weights, output_bias, conv_params)
    if strategy == "grouped" and triton_depthwise.takes(x, weight, conv_params.groups, routing_weights.shape[1]):
        return triton_depthwise.mixed_depthwise(x, weight, routing_weights, output_bias, conv_params)
    if not torch.is_grad_enabled() or not any(
        t is not None and t.requires_grad for t in (x, weight, routing_weights, output_bias)
    ):
        return chosen.forward_inference(x, weight, routing_weights, output_bias, conv_params)
    if not chosen.keeps_kernels or not _gains_by_mixing_again(x, weight, routing_weights, conv_params):
        return chosen.forward(x, weight, routing_weights, output_bias, conv_params)
    y = MixedConvolution.apply(x, weight, routing_weights, conv_params, chosen.forward, chosen.forward_inference)
    return y if output_bias is None else y + output_bias[:, None, None]


def _convolve_scripted(
    x: Tensor,
    weight: Tensor,
    routing_weights: Tensor,
    conv_params: ConvParams,
    strategy: str | None,
    output_bias: Tensor | None,
) -> Tensor:
    """Run the column `forward` from a chain of ifs, for TorchScript."""
    if x.shape[0] == 0:
        return _convolve_nothing(x, weight, routing_weights, conv_params, output_bias)
    if strategy is None:
        strategy = choose_strategy(
            x, weight, routing_weights, conv_params.stride, conv_params.padding, conv_params.groups, False
        )
    if strategy == "grouped":
        return grouped(x, weight, routing_weights, output_bias, conv_params)
    if strategy == "batched_matmul":
        return batched_matmul(x, weight, routing_weights, output_bias, conv_params)
    if strategy == "gated_inputs":
        return gated_inputs(x, weight, routing_weights, output_bias, conv_params)
    if strategy == "gated_outputs":
        return gated_outputs(x, weight, routing_weights, output_bias, conv_params)
    if strategy == "shifted":
        return shifted(x, weight, routing_weights, output_bias, conv_params)
    return wide(x, weight, routing_weights, output_bias, conv_params)


def _convolve_nothing(
    x: Tensor, weight: Tensor, routing_weights: Tensor, conv_params: ConvParams, output_bias: Tensor | None
) -> Tensor:
    """Return the empty output of an empty batch, connected to all inputs so that every gradient is zero, not None."""
    kernel = weight[: weight.shape[0] // routing_weights.shape[1]]
    y = F.conv2d(
        x, kernel, output_bias, conv_params.stride, conv_params.padding, conv_params.dilation, conv_params.groups
    )
    return y * routing_weights.sum(1).reshape(-1, 1, 1, 1)


def _gains_by_mixing_again(x: Tensor, weight: Tensor, routing_weights: Tensor, conv_params: ConvParams) -> bool:
    """Return whether mixing kernels again in backward is faster than keeping those of all samples.

    It is in native kernels, for large kernels, and for depthwise ones with our own gradients. (In torch's operators,
    training parameternet_600m with batch 16 at 128 px on two cores takes 0.90 of the time of always mixing again.)
    """
    tensors = (x, weight, routing_weights, None, conv_params)
    if runs_natively(*tensors) or runs_channels_last(*tensors):
        return True
    slow = gains_by_own_gradient(x, weight) or gains_by_float32_gradients(x)
    own = is_depthwise(weight, conv_params.groups, routing_weights.shape[1]) and slow
    return own or kernels_are_large(weight, routing_weights)


def _compute(
    x: Tensor,
    weight: Tensor,
    routing_weights: Tensor,
    output_bias: Tensor | None,
    conv_params: ConvParams,
    strategy: str | None,
) -> Tensor:
    """Implement the compiled operator: choose the strategy by the actual shapes, and compute."""
    if strategy is None:
        strategy = choose_strategy(
            x, weight, routing_weights, conv_params.stride, conv_params.padding, conv_params.groups
        )
    return STRATEGIES[strategy].forward_inference(x, weight, routing_weights, output_bias, conv_params)


convolve_compiled = make_operator(_compute)
