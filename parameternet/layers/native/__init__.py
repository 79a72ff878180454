"""Native kernels for x86 CPUs: routers, dynamic convolutions and their gradients, in float32.

`kernels.cpp` is built when the package is installed, if g++ is installed. Without it, torch's operators are used, which
are slower. The environment variable `PARAMETERNET_NATIVE=0` disables the kernels; `avx2` limits them to AVX2.
"""

import ctypes
import os
import sysconfig
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

__all__ = [
    "ACTIVATIONS",
    "LEVELS",
    "depthwise",
    "depthwise_gradients",
    "depthwise_last",
    "depthwise_last_gradients",
    "level",
    "pointwise",
    "pointwise_gradients",
    "pointwise_last",
    "readable",
    "ready",
    "ready_channels_last",
    "ready_compact",
    "route",
]

LEVELS = ("none", "AVX2", "AVX-512")
ACTIVATIONS = {"none": 0, "relu": 1, "hard_swish": 2}
# How experts are stored; uint8 as rows with a scale and an offset, see `CompactConv`.
KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.uint8: 3}
MOST_COMPACT_EXPERTS = 64
_CODE, _NUMBER, _POINTER = ctypes.c_int, ctypes.c_long, ctypes.c_void_p
_SIGNATURES: dict[str, list[Any]] = {  # after the level and the number of threads
    "route": [_POINTER] * 4 + [_NUMBER] * 5 + [_CODE] * 2 + [ctypes.c_float],
    "pointwise": [_POINTER] * 5 + [_NUMBER] * 7 + [_CODE] * 2,
    "depthwise": [_POINTER] * 5 + [_NUMBER] * 11 + [_CODE] * 2,
    "pointwise_last": [_POINTER] * 4 + [_NUMBER] * 5,
    "pointwise_gradients": [_POINTER] * 7 + [_NUMBER] * 6 + [_CODE],
    "depthwise_grad_kernels": [_POINTER] * 3 + [_NUMBER] * 9,
    "depthwise_last": [_POINTER] * 5 + [_NUMBER] * 15 + [_CODE],
    "depthwise_last_grad_kernels": [_POINTER] * 3 + [_NUMBER] * 14,
}
_INTERFACE = 2  # of the library: one that was built from other sources is not used
_TENSORS = (nn.Parameter, Tensor)


def _is_observed() -> bool:
    """Return whether something observes torch's operators: modes, torch.func, forward-mode differentiation."""
    return bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or forward_ad._current_level >= 0
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def _load() -> ctypes.CDLL | None:
    wanted = os.environ.get("PARAMETERNET_NATIVE", "")
    if wanted == "0":
        return None
    if wanted.lower() not in ("", "1", "avx2"):
        warnings.warn(f"PARAMETERNET_NATIVE must be 0, 1 or avx2, got {wanted!r}; native kernels stay on", stacklevel=2)
    try:
        library = ctypes.CDLL(str(Path(__file__).with_name(f"_kernels{sysconfig.get_config_var('EXT_SUFFIX')}")))
        for name, types in _SIGNATURES.items():
            getattr(library, f"parameternet_{name}").argtypes = [_CODE, _CODE, *types]
        if library.parameternet_interface() != _INTERFACE:
            return None
        _is_observed()
    except (OSError, AttributeError):
        # Not built, of another processor, without OpenMP, or a torch without the functions of `_is_observed`.
        return None
    return library


def _level(library: ctypes.CDLL | None) -> int:
    found = 0 if library is None else library.parameternet_level()
    return min(found, 1) if os.environ.get("PARAMETERNET_NATIVE", "").lower() == "avx2" else found


_library: Any = _load()
_available = _level(_library)


def level() -> int:
    """Return what the kernels use on this machine: 0 if there are none, 1 for AVX2, 2 for AVX-512."""
    return _available


def ready(x: Tensor, *others: Tensor | None) -> bool:
    """Return whether the kernels can read these tensors: float32 on a CPU, contiguous, that nothing else observes.

    `x` (B, C, H, W) may be a slice of the channels of a contiguous tensor. Modes that see every operator
    (FlopCounterMode, FakeTensorMode), torch.func and forward-mode differentiation must not be bypassed. Whether
    gradients are needed is for the caller to check.
    """
    return readable(x) and _dense(x) and _all_plain(others)


