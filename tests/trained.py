"""Networks as training leaves them: nothing at its start value, so that what is left out shows."""

import timm
import torch
from torch import nn


@torch.no_grad()
def trained(name, seed=0, **kwargs):
    """timm's network with drawn batch statistics, scales and layer scales, in evaluation mode."""
    torch.manual_seed(seed)
    model = timm.create_model(name, **kwargs)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            module.weight.uniform_(0.5, 1.5)
            module.bias.normal_(0, 0.1)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("gamma"):  # layer scale starts near nothing
            parameter.uniform_(0.5, 1.0)
    return model.eval()
