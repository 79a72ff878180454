"""Random small networks, drawn from layers and from ways to use them: surgery keeps their function."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from timm.layers import BatchNormAct2d, Conv2dSame
from torch import nn
from torch.utils.checkpoint import checkpoint

from parameternet import DynamicConv
from parameternet.surgery import collapse, fuse, upcycle

CHANNELS = 4
CONVS = {
    "pointwise": lambda: nn.Conv2d(CHANNELS, CHANNELS, 1),
    "dense": lambda: nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False),
    "depthwise": lambda: nn.Conv2d(CHANNELS, CHANNELS, 3, padding="same", groups=CHANNELS),
    "same": lambda: Conv2dSame(CHANNELS, CHANNELS, 3),
    "reflect": lambda: nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, padding_mode="reflect"),
    "dynamic": lambda: DynamicConv(CHANNELS, CHANNELS, 3, bias=True),
    "transposed": lambda: nn.ConvTranspose2d(CHANNELS, CHANNELS, 1),
}
NORMS = {
    "plain": lambda: nn.BatchNorm2d(CHANNELS),
    "without scale": lambda: nn.BatchNorm2d(CHANNELS, affine=False),
    "of batches": lambda: nn.BatchNorm2d(CHANNELS, track_running_stats=False),
    "with activation": lambda: BatchNormAct2d(CHANNELS, drop_layer=nn.Dropout2d),
    "synchronised": lambda: nn.SyncBatchNorm(CHANNELS),
    "none": nn.Identity,
}
ALTERATIONS = {
    "nothing": lambda layer: None,
    "forward": lambda layer: _replace_forward(layer),
    "hook": lambda layer: layer.register_forward_hook(lambda module, inputs, output: output.tanh()),
    "pre-hook": lambda layer: layer.register_forward_pre_hook(lambda module, inputs: (inputs[0].tanh(),)),
    "weight norm": lambda layer: (
        nn.utils.parametrizations.weight_norm(layer) if getattr(layer, "weight", None) is not None else None
    ),
}


def _replace_forward(layer):
    original = layer.forward
    layer.forward = lambda x: original(x).tanh()


class Way(nn.Module):
    """A convolution and a norm, used in one of many ways."""

    def __init__(self, conv, norm, name):
        super().__init__()
        self.conv, self.norm, self.name = conv, norm, name

    def forward(self, x):
        return getattr(self, self.name)(x)

    def after(self, x):
        return self.norm(self.conv(x))

    def residual(self, x):
        y = self.conv(x)
        return self.norm(y) + y

    def weight(self, x):
        return self.norm(self.conv(x)) + self.conv.weight.mean()

    def missing_bias(self, x):
        return self.norm(self.conv(x)) + (1.0 if self.conv.bias is None else 2.0)

    def twice(self, x):
        return self.norm(self.conv(self.norm(self.conv(x))))

    def functional(self, x):
        norm = self.norm
        if getattr(norm, "running_mean", None) is None:
            return norm(self.conv(x))
        return F.batch_norm(self.conv(x), norm.running_mean, norm.running_var) + norm(x)

    def decided(self, x):
        return self.norm(self.conv(x)) if x.sum() > 0 else self.conv(x)

    def looked_at(self, x):
        return self.norm(self.conv(x)) if float(x.sum()) > 0 else self.conv(x)

    def one_by_one(self, x):
        return torch.cat([self.norm(self.conv(one)) for one in x.split(1)])

    def recomputed(self, x):
        return checkpoint(self.after, x, use_reentrant=False)

    def in_place(self, x):
        return self.norm(self.conv(x).tanh_())

    def activated(self, x):
        return getattr(self.norm, "act", F.relu)(self.norm(self.conv(x)))

    def dtype(self, x):
        return self.norm(self.conv(x.to(self.conv.weight.dtype)))


WAYS = [name for name in vars(Way) if not name.startswith("_") and name != "forward"]


@st.composite
def blocks(draw):
    conv, norm = CONVS[draw(st.sampled_from(sorted(CONVS)))](), NORMS[draw(st.sampled_from(sorted(NORMS)))]()
    way = Way(conv, norm, draw(st.sampled_from(WAYS)))
    ALTERATIONS[draw(st.sampled_from(["nothing", "nothing", *ALTERATIONS]))](conv)
    ALTERATIONS[draw(st.sampled_from(["nothing", "nothing", "nothing", "forward", "hook"]))](norm)
    return way


@st.composite
def networks(draw):
    torch.manual_seed(draw(st.integers(0, 9)))
    layers = [nn.Conv2d(CHANNELS, CHANNELS, 1)]
    for _ in range(draw(st.integers(1, 3))):
        block = draw(st.sampled_from(layers)) if draw(st.integers(0, 9)) == 0 else draw(blocks())
        layers += [block, nn.Hardtanh()]
    if draw(st.booleans()) and len(layers) > 3 and isinstance(layers[-2], Way) and isinstance(layers[1], Way):
        one, other = layers[1].conv, layers[-2].conv
        same = type(one) is type(other) and "weight" in one._parameters and "weight" in other._parameters
        if same and one.weight.shape == other.weight.shape:
            other.weight = one.weight
    network = nn.Sequential(*layers)
    for module in network.modules():
        if getattr(module, "running_mean", None) is not None:
            module.running_mean.normal_(0, 0.5)
            module.running_var.uniform_(0.5, 2)
        if getattr(module, "running_mean", None) is not None and module.affine:
            nn.init.normal_(module.weight, 1, 0.3)
            nn.init.normal_(module.bias, 0, 0.3)
    return network.double().eval()


def images():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, CHANNELS, 5, 6, dtype=torch.float64, generator=generator)
    return x, x.abs(), -x.abs()


@torch.no_grad()
def assert_same(got, wanted):
    for x in images():
        expected = wanted(x)
        assert (got(x) - expected).abs().max() <= 1e-10 * expected.abs().max().clamp_min(1)


drawn = settings(
    max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None
)


@drawn
@given(networks())
def test_fuse_keeps_the_function(model):
    fused = fuse(model)
    assert_same(fused, model)
    assert_same(fuse(fused), model)
    assert_same(copy.deepcopy(fused), model)


@drawn
@given(networks())
def test_upcycle_keeps_the_function_or_says_that_there_is_nothing(model):
    try:
        dynamic = upcycle(model, stem=True, noise=0.5)
    except ValueError as error:
        assert "can be converted" in str(error)
        return
    assert_same(dynamic, model)
    assert_same(fuse(dynamic), model)
    back, _ = collapse(dynamic, images(), tolerance=1e-12)
    assert_same(back, model)


def test_random_networks_can_be_folded_and_converted():
    model = nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 1), Way(CONVS["dense"](), NORMS["plain"](), "after")).eval()
    assert len(fuse(model).fusing.folded) == len(upcycle(model).upcycling.converted) == 1
    with pytest.raises(ValueError, match="can be converted"):
        upcycle(nn.Sequential(nn.Identity()))