def ready_channels_last(x: Tensor, *others: Tensor | None) -> bool:
    """Return `ready` for `x` in torch.channels_last, and not contiguous as well, as a single position is."""
    return (
        readable(x)
        and not x.is_contiguous()
        and x.is_contiguous(memory_format=torch.channels_last)
        and _all_plain(others)
    )


def readable(x: Tensor) -> bool:
    """Return whether the kernels can read `x` (B, C, H, W), if its memory is laid out as they expect."""
    # In this order: torch.compile and torch.fx must not get to the later conditions.
    if not _available or torch.compiler.is_compiling() or type(x) not in _TENSORS or torch.jit.is_tracing():
        return False
    return x.ndim == 4 and x.numel() > 0 and not _is_observed() and _plain(x)


def _all_plain(tensors: Sequence[Tensor | None]) -> bool:
    return all(t is None or (_plain(t) and t.is_contiguous()) for t in tensors)


def ready_compact(rows: Tensor, num_experts: int) -> bool:
    """Return whether the kernels can read experts in 16 or 8 bits, as rows."""
    return _visible(rows) and rows.is_contiguous() and rows.dtype in KINDS and num_experts <= MOST_COMPACT_EXPERTS


def _plain(t: Tensor) -> bool:
    return t.dtype is torch.float32 and _visible(t)


def _visible(t: Tensor) -> bool:
    return (
        t.device.type == "cpu"
        and type(t) in _TENSORS
        and t.layout is torch.strided
        and not t.is_neg()
        and not t._is_zerotensor()  # which has no memory
    )


def _dense(x: Tensor) -> bool:
    """Return whether each sample is contiguous."""
    return x.is_contiguous() or (x.ndim == 4 and x[:1].is_contiguous())


def _run(name: str, *arguments: Any) -> None:
    """Call a kernel with these arguments; tensors are passed as pointers, None as a null pointer."""
    passed = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
    getattr(_library, f"parameternet_{name}")(_available, torch.get_num_threads(), *passed)


def _empty_like(x: Tensor, channels_last: bool) -> Tensor:
    """Return a tensor of x's shape whose memory is laid out as the kernels write it."""
    batch, channels, height, width = x.shape
    if channels_last:
        return x.new_empty(batch, height, width, channels).permute(0, 3, 1, 2)
    return x.new_empty(batch, channels, height, width)


def _check(x: Tensor, weight: Tensor, routing_weights: Tensor, output_bias: Tensor | None, columns: int) -> None:
    """Reject what the kernels would read beyond: routing weights of a custom router, pruned weights.

    columns: Numbers of a kernel, without the scale and offset of 8-bit rows.
    """
    if routing_weights.ndim != 2 or routing_weights.shape[0] != x.shape[0]:
        raise ValueError(
            f"expected routing_weights of shape (batch, num_experts) with batch = {x.shape[0]}, got "
            f"{tuple(routing_weights.shape)}"
        )
    experts, extra = routing_weights.shape[1], 8 if weight.dtype == torch.uint8 else 0
    if weight.shape[0] % experts or weight[0].numel() != columns + extra:
        raise ValueError(
            f"expected routing_weights of shape (batch, num_experts) and num_experts * out kernels of {columns} "
            f"numbers, got {tuple(routing_weights.shape)} and a weight of shape {tuple(weight.shape)}"
        )
    if output_bias is not None and output_bias.numel() != weight.shape[0] // experts:
        raise ValueError(f"expected output_bias of {weight.shape[0] // experts} numbers, got {output_bias.numel()}")


def _check_depthwise(x: Tensor, weight: Tensor, routing_weights: Tensor, output_bias: Tensor | None) -> None:
    _check(x, weight, routing_weights, output_bias, weight.shape[2] * weight.shape[3])
    if weight.shape[0] != routing_weights.shape[1] * x.shape[1]:
        raise ValueError(f"expected {x.shape[1]} kernels for each expert, got a weight of shape {tuple(weight.shape)}")


