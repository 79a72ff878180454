"""captum and pytorch-grad-cam look into our networks as into any other."""

import pytest
import timm
import torch

import parameternet  # noqa: F401  registers the networks


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return timm.create_model("parameternet_50m", pretrained=True).eval()


def test_grad_cam_marks_places(network, images):
    cam = pytest.importorskip("pytorch_grad_cam")
    with cam.GradCAM(network, [network.blocks[-1]]) as explain:
        found = explain(images, targets=None)
    assert found.shape == (2, 64, 64) and 0 <= found.min() < found.max() <= 1


def test_integrated_gradients_add_up_to_the_difference_of_logits(network, images):
    attr = pytest.importorskip("captum.attr")
    # Near a black image, normalisation bends the network so sharply that the integral needs thousands of steps.
    images, baseline = images[:1], 0.5 * images[:1]
    gradients = attr.IntegratedGradients(network)
    found = gradients.attribute(images, baseline, target=3, n_steps=100, internal_batch_size=50)
    with torch.no_grad():
        difference = network(images)[0, 3] - network(baseline)[0, 3]
    assert abs(found.sum() - difference) <= 0.02 * abs(difference) + 0.02


def test_other_attributions_run(network, images):
    attr = pytest.importorskip("captum.attr")
    saliency = attr.Saliency(network).attribute(images.clone().requires_grad_(), target=1)
    layer = attr.LayerGradCam(network, network.blocks[-1]).attribute(images, target=1)
    assert saliency.shape == images.shape and saliency.abs().sum() > 0 and layer.shape[2:] == (2, 2)
