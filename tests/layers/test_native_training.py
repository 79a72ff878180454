"""Native kernels in training, and with experts in 16 and 8 bits: the gradients and outputs of torch's operators."""

import copy
import itertools
import pickle
import subprocess
import sys
import threading
from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
from reference import assert_no_worse, naive_dynamic_conv2d
from test_native import (  # noqa: F401
    FOLDER,
    assert_exact,
    at_once,
    calls,
    close,
    frozen,
    fused_ghost,
    inputs,
    kernels,
    needs_library,
    operands,
    with_threads,
    without_kernels,
)
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from parameternet import DynamicConv, GhostModule, dynamic_conv2d, fuse
from parameternet.layers import Router, native
from parameternet.layers.compact import EXPERT_DTYPES, CompactConv
from parameternet.layers.static import DepthwiseConv

pytestmark = needs_library

GRADIENTS = ("pointwise_gradients", "depthwise_gradients", "depthwise_last_gradients")


@pytest.fixture
def gradient_calls(monkeypatch):
    """Names of the kernels of gradients that were called, in order."""
    called = []

    def counted(name):
        kernel = getattr(native, name)

        def call(*args, **kwargs):
            called.append(name)
            return kernel(*args, **kwargs)

        return call

    for name in GRADIENTS:
        monkeypatch.setattr(native, name, counted(name))
    return called


# ---------------------------------------------------------------------------------------------------------------------
# The kernels of gradients
# ---------------------------------------------------------------------------------------------------------------------

POSITIONS = [(1, 1), (2, 2), (1, 5), (3, 5), (1, 17), (7, 7), (8, 8), (9, 13), (14, 14), (24, 25), (25, 41)]
CHANNELS = [1, 3, 16, 17, 130]
OUT = [1, 2, 5, 7, 13, 40]
BATCHES = [1, 2, 5]
EXPERTS = [1, 2, 4, 5]
DEPTHWISE = [  # kernel, padding
    ((1, 1), (0, 0)),
    *(((3, 3), (p, p)) for p in (0, 1, 2)),
    *(((5, 5), (p, p)) for p in (0, 1, 2, 4)),
    *(((3, 5), padding) for padding in ((0, 0), (1, 1), (1, 2), (2, 4), (0, 3))),
    *(((7, 7), (p, p)) for p in (0, 1, 3, 6)),
]
MAPS = [(1, 1), (4, 4), (7, 7), (16, 16), (31, 33)]
NAMES = ("x", "weight", "routing_weights")


def given(batch, channels, out, experts, size, kernel=None, padding=(0, 0)):
    """Return x, weight, routing weights and the gradient of the output."""
    x, weight, routing_weights, _ = operands(batch, channels, out, experts, size, kernel)
    shrinks = (0, 0) if kernel is None else [k - 1 - 2 * p for k, p in zip(kernel, padding, strict=True)]
    return x, weight, routing_weights, torch.randn(batch, out, size[0] - shrinks[0], size[1] - shrinks[1])


def naive_gradients(tensors, of=NAMES, **conv):
    *leaves, grad = tensors
    leaves = [t.detach().requires_grad_(name in of) for t, name in zip(leaves, NAMES, strict=True)]
    return torch.autograd.grad(
        naive_dynamic_conv2d(*leaves, **conv), [t for t in leaves if t.requires_grad], grad_outputs=grad
    )


def assert_exact_gradients(name, results, *tensors, **conv):
    """Compare results, such as those of one and of two threads, with autograd of the naive loop."""
    exact = naive_gradients([t.double() for t in tensors], **conv)
    naive = list(naive_gradients(tensors, **conv))
    # Those of routing weights are long sums, which may cancel: allow a rounding of the sum of absolute values.
    (absolute,) = naive_gradients([t.abs() for t in tensors], of=NAMES[2:], **conv)
    naive[2] = naive[2] + torch.finfo(torch.float32).eps * absolute.max()
    for grads in results:
        for of, got, single, expected in zip(NAMES, grads, naive, exact, strict=True):
            assert got.shape == expected.shape and got.dtype == torch.float32, name
            assert_no_worse(f"gradient of {of}, {name}", got, single, expected)


