"""Image models with dynamic convolutions: many parameters, few FLOPs. Importing this registers them with timm."""

from . import models
from .flops import count_flops, register_thop
from .layers import ConvBnAct, DynamicConv, GhostBottleneck, GhostModule, Router, dynamic_conv2d, set_temperature
from .models.parameternet import ParameterNet
from .optim import param_groups
from .surgery import collapse, convert_condconv, fuse, upcycle

__version__ = "0.2.0"

# Corrects FLOPs counts of thop, whenever it is imported.
register_thop()

__all__ = [
    "ConvBnAct",
    "DynamicConv",
    "GhostBottleneck",
    "GhostModule",
    "ParameterNet",
    "Router",
    "__version__",
    "collapse",
    "convert_condconv",
    "count_flops",
    "dynamic_conv2d",
    "fuse",
    "models",
    "param_groups",
    "set_temperature",
    "upcycle",
]
