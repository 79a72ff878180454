"""The forms of a DynamicConv against the layer itself, without any file."""

import copy

import pytest
import torch
from torch import nn

from parameternet.export import forms
from parameternet.layers import DynamicConv
from parameternet.surgery import fuse

CASES = {
    "pointwise": dict(in_channels=6, out_channels=10),
    "strided-pointwise": dict(in_channels=6, out_channels=10, stride=2),
    "depthwise-odd-channels": dict(in_channels=11, out_channels=11, groups=11, kernel_size=3),
    "depthwise-whole-blocks": dict(in_channels=16, out_channels=16, groups=16, kernel_size=5, stride=2),
    "dense": dict(in_channels=16, out_channels=5, kernel_size=3, stride=2, dilation=2, bias=True),
    "dense-oblong": dict(in_channels=17, out_channels=4, kernel_size=(2, 3), stride=(3, 1), padding=(1, 0)),
    "groups": dict(in_channels=6, out_channels=4, groups=2, kernel_size=3, dilation=2),
    "oblong": dict(in_channels=4, out_channels=5, kernel_size=(1, 3), stride=(1, 2), padding=(0, 1)),
    "same-padding": dict(in_channels=4, out_channels=5, kernel_size=3, stride=2, padding="same"),
    "bias": dict(in_channels=4, out_channels=5, kernel_size=3, bias=True),
    "softmax-perceptron": dict(in_channels=4, out_channels=5, routing="softmax", routing_hidden=3, temperature=2.0),
    "one-expert": dict(in_channels=4, out_channels=5, num_experts=1, bias=True),
    "one-expert-depthwise": dict(in_channels=11, out_channels=11, groups=11, kernel_size=3, num_experts=1),
    "one-expert-dense": dict(in_channels=16, out_channels=5, kernel_size=3, padding="same", stride=2, num_experts=1),
}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_form_is_the_layer(case, fused, batch):
    torch.manual_seed(0)
    conv = DynamicConv(**case)
    norm = nn.BatchNorm2d(conv.out_channels)
    with torch.no_grad():
        norm.running_mean.normal_(), norm.running_var.uniform_(0.5, 2), conv.routing.weight.normal_(std=2)
    model = nn.Sequential(conv, norm if fused else nn.Identity()).eval()
    size = (conv.in_channels, 13, 9)
    x = torch.randn(batch, *size)
    with torch.no_grad():
        expected = model(x)
        written = [
            write(fuse(model), gate_outputs)
            for write in (forms.write_constant, forms.write_batched)
            for gate_outputs in (False, True)
        ]
        if batch == 1:
            written += [forms.write_computed(fuse(model), size, mix_by_conv) for mix_by_conv in (True, False)]
        for form in written:
            assert not any(isinstance(module, DynamicConv) for module in form.modules())
            torch.testing.assert_close(form(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_forms_of_half_precision_layers(case, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(DynamicConv(**case)).eval().to(dtype)
    size = (case["in_channels"], 13, 9)
    x = torch.randn(1, *size).to(dtype)
    with torch.no_grad():
        expected = model(x)
        for form in (
            forms.write_constant(copy.deepcopy(model)),
            forms.write_batched(copy.deepcopy(model)),
            forms.write_computed(copy.deepcopy(model), size, False),
            forms.write_computed(copy.deepcopy(model), size, True),
        ):
            y = form(x)
            assert y.dtype == dtype
            assert (y - expected).abs().max() <= 8 * torch.finfo(dtype).eps * expected.abs().max()


def test_a_layer_alone_is_replaced_too():
    conv = DynamicConv(3, 4).eval()
    x = torch.randn(2, 3, 5, 5)
    torch.testing.assert_close(forms.write_constant(fuse(conv))(x), conv(x))


def test_computed_form_refuses_a_batch_rather_than_mix_it_up():
    conv = DynamicConv(3, 4).eval()
    for mix_by_conv in (True, False):
        with pytest.raises(RuntimeError):
            forms.write_computed(fuse(conv), (3, 5, 5), mix_by_conv)(torch.randn(2, 3, 5, 5))


class SharedRouter(nn.Module):
    """Two convolutions that one router serves."""

    def __init__(self):
        super().__init__()
        self.first = DynamicConv(12, 12, 3, groups=12)
        self.second = DynamicConv(12, 10, routing=self.first.routing)

    def forward(self, x):
        weights = self.first.routing(x)
        return self.second(self.first(x, weights), weights)


def test_a_shared_router_is_read_once():
    torch.manual_seed(0)
    model, x = SharedRouter().eval(), torch.randn(1, 12, 5, 5)
    for form in (forms.write_constant(fuse(model)), forms.write_computed(fuse(model), (12, 5, 5), True)):
        torch.testing.assert_close(form(x), model(x))