@pytest.mark.parametrize("size", POSITIONS, ids=lambda size: f"{size[0] * size[1]}-positions")
def test_pointwise_gradients_are_as_exact_as_autograd_of_the_naive_loop(kernels, size):  # noqa: F811
    torch.manual_seed(0)
    turn = POSITIONS.index(size)
    # Each number of positions has other combinations, all of them together most.
    for i, out in enumerate(OUT):
        channels, batch = CHANNELS[(i + turn) % len(CHANNELS)], BATCHES[(i + turn // 2) % len(BATCHES)]
        experts = EXPERTS[(i + turn // 3) % len(EXPERTS)]
        tensors = given(batch, channels, out, experts, size)
        name = f"batch {batch}, {channels} -> {out} channels, {experts} experts"
        results = with_threads(lambda: kernels.pointwise_gradients(*tensors, True, True))  # noqa: B023
        assert_exact_gradients(name, results, *tensors)


@pytest.mark.parametrize(
    ("channels", "out", "size"),
    [(300, 310, (5, 5)), (700, 33, (7, 7)), (33, 700, (7, 7)), (24, 96, (23, 23)), (96, 24, (23, 23))],
)
def test_pointwise_gradients_of_many_channels_are_split_among_threads(kernels, channels, out, size):  # noqa: F811
    torch.manual_seed(0)
    tensors = given(2, channels, out, 3, size)
    results = with_threads(lambda: kernels.pointwise_gradients(*tensors, True, True))
    assert_exact_gradients("many channels", results, *tensors)


@pytest.mark.parametrize(("kernel", "padding"), DEPTHWISE, ids=str)
def test_depthwise_gradients_are_as_exact_as_autograd_of_the_naive_loop(kernels, kernel, padding):  # noqa: F811
    torch.manual_seed(0)
    turn = DEPTHWISE.index((kernel, padding))
    for i, size in enumerate(MAPS):
        if any(side + 2 * p < k for side, p, k in zip(size, padding, kernel, strict=True)):
            continue
        channels, batch = CHANNELS[(i + turn) % len(CHANNELS)], BATCHES[(i + turn // 2) % len(BATCHES)]
        if channels * size[0] * size[1] > 1 << 17:
            batch = 1
        experts = EXPERTS[(i + turn // 3) % len(EXPERTS)]
        tensors = given(batch, channels, channels, experts, size, kernel, padding)
        name = f"{size}, batch {batch}, {channels} channels, {experts} experts"
        results = with_threads(lambda: kernels.depthwise_gradients(*tensors, padding, True, True))  # noqa: B023
        assert_exact_gradients(name, results, *tensors, padding=padding, groups=channels)


KINDS = {  # the kernel, its options, and its operands
    "pointwise-few-positions": ("pointwise_gradients", (), (3, 17, 13, 3, (7, 7))),
    "pointwise-many-positions": ("pointwise_gradients", (), (2, 17, 7, 3, (24, 25))),
    "pointwise-many-positions-and-outputs": ("pointwise_gradients", (), (2, 19, 37, 3, (24, 25))),
    "depthwise-narrow": ("depthwise_gradients", ((1, 2),), (3, 5, 5, 3, (7, 6), (3, 5), (1, 2))),
    "depthwise-wide": ("depthwise_gradients", ((1, 0),), (2, 5, 5, 3, (19, 39), (5, 3), (1, 0))),
}


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def case(request, kernels):  # noqa: F811
    """Return a function of (x, weight, routing_weights, grad, of_x, of_weight), and its tensors."""
    torch.manual_seed(0)
    name, options, shapes = request.param

    def compute(*tensors, of_x=True, of_weight=True):
        return getattr(kernels, name)(*tensors, *options, of_x, of_weight)

    return compute, given(*shapes)


def test_only_the_needed_gradients_are_computed(case):
    compute, tensors = case
    whole = compute(*tensors)
    grad_x, *others = compute(*tensors, of_weight=False)
    assert torch.equal(grad_x, whole[0]) and others == [None, None]
    grad_x, *others = compute(*tensors, of_x=False)
    assert grad_x is None and all(map(torch.equal, others, whole[1:]))
    assert compute(*tensors, of_x=False, of_weight=False) == (None, None, None)


@pytest.mark.parametrize("threads", [1, 2])
def test_gradients_do_not_depend_on_what_is_in_memory(case, threads):
    compute, tensors = case
    first = at_once(threads, lambda: compute(*tensors))
    at_once(threads, lambda: compute(*(torch.full_like(t, float("nan")) for t in tensors)))
    assert all(map(torch.equal, at_once(threads, lambda: compute(*tensors)), first))


class Guarded(Tensor):
    """A tensor whose `new_empty` is surrounded by other numbers, all of them listed in `allocated`."""

    allocated: list[Tensor] = []  # noqa: RUF012
    MARGIN = 1000

    def new_empty(self, *shape):
        shape = torch.Size(shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape)
        whole = torch.full((shape.numel() + 2 * self.MARGIN,), 123.0)
        self.allocated.append(whole)
        return whole[self.MARGIN : -self.MARGIN].view(shape)


@pytest.mark.parametrize("threads", [1, 2])
def test_nothing_but_the_gradients_is_written(case, threads, monkeypatch):
    compute, tensors = case
    before, expected = [t.clone() for t in tensors], at_once(threads, lambda: compute(*tensors))
    monkeypatch.setattr(Guarded, "allocated", [])
    got = at_once(threads, lambda: compute(*(t.as_subclass(Guarded) for t in tensors)))
    assert all(map(torch.equal, got, expected))
    assert len(Guarded.allocated) >= 2
    for whole in Guarded.allocated:
        for margin in (whole[: Guarded.MARGIN], whole[-Guarded.MARGIN :]):
            assert (margin == 123).all()
        assert (whole != 123).sum() == whole.numel() - 2 * Guarded.MARGIN
    assert all(map(torch.equal, tensors, before))


@pytest.mark.parametrize("kind", inputs(1, 1, (1, 1)))
def test_inputs_of_gradients_may_be_slices_and_expanded(case, kind):
    compute, (x, *others) = case
    x = inputs(len(x), x.shape[1], x.shape[2:])[kind]
    others = [others[0], others[1][: len(x)], others[2][: len(x)]]
    copied = x.clone(memory_format=torch.contiguous_format)
    assert all(map(torch.equal, compute(x, *others), compute(copied, *others)))


def test_samples_of_gradients_do_not_depend_on_their_batch(case):
    compute, (x, weight, routing_weights, grad) = case
    whole = compute(x, weight, routing_weights, grad)
    each = [compute(x[[b]], weight, routing_weights[[b]], grad[[b]]) for b in range(len(x))]
    close(torch.cat([grads[0] for grads in each]), whole[0], 1e-6)
    close(sum(grads[1] for grads in each), whole[1], 1e-6)
    close(torch.cat([grads[2] for grads in each]), whole[2], 1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_sample_that_is_not_finite_spoils_only_its_own_gradients(case, value):
    compute, (x, weight, routing_weights, grad) = case
    whole = compute(x, weight, routing_weights, grad)
    broken = x.clone()
    broken[1, 2, 3, 4] = value
    grad_x, grad_weight, grad_routing = compute(broken, weight, routing_weights, grad)
    assert torch.equal(grad_x, whole[0])  # which does not depend on x
    assert not grad_weight.isfinite().all() and not grad_routing[1].isfinite().any()
    assert torch.equal(grad_routing[::2], whole[2][::2])
    broken = grad.clone()
    broken[1, 2, 3, 4] = value
    grad_x, grad_weight, grad_routing = compute(x, weight, routing_weights, broken)
    assert not grad_x[1].isfinite().all() and not grad_weight.isfinite().all() and not grad_routing[1].isfinite().any()
    assert torch.equal(grad_x[::2], whole[0][::2]) and torch.equal(grad_routing[::2], whole[2][::2])


# Places each operand and result before a page that must not be touched. Loads the module alone: it needs only torch.
AT_THE_END_OF_MEMORY = """
import ctypes, mmap, sys
from importlib.util import module_from_spec, spec_from_file_location
import torch

spec = spec_from_file_location("native_again", sys.argv[1])
native = module_from_spec(spec)
spec.loader.exec_module(native)
torch.set_num_threads(1)
C = ctypes.CDLL(None, use_errno=True)
kept = []

def room(count, dtype=torch.float32):
    # A tensor of `count` numbers that ends where readable memory does.
    size = torch.empty(0, dtype=dtype).element_size() * count
    pages = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, pages + mmap.PAGESIZE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    assert not C.mprotect(ctypes.c_void_p(whole.data_ptr() + pages), mmap.PAGESIZE, 0)
    kept.append((memory, whole))
    return whole[pages - size : pages].view(dtype)

class Last(torch.Tensor):
    def new_empty(self, *shape):
        shape = torch.Size(shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape)
        return room(shape.numel()).view(shape).as_subclass(Last)

def last(*shape, dtype=torch.float32):
    t = room(torch.Size(shape).numel(), dtype).view(shape)
    t.copy_(torch.randn(shape) if dtype.is_floating_point else torch.randint(0, 2, shape))
    return t.as_subclass(Last)

def channels_last(t):
    return last(t.shape[0], *t.shape[2:], t.shape[1]).copy_(t.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

most = native.level()
for native._available in range(1, most + 1):
    for channels, out, size in ((1, 1, (1, 1)), (3, 5, (1, 5)), (17, 2, (7, 7)), (33, 7, (3, 11)), (47, 40, (5, 10)),
                                (19, 7, (23, 23))):
        x, r, bias = last(2, channels, *size), last(2, 3), last(out)
        native.route(x, last(3, channels), last(3), True, True, 1.0)
        for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.uint8):
            width = channels + 8 * (dtype == torch.uint8)
            native.pointwise(x, last(3 * out, width, dtype=dtype), r, bias)
        weight, grad = last(3 * out, channels, 1, 1), last(2, out, *size)
        native.pointwise_gradients(x, weight, r, grad, True, True)
        both = channels > 1 and size != (1, 1)  # otherwise channels first and last are the same
        if both:
            native.pointwise_last(channels_last(x), weight, r, bias)
            native.pointwise_gradients(channels_last(x), weight, r, channels_last(grad), True, True)
        for kernel in (1, 3, 5):
            weight, pad = last(3 * channels, 1, kernel, kernel), kernel // 2
            native.depthwise(x, weight, r, last(channels), (pad, pad))
            native.depthwise_gradients(x, weight, r, last(2, channels, *size), (pad, pad), True, True)
            for stride in (1, 2) if both else ():
                axes = (stride, stride), (pad, pad), (1, 1)
                y = native.depthwise_last(channels_last(x), weight, r, last(channels), *axes)
                native.depthwise_last_gradients(channels_last(x), weight, r, channels_last(y), *axes, True, True)
        kept.clear()
print("no fault")
"""


def test_memory_beyond_tensors_is_not_touched():
    run = subprocess.run(
        [sys.executable, "-c", AT_THE_END_OF_MEMORY, str(FOLDER / "__init__.py")], capture_output=True, text=True
    )
    assert run.returncode == 0 and run.stdout == "no fault\n", f"exit {run.returncode}: {run.stderr}"


# ---------------------------------------------------------------------------------------------------------------------
# Layers in training
# ---------------------------------------------------------------------------------------------------------------------

LAYERS = {
    "pointwise": lambda: DynamicConv(8, 12),
    "pointwise-biases": lambda: DynamicConv(8, 5, bias=True, routing="softmax", num_experts=3),
    "depthwise": lambda: DynamicConv(8, 8, 3, groups=8),
    "depthwise-softmax": lambda: DynamicConv(8, 8, (3, 5), groups=8, padding=(0, 3), routing="softmax"),
}
X = (3, 8, 7, 9)


@pytest.fixture(params=LAYERS.values(), ids=LAYERS)
def layer(request):
    torch.manual_seed(0)
    return request.param()


@pytest.fixture
def x(layer):
    return torch.randn(X, requires_grad=True)


def gradients(layer, x, loss):
    """Backward from loss(output); return the gradients of x and all parameters by name, and clear them."""
    loss(layer(x)).backward()
    return taken(layer, x)


def taken(layer, x):
    leaves = {"x": x, **dict(layer.named_parameters())}
    found = {name: leaf.grad for name, leaf in leaves.items()}
    for leaf in leaves.values():
        leaf.grad = None
    return found


def assert_same(got, expected, tolerance=1e-5):
    assert got.keys() == expected.keys()
    for name, grad in got.items():
        assert (grad is None) == (expected[name] is None), name
        if grad is not None:
            close(grad, expected[name], tolerance)


def squares(y):
    return y.square().sum()


def fixed(y):
    """Other numbers for each position, the same on each call."""
    return torch.arange(y.numel()).view(y.shape).sin()


LOSSES = {
    "squares": squares,
    "sum": lambda y: 0.1 * y.sum(),
    "bare-sum": lambda y: y.sum(),
    "mean": lambda y: y.mean(),
    "mean-of-positions": lambda y: y.mean((2, 3)).square().sum(),
    "sum-of-channels": lambda y: y.sum(1).sin().sum(),
    "transposed": lambda y: (y.transpose(2, 3) * fixed(y.transpose(2, 3))).sum(),
    "channels-last": lambda y: (y * fixed(y).to(memory_format=torch.channels_last)).sum(),
    "permuted": lambda y: y.permute(1, 0, 2, 3).flatten(1).cos().sum(),
    "slice": lambda y: y[1:, ::2, :, 1:].exp().sum(),
    "one-number": lambda y: y[1, 2, 3, 4],
    "relu-in-place": lambda y: y.relu_().square().sum(),
    "changed-in-place": lambda y: y.mul_(2).add_(1).square().sum(),
    "twice": lambda y: (y * y.transpose(0, 1).flatten(0, 1).view(y.shape)).sum(),
    "negated": lambda y: torch.complex(y, y.sin()).conj().imag.sum(),
    "zero": lambda y: 0 * y.sum(),
    "convolved": lambda y: F.conv2d(y, torch.ones(4, y.shape[1], 3, 3).sin(), stride=2).square().sum(),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_gradients_are_those_without_kernels(layer, x, gradient_calls, loss):
    got = gradients(layer, x, loss)
    assert len(gradient_calls) == 1
    assert_same(got, without_kernels(lambda: gradients(layer, x, loss)))
    assert len(gradient_calls) == 1


def test_channels_last_gradients_of_a_channels_last_neighbour(layer, x, gradient_calls):
    after = nn.Conv2d(layer.out_channels, 4, 3).to(memory_format=torch.channels_last)

    def loss(y):
        return after(y.contiguous(memory_format=torch.channels_last)).square().sum()

    got = gradients(layer, x, loss)
    assert len(gradient_calls) == 1
    assert_same(got, without_kernels(lambda: gradients(layer, x, loss)))


def test_inputs_that_kernels_cannot_read_train_as_without(layer, gradient_calls):
    part = torch.randn(X[0], X[1] + 1, X[2], X[3]).to(memory_format=torch.channels_last)[:, 1:]
    turned = torch.randn(X[0], X[1], X[3], X[2]).transpose(2, 3)
    for x in (part, turned):
        x.requires_grad_()
        got = gradients(layer, x, squares)
        assert_same(got, without_kernels(lambda: gradients(layer, x, squares)))  # noqa: B023
    assert not gradient_calls


@pytest.mark.parametrize("kind", inputs(1, 1, (1, 1)))
def test_slices_and_expanded_inputs_train_in_kernels(layer, gradient_calls, kind):
    x = inputs(3, 8, (5, 7))[kind].requires_grad_()
    got = gradients(layer, x, squares)
    assert len(gradient_calls) == 1
    assert_same(got, without_kernels(lambda: gradients(layer, x, squares)))


TRAINED = [names for count in (1, 2, 3) for names in itertools.combinations(("x", "weight", "routing"), count)]


@pytest.mark.parametrize("trained", TRAINED, ids="+".join)
def test_some_of_the_tensors_may_be_frozen(layer, x, gradient_calls, trained):
    x.requires_grad_("x" in trained)
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(name.split(".")[0] in trained)
    got = gradients(layer, x, squares)
    assert len(gradient_calls) == 1
    assert {name.split(".")[0] for name, grad in got.items() if grad is not None} == set(trained)
    assert_same(got, without_kernels(lambda: gradients(layer, x, squares)))


def test_given_routing_weights_have_gradients(layer, x, gradient_calls):
    routing_weights = torch.rand(3, layer.num_experts, requires_grad=True)

    def run():
        return torch.autograd.grad(squares(layer(x, routing_weights)), (x, layer.weight, routing_weights))

    got = run()
    assert len(gradient_calls) == 1
    for grad, expected in zip(got, without_kernels(run), strict=True):
        close(grad, expected)
    (alone,) = torch.autograd.grad(squares(layer(x.detach(), routing_weights)), routing_weights)
    assert torch.equal(alone, got[2])


def test_gradients_of_gradients_are_torchs(layer, x, gradient_calls):
    leaves = (x, layer.weight, *layer.routing.parameters())

    def run():
        first = torch.autograd.grad(layer(x).sin().sum(), leaves, create_graph=True)
        assert not gradient_calls
        # This passes through the layer's first backward, in torch's operators, and through its output once more.
        return first + torch.autograd.grad(sum(grad.square().sum() for grad in first), leaves)

    got = run()
    assert len(gradient_calls) == 1
    gradient_calls.clear()
    for grad, expected in zip(got, without_kernels(run), strict=True):
        close(grad, expected)
    plain = torch.autograd.grad(layer(x).sin().sum(), leaves)
    assert len(gradient_calls) == 1
    for grad, expected in zip(plain, got, strict=False):
        close(grad, expected)


def test_gradgradcheck_does_not_meet_the_kernels(layer, gradient_calls):
    layer.double()
    x = torch.randn(2, 8, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(layer, (x,), fast_mode=True)
    assert not gradient_calls


def test_two_backward_passes_add_up(layer, x, gradient_calls):
    once = gradients(layer, x, squares)
    for _ in range(2):
        squares(layer(x)).backward()
    assert_same(taken(layer, x), {name: 2 * grad for name, grad in once.items()}, 0)
    loss = squares(layer(x))
    loss.backward(retain_graph=True)
    loss.backward()
    assert_same(taken(layer, x), {name: 2 * grad for name, grad in once.items()}, 0)
    assert len(gradient_calls) == 5


def test_a_gradient_does_not_change_with_the_next_backward_pass(layer, x):
    leaves = (x, layer.weight)
    first = torch.autograd.grad(squares(layer(x)), leaves)
    copies = [grad.clone() for grad in first]
    torch.autograd.grad(layer(2 * x).sum(), leaves)
    assert all(map(torch.equal, first, copies))


def test_checkpoints_have_the_same_gradients(layer, x, gradient_calls):
    expected = gradients(layer, x, squares)
    squares(checkpoint(layer, x, use_reentrant=False)).backward()
    got = taken(layer, x)
    assert_same(got, expected, 0)
    assert len(gradient_calls) == 2


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_train_alike_and_apart(layer, x, copied):
    expected, other = gradients(layer, x, squares), copied(layer)
    assert_same(gradients(other, x, squares), expected, 0)
    assert all(p.grad is None for p in layer.parameters())


def test_hooks_of_tensors_see_and_change_gradients(layer, x, gradient_calls):
    def run():
        seen, grads = [], {}

        def change(grad, factor):
            seen.append(grad.clone())
            return factor * grad.transpose(-1, -2).contiguous().transpose(-1, -2)

        def loss(y):
            y.register_hook(partial(change, factor=2))
            return squares(y)

        handles = [leaf.register_hook(partial(change, factor=3)) for leaf in (x, layer.weight)]
        handles.append(layer.weight.register_post_accumulate_grad_hook(lambda p: grads.update(post=p.grad.clone())))
        grads.update(gradients(layer, x, loss))
        for handle in handles:
            handle.remove()
        return grads, seen

    (got, got_seen), (expected, expected_seen) = run(), without_kernels(run)
    assert len(gradient_calls) == 1 and len(got_seen) == 3
    assert_same(got, expected)
    assert torch.equal(got["post"], got["weight"])
    assert sorted(t.shape for t in got_seen) == sorted(t.shape for t in expected_seen)
    plain = gradients(layer, x, squares)
    close(got["x"], 6 * plain["x"])
    close(got["weight"], 6 * plain["weight"])


def test_module_hooks_see_the_gradient_of_the_output(layer, x):
    seen = []
    handle = layer.register_full_backward_hook(lambda module, grad_input, grad_output: seen.append(grad_output[0]))
    gradients(layer, x, lambda y: y.sum())
    handle.remove()
    assert len(seen) == 1 and (seen[0] == 1).all()


@pytest.mark.parametrize("precision", ["same", "bfloat16", "channels-last"])
def test_saved_tensors_may_be_packed(layer, x, gradient_calls, precision):
    def unpack(t):
        return t.float() if precision == "bfloat16" else t

    def pack(t):
        if precision == "channels-last" and t.ndim == 4:
            return t.contiguous(memory_format=torch.channels_last)
        return t.to(torch.bfloat16) if precision == "bfloat16" else t.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        y = layer(x)
    squares(y).backward()
    assert_same(taken(layer, x), gradients(layer, x, squares), 0.05 if precision == "bfloat16" else 1e-5)
    # In channels last there is no kernel for fewer samples than experts.
    assert len(gradient_calls) >= (1 if precision == "channels-last" else 2)


@pytest.mark.parametrize("changed", ["x", "weight"])
def test_a_change_in_place_before_backward_is_an_error(layer, x, changed):
    values = 1 * x
    y = layer(values)
    with torch.no_grad():
        (values if changed == "x" else layer.weight).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_torch_func_has_the_same_gradients(layer, x, gradient_calls):
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(parameters, x):
        return squares(functional_call(layer, parameters, x))

    expected = gradients(layer, x, squares)
    assert len(gradient_calls) == 1
    got, got_x = torch.func.grad(loss, argnums=(0, 1))(parameters, x.detach())
    assert_same({"x": got_x, **got}, expected)

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x.detach()[:, None])
    assert len(gradient_calls) == 1
    for b, image in enumerate(x.detach().split(1)):
        expected = gradients(layer, image.requires_grad_(), squares)
        assert_same({name: grad[b] for name, grad in each.items()}, {name: expected[name] for name in each})
    assert len(gradient_calls) == 4


def test_under_autocast_depthwise_layers_meet_the_kernels(layer, x, gradient_calls):
    def run():
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        assert y.dtype == torch.bfloat16
        y.float().square().sum().backward()
        return taken(layer, x)

    got = run()
    depthwise = layer.groups > 1
    assert gradient_calls == ["depthwise_gradients"] * depthwise
    assert_same(got, without_kernels(run), 0.02 if depthwise else 1e-6)
    assert_same(got, gradients(layer, x, squares), 0.05)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last], ids=str)
def test_gradients_of_depthwise_layers_in_half_precision_are_rounded_once(gradient_calls, dtype, form):
    torch.manual_seed(0)
    x = torch.randn(4, 6, 9, 8, dtype=dtype).contiguous(memory_format=form)
    tensors = [t.requires_grad_() for t in (x, torch.randn(18, 1, 3, 3, dtype=dtype), torch.rand(4, 3, dtype=dtype))]
    slope = torch.randn_like(x)
    got = torch.autograd.grad(dynamic_conv2d(*tensors, padding=1, groups=6), tensors, slope)
    name = "depthwise_gradients" if form is torch.contiguous_format else "depthwise_last_gradients"
    assert gradient_calls == [name]
    assert got[0].is_contiguous(memory_format=form)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    expected = torch.autograd.grad(dynamic_conv2d(*exact, padding=1, groups=6), exact, slope.double())
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.dtype == dtype
        close(ours.double(), theirs, torch.finfo(dtype).eps)


@pytest.mark.parametrize(
    ("conv", "kernel"),
    [({}, 3), ({"stride": (2, 1)}, 3), ({"stride": 3, "padding": 2}, 5), ({"padding": (0, 1)}, 3), ({"padding": 1}, 2)],
    ids=str,
)
@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last], ids=str)
def test_static_depthwise_convolutions_in_half_precision_have_native_gradients(gradient_calls, conv, kernel, form):
    x, layer = static_depthwise(kernel=kernel, form=form, **conv)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    slope = torch.randn_like(y)
    got = torch.autograd.grad(y, (x, layer.weight), slope)
    assert gradient_calls == ["depthwise_gradients" if form is torch.contiguous_format else "depthwise_last_gradients"]
    assert got[0].is_contiguous(memory_format=form)
    exact = F.conv2d(x.double(), layer.weight.double(), None, layer.stride, layer.padding, 1, layer.groups)
    expected = torch.autograd.grad(exact, (x, layer.weight), slope.double())
    for ours, theirs in zip(got, expected, strict=True):
        close(ours, theirs, tolerance=2**-8)  # one rounding to bfloat16


@pytest.mark.parametrize(
    ("conv", "kernel"), [({}, 3), ({"stride": (2, 1)}, 3), ({"stride": 3, "padding": 2, "dilation": 2}, 5)], ids=str
)
def test_static_depthwise_convolutions_in_channels_last_have_native_gradients(gradient_calls, conv, kernel):
    x, layer = static_depthwise(kernel=kernel, form=torch.channels_last, **conv)
    y = layer(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    slope = torch.randn_like(y)
    got = torch.autograd.grad(y, (x, layer.weight), slope)
    assert gradient_calls == ["depthwise_last_gradients"]
    assert got[0].is_contiguous(memory_format=torch.channels_last)
    exact = F.conv2d(x.double(), layer.weight.double(), None, layer.stride, layer.padding, layer.dilation, layer.groups)
    expected = torch.autograd.grad(exact, (x, layer.weight), slope.double())
    for ours, theirs in zip(got, expected, strict=True):
        close(ours, theirs.float())


@pytest.mark.parametrize(
    "conv", [{"padding": 3}, {"dilation": 2}, {"batch": 1}, {"batch": 1, "form": torch.channels_last}], ids=str
)
def test_static_depthwise_convolutions_beyond_the_kernels_have_torchs_gradients(gradient_calls, conv):
    x, layer = static_depthwise(**conv)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    y.backward(torch.randn_like(y))
    assert gradient_calls == []
    assert x.grad.isfinite().all() and layer.weight.grad.isfinite().all()


def test_static_depthwise_convolutions_take_expanded_gradients(gradient_calls):
    x, layer = static_depthwise()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    slope = torch.ones((), dtype=y.dtype).expand_as(y)
    expanded = torch.autograd.grad(y, (x, layer.weight), slope, retain_graph=True)
    dense = torch.autograd.grad(y, (x, layer.weight), slope.contiguous())
    assert gradient_calls == ["depthwise_gradients"] * 2
    for got, expected in zip(expanded, dense, strict=True):
        close(got, expected, tolerance=2**-7)


def static_depthwise(kernel=3, form=torch.contiguous_format, batch=4, size=(9, 8), padding=1, **conv):
    """Return an input and a static depthwise layer, with numbers that bfloat16 has."""
    torch.manual_seed(0)
    layer = DepthwiseConv(6, 6, kernel, padding=padding, groups=6, bias=False, **conv)
    with torch.no_grad():
        layer.weight.copy_(layer.weight.bfloat16())
    x = torch.randn(batch, 6, *size).bfloat16().float()
    return x.contiguous(memory_format=form).requires_grad_(), layer


def test_backward_in_autocast_is_that_outside(layer, x, gradient_calls):
    routing_weights = torch.rand(3, layer.num_experts)  # the router's gradients are torch's
    given = partial(layer, routing_weights=routing_weights)
    squares(given(x)).backward()
    expected, loss = taken(layer, x), squares(given(x))
    with torch.autocast("cpu", torch.bfloat16):
        loss.backward()
    got = taken(layer, x)
    assert torch.equal(got["x"], expected["x"]) and torch.equal(got["weight"], expected["weight"])
    assert len(gradient_calls) == 2


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_of_python_train_at_the_same_time(threads):
    torch.manual_seed(0)
    jobs = []
    for size in ((7, 7), (25, 25), (13, 40)):
        net = nn.Sequential(DynamicConv(8, 16), nn.ReLU(True), DynamicConv(16, 16, 5, groups=16), DynamicConv(16, 40))
        x = torch.randn(3, 8, *size, requires_grad=True)
        jobs.append((net, x, gradients(net, x, squares)))
    wrong = []

    def train(net, x, expected):
        torch.set_num_threads(threads)  # a setting of each thread
        for _ in range(3):
            try:
                assert_same(gradients(net, x, squares), expected)
            except AssertionError as error:
                wrong.append(error)

    workers = [threading.Thread(target=train, args=job) for job in jobs]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    # With drawn softmax routers, the gradients of this untrained network are ten times as large, and rounding grows.
    model = timm.create_model("parameternet_50m", num_classes=5, routing="sigmoid").train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # residual branches start at zero, and would hide errors
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return model


def loss_of(model, dtype=torch.float32):
    torch.manual_seed(1)
    images, labels = torch.randn(16, 3, 32, 32), torch.arange(16) % 5
    return F.cross_entropy(model(images.to(dtype)), labels)


def test_a_network_trains_as_without_kernels(network, gradient_calls):
    def train():
        model, losses = copy.deepcopy(network), []
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)  # larger steps amplify the rounding of any form
        for _ in range(3):
            loss = loss_of(model)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    got = train()
    assert set(gradient_calls) == set(GRADIENTS)
    assert min(abs(a - b) for a, b in itertools.pairwise(got)) > 1e-3
    assert got == pytest.approx(without_kernels(train), rel=0, abs=1e-4)


def test_gradients_of_a_network_are_as_exact_as_without_kernels(network, kernels, gradient_calls):  # noqa: F811
    def run(dtype=torch.float32):
        model = copy.deepcopy(network).to(dtype)
        loss_of(model, dtype).backward()
        return {name: p.grad.double() for name, p in model.named_parameters()}

    def error(grads):
        return max((grads[name] - grad).norm() / grad.norm() for name, grad in exact.items())

    got, exact = run(), run(torch.float64)
    assert set(gradient_calls) == set(GRADIENTS)
    assert error(got) <= 3 * error(without_kernels(run)) + 1e-6


# ---------------------------------------------------------------------------------------------------------------------
# Experts in 16 and 8 bits
# ---------------------------------------------------------------------------------------------------------------------

ROW_LENGTHS = [32, 33, 47, 64, 100]


def made(channels, out=7, experts=3, expert_dtype="int8"):
    torch.manual_seed(0)
    conv = DynamicConv(channels, out, num_experts=experts)
    conv.output_bias = nn.Parameter(torch.randn(out))
    return CompactConv(frozen(conv), expert_dtype), conv


def stored(compact):
    """The experts that a layer stores, in float64."""
    rows, shape = compact.weight, (-1, compact.in_channels, 1, 1)
    if rows.dtype != torch.uint8:
        return rows.double().view(shape)
    scales = rows[:, -8:].contiguous().view(torch.float32).double()
    return (rows[:, :-8].double() * scales[:, :1] + scales[:, 1:]).view(shape)


@pytest.mark.parametrize("channels", ROW_LENGTHS)
@pytest.mark.parametrize("expert_dtype", EXPERT_DTYPES)
@torch.no_grad()
def test_compact_experts_are_mixed_in_float32(kernels, calls, channels, expert_dtype):  # noqa: F811
    turn = ROW_LENGTHS.index(channels)
    for i, (batch, size) in enumerate(((1, (1, 5)), (3, (7, 7)), (3, (9, 13)), (1, (16, 33)))):
        compact, conv = made(channels, [7, 24, 5][(i + turn) % 3], [1, 3, 4, 5][(i + turn) % 4], expert_dtype)
        x, routing_weights = torch.randn(batch, channels, *size), torch.rand(batch, compact.num_experts)
        experts = stored(compact)
        assert_no_worse("experts", compact.experts().float(), experts.float(), experts)
        results = with_threads(lambda: compact(x, routing_weights))  # noqa: B023
        assert calls == ["pointwise"] * 2
        assert_exact(f"batch {batch}, {size}", results, x, experts, routing_weights, conv.output_bias)
        # torch's operators mix 16 bits in 16 bits.
        tolerance = {"int8": 1e-5, "float16": 3e-3, "bfloat16": 3e-2}[expert_dtype]
        close(results[0], without_kernels(lambda: compact(x, routing_weights)), tolerance)  # noqa: B023
        calls.clear()
        got = compact(x)
        assert calls == ["route", "pointwise"]
        close(got, without_kernels(lambda: compact(x)), tolerance)  # noqa: B023
        calls.clear()


@pytest.mark.parametrize("expert_dtype", EXPERT_DTYPES)
def test_fused_networks_with_compact_experts_compute_the_same(kernels, calls, expert_dtype):  # noqa: F811
    torch.manual_seed(0)
    model = nn.Sequential(
        DynamicConv(33, 47), nn.BatchNorm2d(47), nn.ReLU(), DynamicConv(47, 47, 3, groups=47), DynamicConv(47, 10)
    )
    model = frozen(fuse(model.eval(), expert_dtype=expert_dtype))
    assert [type(m) for m in (model[0], model[3], model[4])] == [CompactConv, DynamicConv, CompactConv]
    assert model[0].output_bias is not None
    x = torch.randn(3, 33, 7, 9)
    got = model(x)
    assert calls == ["route", "pointwise", "route", "depthwise", "route", "pointwise"]
    tolerance = {"int8": 1e-5, "float16": 3e-3, "bfloat16": 3e-2}[expert_dtype]
    close(got, without_kernels(lambda: model(x)), tolerance)


@pytest.mark.parametrize("expert_dtype", EXPERT_DTYPES)
@torch.no_grad()
def test_a_ghost_module_with_compact_experts_computes_the_same(kernels, calls, expert_dtype):  # noqa: F811
    torch.manual_seed(0)
    ghost = frozen(fuse(nn.Sequential(fused_ghost(37, 24)).eval(), expert_dtype=expert_dtype))
    assert type(ghost[0].primary_conv[0]) is CompactConv
    x = torch.randn(3, 37, 7, 9)
    got = ghost(x)
    assert calls == ["route", "pointwise", "route", "depthwise"]
    close(got, without_kernels(lambda: ghost(x)), {"int8": 1e-5, "float16": 3e-3, "bfloat16": 3e-2}[expert_dtype])


@pytest.mark.parametrize("more", [0, 1])
@pytest.mark.parametrize("expert_dtype", EXPERT_DTYPES)
@torch.no_grad()
def test_more_experts_than_kernels_take_are_left_to_torch(kernels, calls, more, expert_dtype):  # noqa: F811
    compact, conv = made(33, 2, native.MOST_COMPACT_EXPERTS + more, expert_dtype)
    x, routing_weights = torch.randn(2, 33, 5, 5), torch.rand(2, compact.num_experts)
    got = compact(x, routing_weights)
    assert ("pointwise" in calls) is (more == 0)
    if more == 0:
        assert_exact("output", [got], x, stored(compact), routing_weights, conv.output_bias)
    expected = naive_dynamic_conv2d(x.double(), stored(compact), routing_weights.double())
    expected = (expected + conv.output_bias.double()[:, None, None]).float()
    close(got, expected, {"int8": 1e-5, "float16": 1e-2, "bfloat16": 1e-1}[expert_dtype])


@pytest.mark.parametrize("expert_dtype", EXPERT_DTYPES)
@torch.no_grad()
def test_copies_of_compact_experts_compute_the_same(calls, expert_dtype):  # noqa: F811
    compact, _ = made(47, expert_dtype=expert_dtype)
    x = torch.randn(3, 47, 7, 7)
    expected = compact(x)
    other, _ = made(47, expert_dtype=expert_dtype)
    for value in other.state_dict().values():
        value.zero_()
    assert not torch.equal(other(x), expected)
    other.load_state_dict(compact.state_dict())
    for again in (other, pickle.loads(pickle.dumps(compact)), copy.deepcopy(compact)):
        calls.clear()
        assert torch.equal(again(x), expected)
        assert calls == ["route", "pointwise"]


@pytest.mark.parametrize("channels", ROW_LENGTHS)
@pytest.mark.parametrize("expert_dtype", EXPERT_DTYPES)
@torch.no_grad()
def test_rows_at_the_end_of_a_buffer_are_read_alone(kernels, calls, channels, expert_dtype):  # noqa: F811
    compact, _ = made(channels, expert_dtype=expert_dtype)
    x, routing_weights = torch.randn(2, channels, 5, 7), torch.rand(2, compact.num_experts)
    expected, rows, results = compact(x, routing_weights), compact.weight, []
    before = 3  # so that rows of 8 bits begin anywhere
    for around, after in ((0, 0), (77, 0), (77, 64), (0, 64)):
        whole = torch.full((before + rows.numel() + after,), around, dtype=rows.dtype)
        view = whole[before : before + rows.numel()].view(rows.shape)
        view.copy_(rows)
        compact.weight = view
        results.append(compact(x, routing_weights))
    assert calls == ["pointwise"] * 5
    assert all(torch.equal(got, expected) for got in results)


@pytest.mark.parametrize("expert_dtype", EXPERT_DTYPES)
@torch.no_grad()
def test_compact_experts_of_few_positions_strides_and_biases_are_left_to_torch(calls, expert_dtype):  # noqa: F811
    torch.manual_seed(0)
    tolerance = {"int8": 1e-5, "float16": 3e-3, "bfloat16": 3e-2}[expert_dtype]
    for options, size in (({}, (2, 2)), ({"stride": 2}, (7, 7)), ({"bias": True}, (7, 7)), ({"padding": 1}, (7, 7))):
        conv = frozen(DynamicConv(33, 7, **options))
        compact, x = CompactConv(conv, expert_dtype), torch.randn(2, 33, *size)
        got = compact(x)
        assert calls == ["route"]
        calls.clear()
        conv.weight.copy_(compact.experts())
        close(got, without_kernels(lambda: conv(x)), tolerance)  # noqa: B023


def other_number(factor):
    return lambda router, args, out: torch.cat([out] * 2, 1)[:, : factor * out.shape[1] // 2].contiguous()


@pytest.mark.parametrize("factor", [1, 3, 4])
def test_a_router_with_another_number_of_experts_is_refused(factor):
    layers = [
        DynamicConv(32, 8, num_experts=2, routing_norm="none"),
        CompactConv(DynamicConv(32, 8, num_experts=2), "int8"),
        fuse(GhostModule(32, 8, num_experts=2).eval()),
    ]
    for layer in layers[1:] if factor in (1, 4) else layers:  # 1 and 4 experts can share 16 kernels
        layer.eval().requires_grad_(False)
        for router in [m for m in layer.modules() if isinstance(m, Router)][-1:]:
            router.register_forward_hook(other_number(factor))
        with torch.no_grad(), pytest.raises(ValueError, match="expected routing_weights of shape"):
            layer(torch.randn(2, 32, 5, 5))
