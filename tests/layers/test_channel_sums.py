"""`channel_sums`: `x.sum((2, 3), dtype=...)` with a gradient that is expanded, not written."""

import pytest
import torch
from torch.func import functional_call, jvp, vmap

from parameternet import DynamicConv
from parameternet.layers.channel_sums import channel_sums

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


@pytest.fixture(params=DTYPES, ids=str)
def x(request):
    torch.manual_seed(0)
    return torch.randn(3, 4, 5, 2, dtype=request.param, requires_grad=True)


def test_values_and_gradients_are_those_of_the_sum(x):
    slope = torch.randn(3, 4)
    got, expected = channel_sums(x, torch.float32), x.sum((2, 3), dtype=torch.float32)
    assert torch.equal(got, expected)
    (ours,), (theirs,) = (torch.autograd.grad(y, x, slope) for y in (got, expected))
    assert torch.equal(ours, theirs) and ours.dtype == x.dtype
    assert ours.untyped_storage().nbytes() == 12 * x.element_size()  # one number for each sample and channel


def test_second_derivatives(x):
    (first,) = torch.autograd.grad(channel_sums(x, torch.float32).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.float().square().sum(), x)
    (plain,) = torch.autograd.grad(x.sum((2, 3), dtype=torch.float32).square().sum(), x, create_graph=True)
    assert torch.equal(second, torch.autograd.grad(plain.float().square().sum(), x)[0])


def test_transforms(x):
    x, tangent = x.detach(), torch.randn_like(x)
    sums, slopes = jvp(lambda t: channel_sums(t, torch.float32), (x,), (tangent,))
    assert torch.equal(sums, channel_sums(x, torch.float32))
    assert torch.equal(slopes, channel_sums(tangent, torch.float32))
    each = vmap(torch.func.grad(lambda t: channel_sums(t[None], torch.float32).sum()))(x)
    assert torch.equal(each, torch.ones_like(x))


def test_routers_keep_gradients_in_channels_last():
    """An expanded gradient that is converted becomes contiguous, and slows down all layers before it."""
    layer = DynamicConv(4, 6).bfloat16()
    torch.nn.init.normal_(layer.routing.weight)
    x = torch.randn(2, 4, 5, 5, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last).requires_grad_()
    y = functional_call(layer, dict(layer.named_parameters()), (x * 1,))
    assert y.is_contiguous(memory_format=torch.channels_last)
    (grad,) = torch.autograd.grad(y.square().sum(), x)
    assert grad.is_contiguous(memory_format=torch.channels_last)
