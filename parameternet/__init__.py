"""Image models with dynamic convolutions: many parameters, few FLOPs. Importing this registers them with timm."""

from . import models
from .layers import ConvBnAct, DynamicConv, GhostBottleneck, GhostModule, Router, dynamic_conv2d, set_temperature
from .models.parameternet import ParameterNet

__version__ = "0.1.0"

__all__ = [
    "ConvBnAct",
    "DynamicConv",
    "GhostBottleneck",
    "GhostModule",
    "ParameterNet",
    "Router",
    "__version__",
    "dynamic_conv2d",
    "models",
    "set_temperature",
]
