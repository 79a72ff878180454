"""To autograd, a dynamic convolution with its router is an ordinary convolution: held against the naive loop."""

import copy
import itertools
from functools import partial

import pytest
import torch
import torch.fx.experimental.proxy_tensor
from reference import naive_dynamic_conv2d
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import parameternet
from parameternet import DynamicConv
from parameternet.layers import strategies
from parameternet.layers.static import DepthwiseConv, PooledConv

BATCH, SIZE = 3, (6, 5)
DYNAMIC = {
    "pointwise": {"out_channels": 6},
    "pointwise-strided": {"out_channels": 6, "stride": 2},
    "pointwise-mlp": {"out_channels": 4, "routing_hidden": 3},
    "depthwise-3": {"out_channels": 4, "kernel_size": 3, "groups": 4},
    "depthwise-5": {"out_channels": 4, "kernel_size": 5, "groups": 4},
    "depthwise-7": {"out_channels": 4, "kernel_size": 7, "groups": 4, "routing": "softmax", "temperature": 2.0},
    "depthwise-5-strided": {"out_channels": 4, "kernel_size": 5, "groups": 4, "stride": 2, "dilation": 2},
    "depthwise-same": {"out_channels": 4, "kernel_size": 4, "groups": 4, "padding": "same"},
    "dense": {"out_channels": 3, "kernel_size": 3, "bias": True},
    "grouped": {"out_channels": 6, "kernel_size": 3, "groups": 2, "stride": 2},
}
STATIC = {
    "static-depthwise-3": (DepthwiseConv, {"kernel_size": 3, "padding": 1}),
    "static-depthwise-5": (DepthwiseConv, {"kernel_size": 5, "padding": 2, "stride": 2, "bias": False}),
    "static-depthwise-7": (DepthwiseConv, {"kernel_size": 7, "padding": 3, "bias": False}),
    "static-pooled": (PooledConv, {"kernel_size": 1}),
}
CASES = [*DYNAMIC, *(f"{name}-remixed" for name in DYNAMIC), *STATIC]


class Naive(nn.Module):
    """The layer's function, written down once more with torch's own operations."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        layer, router = self.layer, self.layer.routing
        pooled = x.mean((2, 3))
        if router.norm == "layer":
            centred = pooled - pooled.mean(1, keepdim=True)
            deviation = (centred.square().mean(1, keepdim=True) + 1e-6).sqrt()
            pooled = centred / deviation / x.shape[1] ** 0.5
        if router.hidden is not None:
            pooled = torch.relu(pooled @ router.hidden.weight.t() + router.hidden.bias)
        logits = pooled @ router.weight.flatten(1).t() + router.bias
        softmax = router.softmax
        routing_weights = torch.softmax(logits / router.temperature, 1) if softmax else torch.sigmoid(logits)
        if layer.pad_same:
            total = [layer.kernel_size[i] - 1 for i in (1, 0)]
            x = nn.functional.pad(x, [total[0] // 2, total[0] - total[0] // 2, total[1] // 2, total[1] - total[1] // 2])
        conv = {name: getattr(layer, name) for name in ("stride", "padding", "dilation", "groups")}
        y = naive_dynamic_conv2d(x, layer.weight, routing_weights, layer.bias, **conv)
        return y if layer.output_bias is None else y + layer.output_bias[:, None, None]


@pytest.fixture(params=CASES)
def pair(request, monkeypatch):
    """(layer, the same function in torch's own operations, input), in float64 with shared parameters."""
    torch.manual_seed(0)
    name = request.param.removesuffix("-remixed")
    if name != request.param:
        # No mixed kernel of a whole batch fits: backward mixes again, two samples at a time.
        monkeypatch.setattr(strategies, "CACHED_BYTES", 0)
        monkeypatch.setattr(strategies, "HEAP_BYTES", 0)
        monkeypatch.setattr(strategies, "FEWEST_SAMPLES", 2)
    size = (1, 1) if name == "static-pooled" else SIZE
    x = torch.randn(BATCH, 4, *size, dtype=torch.float64)
    if name in STATIC:
        kind, arguments = STATIC[name]
        groups = 4 if kind is DepthwiseConv else 1
        layer = kind(4, 4, groups=groups, **arguments).double()
        naive = nn.Conv2d(4, 4, groups=groups, **arguments).double()
        naive.weight, naive.bias = layer.weight, layer.bias
        return layer, naive, x
    layer = DynamicConv(4, **DYNAMIC[name], num_experts=2).double()
    nn.init.normal_(layer.routing.weight)
    return layer, Naive(layer), x


def close(got, expected, tolerance=1e-10):
    got, expected = list(got), list(expected)
    assert len(got) == len(expected)
    for g, e in zip(got, expected, strict=True):
        assert (g is None) == (e is None)
        assert g is None or torch.allclose(g, e, rtol=tolerance, atol=tolerance * float(e.detach().abs().max() + 1e-30))


def gradients(model, parameters, x, **kwargs):
    return torch.autograd.grad(model(x).pow(3).sum(), [x, *parameters], **kwargs)


def test_gradients_do_not_depend_on_whether_their_graph_is_kept(pair):
    layer, naive, x = pair
    x.requires_grad_()
    parameters = list(layer.parameters())
    expected = gradients(naive, parameters, x)
    close(gradients(layer, parameters, x), expected)
    close(gradients(layer, parameters, x, create_graph=True), expected)


def test_a_gradient_penalty_trains(pair):
    layer, naive, x = pair
    x.requires_grad_()
    parameters = list(layer.parameters())

    def penalty(model):
        first = gradients(model, parameters, x, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), [x, *parameters])

    close(penalty(layer), penalty(naive), 1e-9)


