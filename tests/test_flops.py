"""Counts, to the last digit."""

import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import CondConv2d
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from parameternet import DynamicConv, fuse
from parameternet.flops import count_flops, register_thop

ROOT = Path(__file__).parent.parent


def create(name, num_classes=1000, **kwargs):
    with torch.device("meta"):
        return timm.create_model(name, num_classes=num_classes, **kwargs)


def torch_counts(model, *shape):
    """Half of what torch's counter says: its FLOPs are a multiplication and an addition each.

    Attention runs as products of matrices: torch 2.14 has no formula for the one operator that it is on a CPU.
    """
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.zeros(shape, device=next(model.parameters()).device))
    return counter.get_total_flops() / 2


@pytest.mark.parametrize(
    ("name", "convolution", "mixing", "routing"),
    [("parameternet_600m", 568_831_528, 19_412_456, 122_612), ("parameternet_300m", 281_536_640, 9_370_888, 75_524)],
)
def test_published_counts(name, convolution, mixing, routing):
    flops = count_flops(create(name))
    assert flops.as_dict() == {
        "convolution": convolution,
        "mixing": mixing,
        "routing": routing,
        "linear": 1_280_000,
        "matmul": 0,
        "total": convolution + mixing + routing + 1_280_000,
    }


def test_resolution_scales_the_convolutions_only():
    small, large = (count_flops(create("parameternet_600m"), (3, side, side)) for side in (128, 256))
    assert round((small.convolution + small.linear) / 1e6, 1) == 196.2
    assert round((large.convolution + large.linear) / 1e6, 1) == 740.1
    assert (small.mixing, small.routing) == (large.mixing, large.routing)


def test_a_batch_mixes_for_every_sample():
    one, five = (count_flops(create("parameternet_50m"), (3, 64, 64), batch_size=batch) for batch in (1, 5))
    assert {kind: 5 * number for kind, number in one.as_dict().items()} == five.as_dict()
    assert one.not_counted == five.not_counted


@pytest.mark.parametrize(
    ("name", "side", "kinds"),
    [
        ("parameternet_50m", 96, {"convolution", "linear"}),
        ("tf_efficientnet_cc_b0_4e", 64, {"convolution", "mixing", "routing", "linear"}),
        ("vit_tiny_patch16_224", 224, {"convolution", "linear", "matmul"}),
    ],
)
@pytest.mark.parametrize("batch", [1, 3])
def test_networks_agree_with_torchs_counter(name, side, kinds, batch):
    model = timm.create_model(name, **({"dynamic": False} if name.startswith("parameternet") else {}))
    flops = count_flops(model, (3, side, side), batch)
    assert flops.total == torch_counts(model, batch, 3, side, side)
    assert {kind for kind, number in flops.as_dict().items() if number} == kinds | {"total"}


@pytest.mark.parametrize("batch", [1, 3])
def test_a_dynamic_network_agrees_with_torchs_counter_while_it_mixes_kernels(batch):
    model = create("parameternet_150m", routing_hidden=6)
    for layer in model.modules():
        if isinstance(layer, DynamicConv):
            layer.strategy = "batched_matmul" if layer.kernel_size == (1, 1) else "grouped"
    flops = count_flops(model, (3, 96, 96), batch)
    assert min(flops.convolution, flops.mixing, flops.routing, flops.linear) > 0
    assert flops.total == torch_counts(model, batch, 3, 96, 96)


def test_the_count_is_of_the_definition_whatever_runs():
    layer = DynamicConv(6, 8, 3, padding=1, groups=2, num_experts=3, bias=True)
    counts = []
    for strategy in (None, "grouped", "wide"):
        layer.strategy = strategy
        counts.append(count_flops(layer, (6, 5, 7), batch_size=2))
    assert len(set(counts)) == 1
    kernel = 6 // 2 * 9
    assert counts[0].convolution == 2 * 8 * kernel * 35
    assert counts[0].mixing == 2 * 3 * (8 * kernel + 8)
    assert counts[0].routing == 2 * 6 * 3
    assert dict(counts[0].not_counted)["softmax"] == 1  # how it pools is the router's business


def test_a_fused_network_has_the_same_convolutions():
    from parameternet.surgery import fuse

    model = timm.create_model("parameternet_50m").eval()
    plain, fused = count_flops(model, (3, 64, 64)), count_flops(fuse(model), (3, 64, 64))
    assert plain.as_dict() == fused.as_dict()
    assert "batch_norm" in dict(plain.not_counted) and "batch_norm" not in dict(fused.not_counted)


