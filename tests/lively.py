"""Networks with nothing at its start value, so that what is left out shows."""

import torch
from torch import nn


def lively(model, seed=0):
    """Batch statistics, scales and routing far from their starts."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.copy_(0.1 * torch.randn(module.running_mean.shape, generator=generator))
                module.running_var.copy_(0.5 + torch.rand(module.running_var.shape, generator=generator))
                module.weight.copy_(0.5 + torch.rand(module.weight.shape, generator=generator))
                module.bias.copy_(0.1 * torch.randn(module.bias.shape, generator=generator))
            if hasattr(module, "routing") and module.routing is not None:
                weight = module.routing.weight
                weight.copy_(torch.randn(weight.shape, generator=generator))
    return model
