"""Native kernels for inference on x86 CPUs: routing, and dynamic convolutions without temporary tensors.

`kernels.cpp` is built with the package if a C++ compiler is at hand. Without it, torch's operators compute the same.
`PARAMETERNET_NATIVE=0` in the environment disables the kernels; `avx2` limits them to AVX2.
"""

import ctypes
import os
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

__all__ = ["LEVELS", "convolves", "depthwise", "level", "pointwise", "ready", "route"]

LEVELS = ("none", "AVX2", "AVX-512")
_NUMBER, _POINTER, _FLAG = ctypes.c_long, ctypes.c_void_p, ctypes.c_int
_TENSORS = (nn.Parameter, Tensor)


def _load() -> ctypes.CDLL | None:
    if os.environ.get("PARAMETERNET_NATIVE") == "0":
        return None
    for path in sorted(Path(__file__).parent.glob("_kernels*.so")):
        try:
            library = ctypes.CDLL(str(path))
            library.parameternet_route.argtypes = [_FLAG] * 2 + [_POINTER] * 4 + [_NUMBER] * 4 + [_FLAG] * 2 + [
                ctypes.c_float
            ]
            library.parameternet_pointwise.argtypes = [_FLAG] * 2 + [_POINTER] * 5 + [_NUMBER] * 5
            library.parameternet_depthwise.argtypes = [_FLAG] * 2 + [_POINTER] * 5 + [_NUMBER] * 9
        except (OSError, AttributeError):  # another processor, or no OpenMP runtime
            continue
        return library
    return None


def _level(library: ctypes.CDLL | None) -> int:
    found = 0 if library is None else library.parameternet_level()
    return min(found, 1) if os.environ.get("PARAMETERNET_NATIVE", "").lower() == "avx2" else found


_library = _load()
_available = _level(_library)


def level() -> int:
    """Return what the kernels use on this machine: 0 if there are none, 1 for AVX2, 2 for AVX-512."""
    return _available


def ready(x: Tensor, *others: Tensor | None) -> bool:
    """Return whether the kernels can read these tensors: contiguous float32 on a CPU that nothing else observes.

    Modes that see every operator (FlopCounterMode, FakeTensorMode), torch.func and forward-mode differentiation must
    not be bypassed. Whether gradients are needed is for the caller to check.
    """
    if not _available or x.numel() == 0 or torch._C._len_torch_dispatch_stack() or forward_ad._current_level >= 0:
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    return _readable(x) and all(t is None or _readable(t) for t in others)


def _readable(t: Tensor) -> bool:
    return (
        t.dtype is torch.float32
        and t.device.type == "cpu"
        and type(t) in _TENSORS
        and t.layout is torch.strided
        and t.is_contiguous()
        and not t.is_neg()
    )


def route(
    x: Tensor, weight: Tensor, bias: Tensor, normalised: bool, softmax: bool, temperature: float
) -> Tensor:
    """Average x (B, C, H, W), and map it by weight (E, C) and bias (E values) to routing weights (B, E)."""
    batch, channels, height, width = x.shape
    experts = weight.shape[0]
    routing_weights = x.new_empty(batch, experts)
    _library.parameternet_route(  # type: ignore[union-attr]
        _available,
        torch.get_num_threads(),
        x.data_ptr(),
        weight.data_ptr(),
        bias.data_ptr(),
        routing_weights.data_ptr(),
        batch,
        channels,
        height * width,
        experts,
        normalised,
        softmax,
        temperature,
    )
    return routing_weights


def pointwise(x: Tensor, weight: Tensor, routing_weights: Tensor, output_bias: Tensor | None) -> Tensor:
    """Convolve x (B, C, H, W) with kernels mixed from weight (E * out, C, 1, 1) by routing_weights (B, E)."""
    batch, channels, height, width = x.shape
    experts = routing_weights.shape[1]
    out = weight.shape[0] // experts
    y = x.new_empty(batch, out, height, width)
    _library.parameternet_pointwise(  # type: ignore[union-attr]
        _available,
        torch.get_num_threads(),
        x.data_ptr(),
        weight.data_ptr(),
        routing_weights.data_ptr(),
        None if output_bias is None else output_bias.data_ptr(),
        y.data_ptr(),
        batch,
        channels,
        height * width,
        experts,
        out,
    )
    return y


def depthwise(
    x: Tensor, weight: Tensor, routing_weights: Tensor, output_bias: Tensor | None, padding: tuple[int, int]
) -> Tensor:
    """Convolve x (B, C, H, W) depthwise, stride 1, with kernels mixed from weight (E * C, 1, kh, kw)."""
    batch, channels, height, width = x.shape
    kernel_h, kernel_w = weight.shape[2], weight.shape[3]
    y = x.new_empty(batch, channels, height + 2 * padding[0] - kernel_h + 1, width + 2 * padding[1] - kernel_w + 1)
    _library.parameternet_depthwise(  # type: ignore[union-attr]
        _available,
        torch.get_num_threads(),
        x.data_ptr(),
        weight.data_ptr(),
        routing_weights.data_ptr(),
        None if output_bias is None else output_bias.data_ptr(),
        y.data_ptr(),
        batch,
        channels,
        height,
        width,
        routing_weights.shape[1],
        kernel_h,
        kernel_w,
        *padding,
    )
    return y
