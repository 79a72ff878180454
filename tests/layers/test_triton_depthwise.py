"""Triton's interpreter runs the programs for CUDA on a CPU: outputs, gradients and derivatives are those of torch."""

import json
import os
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from parameternet.layers import triton_depthwise

# Triton reads the variable when it is imported, so all cases run in one process of their own.
PROGRAM = """
import json, sys
import torch
import torch.nn.functional as F
from parameternet.layers.strategies import ConvParams
from parameternet.layers.triton_depthwise import DepthwiseOfEach, mixed_depthwise, static_depthwise

def image(*shape):
    return torch.randn(shape).contiguous(memory_format=torch.channels_last)

def distance(found, exact):
    return float((found.double() - exact.double()).norm() / exact.double().norm())

def convolution(batch, channels, height, width, sides, stride, padding, dilation):
    conv_params = ConvParams(stride, padding, dilation, channels)
    x = image(batch, channels, height, width).requires_grad_()
    kernels = torch.randn(batch, sides[0] * sides[1], channels, requires_grad=True)
    found, exact = (
        function(x, kernels, sides, conv_params) for function in (DepthwiseOfEach.apply, DepthwiseOfEach.plain)
    )
    grad = torch.randn(exact.shape)  # channels first
    found_grads, exact_grads = (torch.autograd.grad(y, (x, kernels), grad) for y in (found, exact))
    return {
        "y": distance(found, exact), "x": distance(found_grads[0], exact_grads[0]),
        "kernels": distance(found_grads[1], exact_grads[1]),
        "channels last": float(not found.is_contiguous(memory_format=torch.channels_last)),
    }

def derivatives():
    x, kernels, conv_params = image(2, 5, 6, 6), torch.randn(2, 9, 5), ConvParams((1, 1), (1, 1), (1, 1), 5)
    def of(function):
        return lambda a, b: function(a, b, (3, 3), conv_params)
    def second(function):
        a, b = x.clone().requires_grad_(), kernels.clone().requires_grad_()
        first = torch.autograd.grad(of(function)(a, b).pow(3).sum(), (a, b), create_graph=True)
        return torch.cat([g.flatten() for g in torch.autograd.grad(sum(g.pow(2).sum() for g in first), (a, b))])
    tangents = torch.randn_like(x), torch.randn_like(kernels)
    ours, plain = DepthwiseOfEach.apply, DepthwiseOfEach.plain
    forward_mode = [torch.func.jvp(of(function), (x, kernels), tangents)[1] for function in (ours, plain)]
    stacks = torch.stack([x, 2 * x]), torch.stack([kernels, kernels + 1])
    mapped = [torch.vmap(of(function))(*stacks) for function in (ours, plain)]
    return {
        "second": distance(second(ours), second(plain)), "forward mode": distance(*forward_mode),
        "vmap": distance(*mapped),
    }

def layers():
    x, weight, routing_weights = image(3, 6, 7, 7), torch.randn(4 * 6, 1, 3, 3), torch.rand(3, 4)
    conv_params = ConvParams((2, 2), (1, 1), (1, 1), 6)
    kernels = torch.einsum("be,ecihw->bcihw", routing_weights, weight.reshape(4, 6, 1, 3, 3))
    each = torch.cat([F.conv2d(x[i : i + 1], kernels[i], None, 2, 1, 1, 6) for i in range(3)])
    bias = torch.randn(6)
    return {
        "mixed": distance(mixed_depthwise(x, weight, routing_weights, bias, conv_params), each + bias[:, None, None]),
        "static": distance(static_depthwise(x, weight[:6], conv_params), F.conv2d(x, weight[:6], None, 2, 1, 1, 6)),
    }

torch.manual_seed(0)
cases = json.loads(sys.argv[1])
print(json.dumps([*(convolution(*case) for case in cases), derivatives(), layers()]))
"""

CASES = [
    (2, 5, 5, 6, (3, 3), (1, 1), (1, 1), (1, 1)),
    (3, 70, 2, 2, (3, 3), (1, 1), (1, 1), (1, 1)),  # more channels than a tile, several samples in a program
    (2, 9, 16, 16, (5, 5), (2, 2), (2, 2), (1, 1)),
    (2, 3, 20, 17, (3, 3), (1, 1), (2, 2), (2, 2)),
    (4, 7, 7, 7, (3, 5), (1, 2), (1, 2), (1, 1)),
    (2, 64, 9, 9, (3, 3), (1, 1), (0, 0), (1, 1)),  # more positions than a tile
]


@pytest.fixture(scope="module")
def errors():
    pytest.importorskip("triton")
    command = [sys.executable, "-c", PROGRAM, json.dumps(CASES)]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", range(len(CASES)))
def test_outputs_and_gradients(errors, case):
    assert set(errors[case]) == {"y", "x", "kernels", "channels last"}
    assert max(errors[case].values()) < 1e-6


def test_other_derivatives(errors):
    assert set(errors[-2]) == {"second", "forward mode", "vmap"} and max(errors[-2].values()) < 1e-6


def test_dynamic_and_static_layers(errors):
    assert set(errors[-1]) == {"mixed", "static"} and max(errors[-1].values()) < 1e-6


@pytest.mark.parametrize(
    ("device", "batch", "memory_format", "kernel", "dtype", "taken"),
    [
        ("cuda", 2, torch.channels_last, (16, 1, 3, 3), torch.float32, True),
        ("cuda", 2, torch.channels_last, (16, 1, 5, 5), torch.bfloat16, True),
        ("cuda", 1, torch.channels_last, (16, 1, 3, 3), torch.float32, False),
        ("cuda", 2, torch.contiguous_format, (16, 1, 3, 3), torch.float32, False),
        ("cuda", 2, torch.channels_last, (16, 2, 3, 3), torch.float32, False),
        ("cuda", 2, torch.channels_last, (16, 1, 3, 3), torch.float64, False),
        ("cpu", 2, torch.channels_last, (16, 1, 3, 3), torch.float32, False),
    ],
)
def test_what_runs_in_triton(device, batch, memory_format, kernel, dtype, taken):
    pytest.importorskip("triton")
    with FakeTensorMode():
        x = torch.empty(batch, 4, 8, 8, device=device, dtype=dtype, memory_format=memory_format)
        assert triton_depthwise.takes(x, torch.empty(kernel, device=device), 4 // kernel[1], 4) is taken
