"""Make a torchvision network dynamic: the same outputs, with experts that training can specialise.

    python examples/upcycle_torchvision.py

Prints the number of parameters before and after, 11.69 M and 36.86 M, and the largest difference of outputs, 1e-06.
"""

import torch
import torchvision

import parameternet

torch.manual_seed(0)
dense = torchvision.models.resnet18().eval()  # weights="DEFAULT" downloads ImageNet weights
dynamic = parameternet.upcycle(dense, num_experts=4, include="layer4.*").eval()  # only the last stage

images = torch.randn(2, 3, 224, 224)
with torch.inference_mode():
    expected, found = dense(images), dynamic(images)
print(f"outputs up to {expected.abs().max():.3f}, largest difference {(found - expected).abs().max():.1e}")
before, after = (sum(p.numel() for p in model.parameters()) / 1e6 for model in (dense, dynamic))
print(f"parameters {before:.2f} M before, {after:.2f} M after")
