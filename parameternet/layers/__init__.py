from .dynamic_conv import DynamicConv, Router, set_temperature
from .functional import STRATEGIES, dynamic_conv2d
from .ghost import ConvBnAct, GhostBottleneck, GhostModule

__all__ = [
    "STRATEGIES",
    "ConvBnAct",
    "DynamicConv",
    "GhostBottleneck",
    "GhostModule",
    "Router",
    "dynamic_conv2d",
    "set_temperature",
]
