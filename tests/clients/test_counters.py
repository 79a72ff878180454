"""Counters of multiply-adds: those that follow torch's operations count dynamic convolutions right."""

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from parameternet import count_flops

NAME = "parameternet_50m"


@pytest.fixture(scope="module")
def network():
    return timm.create_model(NAME, num_classes=200).eval()


@pytest.fixture(scope="module")
def expected(network):
    return count_flops(network, (3, 224, 224)).total


def test_torchs_counter(network, expected):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.randn(1, 3, 224, 224))
    assert counter.get_total_flops() == 2 * expected


def test_ptflops_by_operations(network, expected):
    ptflops = pytest.importorskip("ptflops")
    found, _ = ptflops.get_model_complexity_info(
        network, (3, 224, 224), as_strings=False, print_per_layer_stat=False, backend="aten"
    )
    assert abs(found - expected) <= 0.001 * expected


def test_fvcore(network, expected):
    fvcore = pytest.importorskip("fvcore.nn")
    analysis = fvcore.FlopCountAnalysis(network, torch.randn(1, 3, 224, 224)).unsupported_ops_warnings(False)
    counts = analysis.by_operator()  # whose total has the arithmetic of batch norm and pooling as well
    # It counts a trace, which serves every batch size: the stem convolves with all experts there.
    assert abs(sum(counts[kind] for kind in ("conv", "bmm", "mm", "linear")) - expected) <= 0.04 * expected
