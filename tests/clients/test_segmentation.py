"""segmentation-models-pytorch takes our networks as `tu-NAME` encoders."""

import pytest
import torch

import parameternet  # noqa: F401  registers the networks

smp = pytest.importorskip("segmentation_models_pytorch")

ENCODERS = ("tu-parameternet_50m", "tu-dynamic_mobilenetv3_large_100", "tu-dynamic_ghostnet_050")


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("decoder", ["DeepLabV3Plus", "DeepLabV3", "PSPNet", "Unet", "FPN"])
def test_a_segmenter_builds_and_trains(decoder, encoder, images):
    model = getattr(smp, decoder)(encoder, encoder_weights=None, classes=3)
    loss = torch.nn.functional.cross_entropy(model(images), torch.randint(0, 3, (2, 64, 64)))
    loss.backward()
    assert torch.isfinite(loss) and loss > 0
    routed = [p.grad for name, p in model.encoder.named_parameters() if ".routing." in name and p.grad is not None]
    assert len(routed) > 8 and all(grad.isfinite().all() for grad in routed)


@pytest.mark.parametrize("output_stride", [8, 16])
def test_an_encoder_takes_smps_output_strides(output_stride, images):
    encoder = smp.encoders.get_encoder("tu-parameternet_50m", weights=None, output_stride=output_stride)
    sides = [feature.shape[-1] for feature in encoder.eval()(images)]
    assert sides == [64, 32, 16, 8, 64 // max(8, min(16, output_stride)), 64 // output_stride]