def route(x: Tensor, weight: Tensor, bias: Tensor, normalised: bool, softmax: bool, temperature: float) -> Tensor:
    """Average x (B, C, H, W), and map it by weight (E, C) and bias (E values) to routing weights (B, E)."""
    batch, channels, height, width = x.shape
    experts = weight.shape[0]
    routing_weights = x.new_empty(batch, experts)
    tensors = x, weight, bias, routing_weights
    sizes = x.stride(0), batch, channels, height * width, experts
    _run("route", *tensors, *sizes, normalised, softmax, temperature)
    return routing_weights


def pointwise(
    x: Tensor,
    weight: Tensor,
    routing_weights: Tensor,
    output_bias: Tensor | None,
    activation: str = "none",
    y: Tensor | None = None,
) -> Tensor:
    """Convolve x (B, C, H, W) with kernels mixed from weight (E * out, C, 1, 1) by routing_weights (B, E).

    weight: Also in 16 or 8 bits, as rows (E * out, ...), see `CompactConv`.
    y: Where to write the output, which may be a slice of the channels of a contiguous tensor; None: a new tensor.
    """
    batch, channels, height, width = x.shape
    _check(x, weight, routing_weights, output_bias, channels)
    experts = routing_weights.shape[1]
    out = weight.shape[0] // experts
    if y is None:
        y = x.new_empty(batch, out, height, width)
    tensors = x, weight, routing_weights, output_bias, y
    sizes = x.stride(0), y.stride(0), batch, channels, height * width, experts, out
    _run("pointwise", *tensors, *sizes, ACTIVATIONS[activation], KINDS[weight.dtype])
    return y


def depthwise(
    x: Tensor,
    weight: Tensor,
    routing_weights: Tensor,
    output_bias: Tensor | None,
    padding: tuple[int, int],
    activation: str = "none",
    y: Tensor | None = None,
    flipped: bool = False,
) -> Tensor:
    """Convolve x (B, C, H, W) depthwise, stride 1, with kernels mixed from weight (E * C, 1, kh, kw).

    y: As in `pointwise`. flipped: Turn kernels by 180 degrees, as for the gradient of the input.
    """
    batch, channels, height, width = x.shape
    kernel_h, kernel_w = weight.shape[2], weight.shape[3]
    _check_depthwise(x, weight, routing_weights, output_bias)
    if y is None:
        y = x.new_empty(batch, channels, height + 2 * padding[0] - kernel_h + 1, width + 2 * padding[1] - kernel_w + 1)
    tensors = x, weight, routing_weights, output_bias, y
    sizes = (
        x.stride(0),
        y.stride(0),
        batch,
        channels,
        height,
        width,
        routing_weights.shape[1],
        kernel_h,
        kernel_w,
        *padding,
    )
    _run("depthwise", *tensors, *sizes, ACTIVATIONS[activation], flipped)
    return y


