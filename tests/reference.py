"""What everything is held against: the naive dynamic convolution, and parameters that a rule makes from names."""

import math
import zlib

import numpy as np
import torch
import torch.nn.functional as F


def naive_dynamic_conv2d(x, weight, routing_weights, bias=None, **conv):
    """One convolution a sample, its kernel summed up expert by expert. Never optimised."""
    experts = weight.chunk(routing_weights.shape[1])
    biases = None if bias is None else bias.chunk(routing_weights.shape[1])

    def one(sample, coefficients):
        kernel = sum(c * w for c, w in zip(coefficients, experts, strict=True))
        mixed = None if biases is None else sum(c * b for c, b in zip(coefficients, biases, strict=True))
        return F.conv2d(sample[None], kernel, mixed, **conv)

    return torch.cat([one(*pair) for pair in zip(x, routing_weights, strict=True)])


def assert_no_worse(name, got, naive, exact, factor=2):
    """The error of `got` is at most `factor` times that of the naive form in the same dtype, plus a few roundings."""
    exact = exact.double()
    floor = 8 * torch.finfo(got.dtype).eps * exact.abs().max()
    error = (got.double() - exact).abs().max()
    allowed = factor * (naive.double() - exact).abs().max() + floor
    assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


def fill(name, count):
    """`count` numbers of mean about 0 and variance about 1, made from `name` alone (splitmix64 on its CRC-32)."""
    with np.errstate(over="ignore"):
        z = np.uint64(zlib.crc32(name.encode())) * np.uint64(0x100000001)
        z = z + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return (2 * np.floor(z / np.uint64(2**11)).astype(np.float64) * 2.0**-53 - 1) * math.sqrt(3)


def scaled(name, shape, kind, fan_in=None):
    """A parameter of the golden cases, in float64 holding float32 values."""
    v = fill(name, math.prod(shape))
    values = {
        "conv_weight": lambda: v / math.sqrt(fan_in),
        "linear_weight": lambda: 3 * v / math.sqrt(fan_in),
        "routing_weight": lambda: 1.5 * v / math.sqrt(fan_in),
        "routing_bias": lambda: 0.5 * v,
        "bias": lambda: 0.1 * v,
        "bn_weight": lambda: 1 + 0.1 * v,
        "bn_bias": lambda: 0.1 * v,
        "bn_mean": lambda: 0.1 * v,
        "bn_var": lambda: 1.4 * np.exp(0.2 * v),
    }[kind]()
    return torch.from_numpy(values.astype(np.float32).astype(np.float64)).reshape(shape)


def golden_input(shape):
    """Noise plus a constant for each sample and channel, so that samples are routed differently."""
    offset = fill("input_offset", shape[0] * shape[1]).reshape(shape[0], shape[1], 1, 1)
    values = fill("input", math.prod(shape)).reshape(shape) + offset
    return torch.from_numpy(values.astype(np.float32).astype(np.float64))


def unpack(stored):
    """Positions (or None) and values of a packed golden tensor."""
    if "values" in stored:
        return None, torch.tensor(stored["values"], dtype=torch.float64)
    return torch.tensor(stored["positions"]), torch.tensor(stored["samples"], dtype=torch.float64)


def relative_error(got, stored):
    """Largest difference from a packed golden tensor, relative to its largest stored value."""
    assert list(got.shape) == stored["shape"], f"shape {list(got.shape)}, expected {stored['shape']}"
    positions, values = unpack(stored)
    flat = got.detach().double().reshape(-1)
    flat = flat if positions is None else flat[positions]
    return float((flat - values).abs().max() / values.abs().max())