class Functional(nn.Module):
    """Products that no module shows, and arithmetic that has no formula."""

    def __init__(self):
        super().__init__()
        self.up = nn.ConvTranspose2d(3, 4, 2, stride=2)
        self.cond = CondConv2d(4, 6, 3, num_experts=2)

    def forward(self, x):
        batch = x.shape[0]
        y = self.cond(self.up(x), torch.ones(batch, 2, device=x.device)).flatten(2)  # (B, 6, 16 * 16)
        y = F.conv1d(y, torch.ones(5, 6, 1, device=x.device))
        y = F.conv3d(y.reshape(batch, 5, 1, 16, 16), torch.ones(5, 5, 1, 1, 1, device=x.device)).flatten(2)
        y = F.scaled_dot_product_attention(y[:, None], y[:, None], y[:, None])[:, 0]  # 5 tokens of 256 numbers
        y = torch.einsum("bij,bkj->bik", y, y)
        return F.relu(y).flatten(1) @ torch.ones(25, 2, device=x.device)


def test_what_runs_in_functional_form_is_counted():
    flops = count_flops(Functional(), (3, 8, 8), batch_size=2)
    assert flops.convolution == 2 * (3 * 4 * 4 * 64 + 4 * 9 * 6 * 256 + 6 * 5 * 256 + 5 * 5 * 256)
    assert flops.mixing == 2 * 2 * 6 * 4 * 9
    assert flops.matmul == 2 * (2 * 5 * 5 * 256 + 5 * 5 * 256)
    assert flops.linear == 2 * 25 * 2
    assert flops.total == torch_counts(Functional(), 2, 3, 8, 8)
    assert dict(flops.not_counted)["relu"] == 1


def test_data_dependent_network_is_counted_on_its_own_device():
    class Looks(nn.Linear):
        def forward(self, x):
            return super().forward(x) if float(x.sum()) == 0 else x

    assert count_flops(Looks(4, 3), (4,), batch_size=2).linear == 2 * 4 * 3


def test_the_model_is_left_as_it_was():
    model = DynamicConv(3, 8, 3, padding=1, routing_hidden=5).train()
    model.routing.register_forward_hook(lambda *_: None)
    flops = count_flops(model, (3, 8, 8))
    assert flops.routing == 3 * 5 + 5 * 4 and flops.convolution == 27 * 8 * 64
    assert model.training and model.weight.device.type == "cpu"
    assert len(model.routing._forward_hooks) == 1 and not model._forward_hooks


def test_errors_say_what_to_give():
    with pytest.raises(ValueError, match=r"DynamicConv did not accept an input of shape \(1, 4, 8, 8\) .* input_size"):
        count_flops(DynamicConv(3, 8), (4, 8, 8))
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        count_flops(DynamicConv(3, 8), batch_size=0)


# thop -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("thop_first", [True, False])
def test_thop_gets_our_rules_whenever_it_is_imported(thop_first, tmp_path):
    (tmp_path / "thop").mkdir()
    (tmp_path / "thop" / "__init__.py").write_text("from .profile import profile\n")
    (tmp_path / "thop" / "profile.py").write_text("register_hooks = {int: 'old'}\ndef profile(): ...\n")
    ours = "from parameternet.flops import THOP_RULES, register_thop\nregister_thop()\nregister_thop()\n"
    free = "" if thop_first else "assert 'thop' not in sys.modules\n"
    code = "import sys\n" + ("import thop\n" + ours if thop_first else ours + free + "import thop\n")
    code += "assert sys.modules['thop.profile'].register_hooks == {int: 'old', **THOP_RULES}\n"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": f"{tmp_path}:."}, cwd=ROOT)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kwargs", [{}, {"dynamic": False}, {"routing_hidden": 7}], ids=str)
def test_thop_reports_our_count_and_its_own_extras(kwargs, batch):
    thop = pytest.importorskip("thop", reason="needs ultralytics-thop: pip install 'parameternet[test]'")
    register_thop()
    model = timm.create_model("parameternet_50m", **kwargs).eval()
    ours, extras = count_flops(model, (3, 64, 64), batch).total, []
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(lambda layer, inputs, output: extras.append(4 * output.numel()))
        if isinstance(module, nn.AdaptiveAvgPool2d):
            module.register_forward_hook(lambda layer, x, y: extras.append(x[0].numel() + y.numel()))
    macs, _ = thop.profile(model, inputs=(torch.zeros(batch, 3, 64, 64),), verbose=False)
    assert macs == ours + sum(extras)
    if not kwargs:
        compact = fuse(model, expert_dtype="int8")
        assert thop.profile(compact, inputs=(torch.zeros(batch, 3, 64, 64),), verbose=False)[0] >= ours
    layer = DynamicConv(3, 8, 3)  # alone, its router counts neither twice nor not at all
    assert thop.profile(layer, inputs=(torch.zeros(batch, 3, 9, 9),), verbose=False)[0] == (
        count_flops(layer, (3, 9, 9), batch).total
    )