def test_gradgradcheck_through_the_router(pair):
    layer, _, x = pair
    names = [name for name, _ in layer.named_parameters()]
    leaves = [p.detach().clone().requires_grad_() for p in (x[:2], *layer.parameters())]

    def run(x, *values):
        return functional_call(layer, dict(zip(names, values, strict=True)), x)

    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, leaves, fast_mode=True)


IN_PLACE = {
    "relu": nn.ReLU(inplace=True),
    "hardswish": nn.Hardswish(inplace=True),
    "scale": lambda y: y.mul_(2),
    "write": lambda y: y[:, 0].zero_().add_(y[:, 1]).sum() + y,
}


@pytest.mark.parametrize("change", IN_PLACE.values(), ids=IN_PLACE)
def test_the_output_may_be_changed_in_place(pair, change):
    layer, naive, x = pair
    x.requires_grad_()
    parameters = list(layer.parameters())

    def run(model):
        return torch.autograd.grad(change(model(x)).square().sum(), [x, *parameters])

    close(run(layer), run(naive))


def test_input_changed_in_place_after_the_call_is_detected_or_harmless(pair):
    layer, naive, x = pair
    expected = torch.autograd.grad(naive(x.requires_grad_()).pow(3).sum(), list(layer.parameters()))
    changed = x * 1
    y = layer(changed)
    changed.add_(1)
    try:
        got = torch.autograd.grad(y.pow(3).sum(), list(layer.parameters()))
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
    else:  # the layer has read a copy: strided or padded
        close(got, expected)


def flat(tree):
    return list(tree.values()) if isinstance(tree, dict) else [tree]


def transformed(name, model, x):
    """What one of torch.func's transforms makes of a layer."""
    parameters = {n: p.detach() for n, p in model.named_parameters()}

    def call(parameters, x):
        return functional_call(model, parameters, x)

    def loss(parameters, x):
        return call(parameters, x).pow(3).sum()

    images = torch.stack([x, 2 * x])
    stacked = {n: torch.stack([p, 3 * p]) for n, p in parameters.items()}
    tangent = {n: torch.ones_like(p) for n, p in parameters.items()}
    func = torch.func
    return {
        "grad": lambda: flat(func.grad(loss)(parameters, x)),
        "grad-of-input": lambda: flat(func.grad(loss, argnums=1)(parameters, x)),
        "vmap": lambda: flat(func.vmap(call, (None, 0))(parameters, images)),
        "vmap-inner-axis": lambda: flat(func.vmap(call, (None, 2), 1)(parameters, images.movedim(0, 2))),
        "ensemble": lambda: flat(func.vmap(call, (0, None))(stacked, x)),
        "per-sample-grad": lambda: flat(func.vmap(func.grad(loss), (None, 0))(parameters, x[:, None])),
        "grad-of-vmap": lambda: flat(func.grad(lambda p: func.vmap(loss, (None, 0))(p, images).sum())(parameters)),
        "jvp": lambda: list(func.jvp(call, (parameters, x), (tangent, 2 * x))),
        "jvp-of-one": lambda: list(func.jvp(partial(call, parameters), (x,), (2 * x,))),
        "jacrev": lambda: flat(func.jacrev(call)(parameters, x[:1])),
        "jacfwd": lambda: flat(func.jacfwd(call, argnums=1)(parameters, x[:1, :, :3, :3])),
        "hessian": lambda: flat(func.hessian(loss, argnums=1)(parameters, x[:1, :, :3, :3])),
        "hvp": lambda: flat(func.grad(lambda x: flat(func.grad(loss, argnums=1)(parameters, x))[0].pow(2).sum())(x)),
    }[name]()


TRANSFORMS = ["grad", "grad-of-input", "vmap", "vmap-inner-axis", "ensemble", "per-sample-grad", "grad-of-vmap", "jvp",
              "jvp-of-one", "jacrev", "jacfwd", "hessian", "hvp"]  # fmt: skip


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_of_torch_func(pair, transform):
    layer, naive, x = pair
    # The names of parameters differ by the wrapper's prefix, their order does not.
    close(transformed(transform, layer, x), transformed(transform, naive, x), 1e-9)


@pytest.mark.parametrize("vectorize", [False, True])
def test_jacobians_of_autograd(pair, vectorize):
    layer, naive, x = pair
    got = torch.autograd.functional.jacobian(layer, x[:2], vectorize=vectorize)
    close([got], [torch.autograd.functional.jacobian(naive, x[:2])])


