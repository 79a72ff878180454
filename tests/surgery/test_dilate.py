"""Dilation in place of strides: at every position of the strided network the dilated one computes the same."""

import pytest
import timm
import torch
from test_fuse import lived_in
from torch import nn

from parameternet import DynamicConv, ParameterNet, upcycle
from parameternet.surgery import dilate, upcycle_state_dict

REDUCTIONS = {8: [2, 4, 8, 8, 8], 16: [2, 4, 8, 16, 16], 32: [2, 4, 8, 16, 32]}
# Every kind of row, without squeeze-and-excitation, which pools whole maps.
STAGES = (((3, 16, 16, 0, 1),), ((3, 48, 24, 0, 2),), ((5, 72, 40, 0, 2), (3, 72, 40, 0, 1)), ((3, 96, 48, 0, 2),),
          ((5, 96, 48, 0, 2), (3, 96, 48, 0, 1)))  # fmt: skip


def without_routing(model):
    """Every image gets the same kernels, so that nothing depends on the whole map."""
    for module in model.modules():
        if isinstance(module, DynamicConv):
            nn.init.zeros_(module.routing.weight)
    return model


@pytest.mark.parametrize("size", [(128, 96), (97, 65)])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("output_stride", [8, 16])
def test_the_same_at_every_position_of_the_strided_network(output_stride, dynamic, size):
    strided = without_routing(lived_in(ParameterNet(STAGES, width=0.5, num_classes=5, dynamic=dynamic)))
    dilated = ParameterNet(STAGES, width=0.5, num_classes=5, dynamic=dynamic, output_stride=output_stride)
    dilated = dilated.double().eval()
    dilated.load_state_dict(strided.state_dict(), strict=True)
    assert [info["reduction"] for info in dilated.feature_info] == REDUCTIONS[output_stride]
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        last, features = strided.forward_intermediates(x)
        dense_last, dense = dilated.forward_intermediates(x)
    for coarse, fine, reduction in zip([*features, last], [*dense, dense_last], [2, 4, 8, 16, 32, 32], strict=True):
        step = max(1, reduction // output_stride)
        assert torch.allclose(fine[:, :, ::step, ::step], coarse, rtol=1e-10, atol=1e-12)


# One of each family of blocks, and of each way in which timm refuses or takes the argument.
NETWORKS = ("parameternet_50m", "parameternet_600m", "dynamic_ghostnet_050", "dynamic_ghostnetv2_100",
            "dynamic_ghostnetv3_050", "dynamic_efficientnet_lite0", "dynamic_mobilenetv3_large_100")  # fmt: skip


@pytest.mark.parametrize("output_stride", [8, 16])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_has_features_of_every_output_stride(name, output_stride):
    model = timm.create_model(name, features_only=True, output_stride=output_stride).eval()
    assert model.feature_info.reduction() == REDUCTIONS[output_stride]
    with torch.no_grad():
        features = model(torch.randn(1, 3, 64, 96))
    assert [tuple(f.shape[2:]) for f in features] == [(64 // r, 96 // r) for r in REDUCTIONS[output_stride]]


@pytest.mark.parametrize("output_stride", [8, 16])
def test_dynamic_networks_compute_what_timms_dilated_ones_do(output_stride):
    dense = lived_in(timm.create_model("mobilenetv3_large_100", features_only=True, output_stride=output_stride))
    ours = timm.create_model("dynamic_mobilenetv3_large_100", output_stride=output_stride).double().eval()
    missing, _ = ours.load_state_dict(upcycle_state_dict(dense.state_dict(), ours), strict=False)
    assert {name.partition(".")[0] for name in missing} == {"conv_head", "classifier"}
    x = torch.randn(2, 3, 96, 64, dtype=torch.float64)
    with torch.no_grad():
        for got, expected in zip(ours.forward_intermediates(x)[1], dense(x), strict=True):
            assert torch.allclose(got, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("source", ["resnet18", "resnet50d", "repvgg_a0", "regnetx_002", "ghostnetv2_100"])
def test_any_network_of_timm(source):
    model = timm.create_model("dynamic_timm", source=source, output_stride=16, num_classes=0, global_pool="").eval()
    assert model(torch.randn(1, 3, 96, 64)).shape[2:] == (6, 4)


def test_a_pretrained_network_keeps_its_weights():
    strided = timm.create_model("parameternet_50m", pretrained=True).eval()
    dilated = timm.create_model("parameternet_50m", pretrained=True, output_stride=8).eval()
    for name, value in strided.state_dict().items():
        assert torch.equal(dilated.state_dict()[name], value), name
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert dilated.forward_features(x).shape[2:] == (8, 8)
        assert torch.equal(dilated.forward_intermediates(x)[1][1], strided.forward_intermediates(x)[1][1])


def test_a_dynamic_network_can_be_dilated_afterwards():
    model = upcycle(timm.create_model("resnet18").eval())
    assert dilate(model, 16) is model
    assert model.forward_features(torch.randn(1, 3, 64, 64)).shape[2:] == (4, 4)
    assert model.layer4[1].conv2.dilation == (2, 2) and model.layer4[0].conv1.dilation == (1, 1)


@pytest.mark.parametrize("output_stride", [0, 4, 12, 64])
def test_other_output_strides_are_refused(output_stride):
    with pytest.raises(ValueError, match=f"output_stride must be one of 8, 16, 32, got {output_stride}"):
        timm.create_model("parameternet_50m", output_stride=output_stride)


def test_what_cannot_be_dilated_is_left_as_it_was():
    model = timm.create_model("densenet121")
    before = {name: dict(vars(m)) for name, m in model.named_modules() if hasattr(m, "stride")}
    with pytest.raises(ValueError, match="this DenseNet cannot have output_stride=16"):
        dilate(model, 16)
    assert all(vars(model.get_submodule(name)) == settings for name, settings in before.items())
    with pytest.raises(ValueError, match="output_stride must be 32"):
        timm.create_model("yolov8n_dynamicconv", output_stride=16)
