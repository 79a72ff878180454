"""Routers that read normalised averages: their function, their start, and that old weights keep their meaning."""

import copy
import io
import pickle

import pytest
import timm
import torch
from torch import nn

from parameternet import DynamicConv, ParameterNet, Router, upcycle

KINDS = {
    "sigmoid": {"activation": "sigmoid"},
    "softmax": {"activation": "softmax", "temperature": 2.0},
    "hidden": {"activation": "sigmoid", "hidden": 5},
}


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def router(request):
    """With nothing at its start value."""
    torch.manual_seed(0)
    router = Router(8, 3, norm="layer", **request.param)
    for parameter in router.parameters():
        nn.init.normal_(parameter)
    return router


def expected(router, x):
    pooled = x.mean((2, 3))
    pooled = pooled - pooled.mean(1, keepdim=True)
    pooled = pooled / pooled.norm(dim=1, keepdim=True)
    if router.hidden is not None:
        pooled = torch.relu(pooled @ router.hidden.weight.T + router.hidden.bias)
    logits = pooled @ router.weight.flatten(1).T + router.bias
    return (logits / router.temperature).softmax(1) if router.softmax else logits.sigmoid()


def test_brightness_and_contrast_of_the_averages_do_not_matter(router):
    x = torch.rand(4, 8, 5, 6) * torch.arange(1.0, 9)[:, None, None]
    assert torch.allclose(router(x), expected(router, x), atol=1e-5)
    assert torch.allclose(router(1000 * x + 10), router(x), atol=1e-3)
    assert not torch.allclose(router(x)[0], router(x)[1], atol=1e-3)


@pytest.mark.usefixtures("neutral_routers")
def test_every_image_is_routed_alike_at_the_start():
    x = torch.rand(4, 8, 5, 6)
    assert torch.equal(Router(8, 3)(x), torch.full((4, 3), 1 / 3))
    assert torch.equal(DynamicConv(8, 6, num_experts=3).routing(x), torch.full((4, 3), 1 / 3))
    assert torch.equal(Router(8, 3, "sigmoid", norm="layer", hidden=4)(x), torch.full((4, 3), 0.5))


@pytest.mark.parametrize("batch", [1, 0])
def test_small_batches_and_empty_maps_have_finite_gradients(router, batch):
    x = torch.zeros(batch, 8, 3, 3, requires_grad=True)
    router(x).sum().backward()
    assert x.grad.isfinite().all()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in router.parameters())


def test_second_derivatives_and_forward_mode(router):
    router, x = router.double(), torch.rand(2, 8, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(router, x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(router, x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_it_routes_in_float32(router, dtype):
    x = 100 * torch.rand(4, 8, 5, 6)  # whose squares float16 cannot hold
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(router(x), router(x.float())) and router(x).dtype == torch.float32
    assert torch.allclose(router.to(dtype)(x.to(dtype)), expected(router.float(), x.to(dtype).float()), atol=1e-3)


def test_graphs_compute_the_same_at_other_sizes(router):
    conv = DynamicConv(8, 6, 3, num_experts=3, routing=router)
    small, large = torch.rand(2, 8, 5, 5), torch.rand(3, 8, 9, 7)
    for graph in (torch.jit.script(conv), torch.jit.trace(conv, small)):
        assert torch.allclose(graph(large), conv(large), atol=1e-5)


def test_it_copies_and_travels(router):
    x = torch.rand(2, 8, 4, 4)
    buffer = io.BytesIO()
    torch.save(router, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(router), pickle.loads(pickle.dumps(router)), torch.load(buffer, weights_only=False)):
        assert torch.equal(other(x), router(x)) and other.norm == "layer"


def test_a_state_dict_says_whether_its_router_normalises(router):
    x = torch.rand(4, 8, 5, 6)
    kind = {"hidden": 5} if router.hidden is not None else {"activation": "softmax" if router.softmax else "sigmoid"}
    old = Router(8, 3, **kind, norm="none")
    new, bias = copy.deepcopy(router), router.bias
    router.load_state_dict(old.state_dict())
    assert router.norm == "none" and torch.equal(router(x), old(x)) and router.bias is bias
    old.load_state_dict(new.state_dict())
    assert old.norm == "layer" and torch.equal(old(x), new(x))
    state = {name: value for name, value in new.state_dict().items() if name != "bias"}
    with pytest.raises(RuntimeError, match="weight comes without bias, whose shape says whether"):
        router.load_state_dict(state, strict=False)


def test_networks_load_old_weights_and_compute_what_they_did():
    arguments = {"stages": (((3, 16, 16, 0, 1),), ((3, 48, 24, 0.25, 2),)), "width": 0.5, "num_classes": 5}
    old, x = ParameterNet(**arguments, routing_norm="none").eval(), torch.randn(2, 3, 32, 32)
    new = ParameterNet(**arguments).eval()
    assert all(router.norm == "layer" for router in new.modules() if isinstance(router, Router))
    with torch.no_grad():
        before = new(x)
        new.load_state_dict(old.state_dict())
        assert torch.equal(new(x), old(x)) and not torch.equal(new(x), before)


@pytest.mark.parametrize("routing", ["sigmoid", "softmax"])
def test_upcycling_keeps_the_function_and_the_recipe_remembers(routing):
    dense, x = timm.create_model("test_efficientnet", num_classes=5).eval(), torch.randn(2, 3, 64, 64)
    dynamic = upcycle(dense, routing=routing).eval()
    assert {router.norm for router in dynamic.modules() if isinstance(router, Router)} == {"layer"}
    with torch.no_grad():
        assert torch.allclose(dynamic(x), dense(x), atol=1e-4)
    recipe = dynamic.upcycling.recipe()
    again = timm.create_model("dynamic_timm", source="test_efficientnet", recipe=recipe, num_classes=5)
    again.load_state_dict(dynamic.state_dict())
    assert {router.norm for router in again.modules() if isinstance(router, Router)} == {"layer"}


def test_nonsense_is_refused():
    with pytest.raises(ValueError, match="routing_norm must be one of layer, none, got 'batch'"):
        DynamicConv(4, 4, routing_norm="batch")