def test_forward_mode_of_autograd(pair):
    layer, naive, x = pair

    def directional(model):
        with torch.autograd.forward_ad.dual_level():
            y = model(torch.autograd.forward_ad.make_dual(x, 2 * x))
            return torch.autograd.forward_ad.unpack_dual(y).tangent

    close([directional(layer)], [directional(naive)])


def test_graphs_of_make_fx(pair):
    layer, naive, x = pair
    graph = torch.fx.experimental.proxy_tensor.make_fx(layer)(x)
    close([graph(2 * x)], [naive(2 * x)])


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(pair, reentrant):
    layer, naive, x = pair
    x.requires_grad_()
    parameters = list(layer.parameters())
    expected = torch.autograd.grad(naive(x).pow(3).sum(), parameters)
    checkpoint(layer, x, use_reentrant=reentrant).pow(3).sum().backward()
    close([p.grad for p in parameters], expected)


@pytest.mark.parametrize("inside", ["forward", "backward", "both", "second backward"])
def test_autocast_may_begin_and_end_between_forward_and_backward(pair, inside):
    layer, _, x = pair
    layer, x = layer.float(), x.float().requires_grad_()
    parameters = list(layer.parameters())
    autocast = partial(torch.autocast, "cpu", dtype=torch.bfloat16)
    with autocast(enabled=inside in ("forward", "both")):
        y = layer(x)
    grad = torch.ones_like(y)
    expected = torch.autograd.grad(y, [x, *parameters], grad, retain_graph=True)
    with autocast(enabled=inside in ("backward", "both")):
        got = torch.autograd.grad(y, [x, *parameters], grad, create_graph=inside == "second backward")
    # torch's matrix products follow autocast in backward, in nn.Linear too; its convolutions do not.
    for g, e in zip(got, expected, strict=True):
        assert g.dtype == e.dtype
        assert (g - e).abs().max() <= 2e-2 * e.abs().max()
    if inside == "second backward":
        with autocast():
            again = torch.autograd.grad(got[0].square().sum(), parameters, allow_unused=True, retain_graph=True)
        plain = torch.autograd.grad(got[0].square().sum(), parameters, allow_unused=True)
        assert [g is None for g in again] == [g is None for g in plain]
        assert all(g.isfinite().all() for g in again if g is not None)


def test_gradients_of_what_is_not_frozen(pair):
    layer, naive, x = pair
    parameters = list(layer.parameters())
    for wanted in itertools.product([False, True], repeat=len(parameters) + 1):
        if not any(wanted):
            continue
        x = x.detach().requires_grad_(wanted[0])
        for parameter, want in zip(parameters, wanted[1:], strict=True):
            parameter.requires_grad_(want)
        leaves = [leaf for leaf, want in zip([x, *parameters], wanted, strict=True) if want]
        expected = torch.autograd.grad(naive(x).pow(3).sum(), leaves)
        close(torch.autograd.grad(layer(x).pow(3).sum(), leaves), expected)


def test_an_empty_batch_gives_every_parameter_a_zero_gradient(pair):
    layer, _, x = pair
    for frozen in [None, *range(len(list(layer.parameters())))]:
        layer.zero_grad()
        for index, parameter in enumerate(layer.parameters()):
            parameter.requires_grad_(index != frozen)
        y = layer(x[:0])
        assert y.shape == (0, *layer(x).shape[1:]) and y.dtype == x.dtype
        if y.requires_grad or frozen is None:
            y.sum().backward()
            for index, parameter in enumerate(layer.parameters()):
                assert (parameter.grad is None) == (index == frozen)
                assert index == frozen or (parameter.grad == 0).all()


def test_an_empty_batch_under_autocast(pair):
    layer, _, x = pair
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer.float()(x[:0].float()).dtype == torch.bfloat16


def test_an_empty_batch_keeps_data_parallel_training_going(pair, tmp_path):
    layer, _, x = pair
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(layer)
        for batch in (x[:0], x, x[:0]):
            model(batch).sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    assert all(p.grad is not None for p in layer.parameters())


def test_network_gradients_match_with_and_without_create_graph():
    torch.manual_seed(0)
    model = parameternet.ParameterNet(width=0.2, num_classes=5, drop_rate=0.0).double()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)  # residual branches start at zero, and would hide their gradients
    x = torch.randn(2, 3, 40, 40, dtype=torch.float64, requires_grad=True)
    leaves = [x, *model.parameters()]
    loss = partial(lambda model: model(x).square().sum(), model.eval())
    close(torch.autograd.grad(loss(), leaves, create_graph=True), torch.autograd.grad(loss(), leaves), 1e-9)


def test_in_place_activations_all_through_a_network():
    torch.manual_seed(0)
    plain = parameternet.ParameterNet(width=0.2, num_classes=5, act_layer=nn.ReLU, drop_rate=0.0).double()
    changed = copy.deepcopy(plain)
    for module in changed.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = True
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    close(*([g for g in torch.autograd.grad(m(x).square().sum(), list(m.parameters()))] for m in (changed, plain)))