def pointwise_gradients(
    x: Tensor, weight: Tensor, routing_weights: Tensor, grad: Tensor, of_x: bool, of_weight: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return gradients of x, weight and routing_weights for `pointwise` or `pointwise_last`, given that of its output.

    grad: In the memory format of x. of_x: Whether the first is needed. of_weight: Whether the other two are.
    """
    batch, channels, height, width = x.shape
    experts = routing_weights.shape[1]
    last = not _dense(x)
    grad_x = _empty_like(x, last) if of_x else None
    grad_weight = x.new_empty(weight.shape) if of_weight else None
    grad_routing = x.new_empty(routing_weights.shape) if of_weight else None
    tensors = x, weight, routing_weights, grad, grad_x, grad_weight, grad_routing
    sizes = x.stride(0), batch, channels, height * width, experts, weight.shape[0] // experts
    _run("pointwise_gradients", *tensors, *sizes, last)
    return grad_x, grad_weight, grad_routing


def depthwise_gradients(
    x: Tensor,
    weight: Tensor,
    routing_weights: Tensor,
    grad: Tensor,
    padding: tuple[int, int],
    of_x: bool,
    of_weight: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return gradients as `pointwise_gradients` does, for `depthwise` with padding smaller than the kernel."""
    batch, channels, height, width = x.shape
    kernel_h, kernel_w = weight.shape[2], weight.shape[3]
    grad_x = grad_weight = grad_routing = None
    if of_x:
        rest = (kernel_h - 1 - padding[0], kernel_w - 1 - padding[1])
        grad_x = depthwise(grad, weight, routing_weights, None, rest, flipped=True)
    if of_weight:
        grad_kernels = x.new_empty(batch, channels * kernel_h * kernel_w)
        _run(
            "depthwise_grad_kernels",
            x,
            grad,
            grad_kernels,
            x.stride(0),
            batch,
            channels,
            height,
            width,
            kernel_h,
            kernel_w,
            *padding,
        )
        grad_weight, grad_routing = _unmix(grad_kernels, weight, routing_weights)
    return grad_x, grad_weight, grad_routing


def pointwise_last(x: Tensor, weight: Tensor, routing_weights: Tensor, output_bias: Tensor | None) -> Tensor:
    """Compute `pointwise` for x (B, C, H, W) in channels last and experts in float32."""
    batch, channels, height, width = x.shape
    _check(x, weight, routing_weights, output_bias, channels)
    experts = routing_weights.shape[1]
    out = weight.shape[0] // experts
    y = x.new_empty(batch, height, width, out)
    _run("pointwise_last", x, weight, routing_weights, y, batch, channels, height * width, experts, out)
    return (y if output_bias is None else y.add_(output_bias)).permute(0, 3, 1, 2)


def depthwise_last(
    x: Tensor,
    weight: Tensor,
    routing_weights: Tensor,
    output_bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> Tensor:
    """Convolve x (B, C, H, W), channels last, depthwise with kernels mixed from weight (E * C, 1, kh, kw)."""
    _check_depthwise(x, weight, routing_weights, output_bias)
    out = [
        (side + 2 * pad - step * (kernel - 1) - 1) // jump + 1
        for side, pad, step, kernel, jump in zip(x.shape[2:], padding, dilation, weight.shape[2:], stride, strict=True)
    ]
    y = x.new_empty(x.shape[0], *out, x.shape[1]).permute(0, 3, 1, 2)
    axes = _axes(x, y, weight, stride, padding, dilation)
    _gather(x, weight, routing_weights, output_bias, y, axes, transposed=False)
    return y


def depthwise_last_gradients(
    x: Tensor,
    weight: Tensor,
    routing_weights: Tensor,
    grad: Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    of_x: bool,
    of_weight: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return gradients as `pointwise_gradients` does, for `depthwise_last`; grad is channels last, too."""
    axes = _axes(x, grad, weight, stride, padding, dilation)
    grad_x = grad_weight = grad_routing = None
    if of_x:
        grad_x = _empty_like(x, channels_last=True)
        _gather(grad, weight, routing_weights, None, grad_x, axes, transposed=True)
    if of_weight:
        batch, channels = x.shape[:2]
        grad_kernels = x.new_empty(batch, channels * weight[0].numel())
        _run("depthwise_last_grad_kernels", x, grad, grad_kernels, batch, channels, *axes)
        grad_weight, grad_routing = _unmix(grad_kernels, weight, routing_weights)
    return grad_x, grad_weight, grad_routing


def _axes(
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> tuple[int, ...]:
    """Return what describes a convolution from x to y, as the kernels of channels last expect it."""
    return (*x.shape[2:], *y.shape[2:], *weight.shape[2:], *stride, *padding, *dilation)


def _gather(
    x: Tensor,
    weight: Tensor,
    routing_weights: Tensor,
    output_bias: Tensor | None,
    y: Tensor,
    axes: tuple[int, ...],
    transposed: bool,
) -> None:
    batch, channels = x.shape[:2]
    sides, rest = axes[:4], axes[4:]
    experts = routing_weights.shape[1]
    tensors = x, weight, routing_weights, output_bias, y
    _run("depthwise_last", *tensors, batch, channels, *sides, experts, *rest, transposed)


def _unmix(grad_kernels: Tensor, weight: Tensor, routing_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return gradients of experts and routing weights, given those of mixed kernels (B, numbers of a kernel)."""
    experts = weight.detach().view(routing_weights.shape[1], -1)
    return torch.mm(routing_weights.t(), grad_kernels).view(weight.shape), torch.mm(grad_kernels, experts.t())
