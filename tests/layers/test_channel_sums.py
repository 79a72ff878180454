"""`channel_sums`: `x.sum((2, 3), dtype=...)` with a gradient that is expanded, not written."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import vmap

from parameternet import Router
from parameternet.layers.channel_sums import ChannelSums, channel_sums

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


def test_transforms(x, monkeypatch):
    called = []
    slopes_of = ChannelSums.jvp
    monkeypatch.setattr(ChannelSums, "jvp", staticmethod(lambda *args: called.append(1) or slopes_of(*args)))
    tangent = torch.randn_like(x)
    with forward_ad.dual_level():
        sums, slopes = forward_ad.unpack_dual(channel_sums(forward_ad.make_dual(x, tangent), torch.float32))
    assert torch.equal(sums, channel_sums(x, torch.float32))
    assert torch.equal(slopes, channel_sums(tangent, torch.float32))
    assert len(called) == (x.dtype != torch.float32)
    each = vmap(torch.func.grad(lambda t: channel_sums(t[None], torch.float32).sum()))(x.detach())
    assert torch.equal(each, torch.ones_like(x))


@pytest.mark.parametrize("routing", ["softmax", "sigmoid"])
def test_gradients_of_routers_need_no_memory(routing):
    router = Router(4, 3, activation=routing).bfloat16()
    torch.nn.init.normal_(router.weight)
    x = torch.randn(2, 4, 5, 5, dtype=torch.bfloat16, requires_grad=True)
    (grad,) = torch.autograd.grad(router(x).square().sum(), x)
    assert grad.stride()[2:] == (0, 0) and grad.abs().max() > 0
