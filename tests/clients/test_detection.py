"""Detectors of torchvision and transformers on our features."""

from collections import OrderedDict

import pytest
import timm
import torch
from torch import nn

import parameternet  # noqa: F401  registers the networks

detection = pytest.importorskip("torchvision.models.detection")


class Pyramid(nn.Module):
    """timm's features under torchvision's feature pyramid."""

    def __init__(self, name):
        super().__init__()
        from torchvision.ops import FeaturePyramidNetwork

        self.body = timm.create_model(name, features_only=True, out_indices=(2, 3, 4))
        self.fpn = FeaturePyramidNetwork(self.body.feature_info.channels(), 32)
        self.out_channels = 32

    def forward(self, x):
        return self.fpn(OrderedDict((str(i), f) for i, f in enumerate(self.body(x))))


@pytest.mark.parametrize("name", ["parameternet_50m", "dynamic_efficientnet_lite0"])
def test_retinanet_trains_and_detects(name):
    anchors = detection.anchor_utils.AnchorGenerator(((16,), (32,), (64,)), ((0.5, 1.0, 2.0),) * 3)
    model = detection.RetinaNet(Pyramid(name), 3, anchor_generator=anchors, min_size=128, max_size=128)
    images = [torch.rand(3, 96, 128), torch.rand(3, 128, 128)]
    targets = [{"boxes": torch.tensor([[10.0, 10, 60, 70]]), "labels": torch.tensor([label])} for label in (1, 2)]
    losses = model(images, targets)
    sum(losses.values()).backward()
    assert all(torch.isfinite(loss) for loss in losses.values())
    routed = [p for n, p in model.named_parameters() if ".routing." in n and n.startswith("backbone.body.blocks_0")]
    assert all(p.grad is not None for p in routed)
    found = model.eval()(images)
    assert len(found) == 2 and {"boxes", "scores", "labels"} <= found[0].keys()


@pytest.mark.parametrize("family", ["Detr", "ConditionalDetr"])
def test_detectors_of_transformers_take_our_names(family):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{family}Config")(
        backbone="parameternet_50m", use_timm_backbone=True, use_pretrained_backbone=False, backbone_config=None,
        encoder_layers=1, decoder_layers=1, d_model=64, num_queries=10, num_labels=3,
    )  # fmt: skip
    check_that_it_trains(getattr(transformers, f"{family}ForObjectDetection")(config))


def test_rtdetr_of_transformers_takes_our_names():
    transformers = pytest.importorskip("transformers")
    backbone = transformers.TimmBackboneConfig(
        backbone="parameternet_50m", out_indices=(2, 3, 4), use_pretrained_backbone=False
    )
    channels = timm.create_model("parameternet_50m", features_only=True, out_indices=(2, 3, 4)).feature_info.channels()
    config = transformers.RTDetrConfig(
        backbone_config=backbone, encoder_in_channels=channels, num_labels=3, d_model=64, encoder_hidden_dim=64,
        decoder_in_channels=[64] * 3, decoder_layers=1, num_queries=10, num_denoising=0,
    )  # fmt: skip
    check_that_it_trains(transformers.RTDetrForObjectDetection(config))


def check_that_it_trains(detector):
    labels = [{"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]])}] * 2
    found = detector.train()(pixel_values=torch.rand(2, 3, 128, 128), labels=labels)
    found.loss.backward()
    routers = [parameter for name, parameter in detector.named_parameters() if ".routing." in name]
    assert torch.isfinite(found.loss) and found.pred_boxes.shape == (2, 10, 4)
    assert routers and all(parameter.grad is not None for parameter in routers)
