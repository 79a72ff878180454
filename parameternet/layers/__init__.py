"""The dynamic convolution: layer, router, function, and Ghost blocks built from it."""

from .dynamic_conv import DynamicConv
from .functional import STRATEGIES, dynamic_conv2d
from .ghost import ConvBnAct, GhostBottleneck, GhostModule
from .recording import Recording, record_routing_weights
from .router import Router, match_routers, set_temperature

__all__ = [
    "STRATEGIES",
    "ConvBnAct",
    "DynamicConv",
    "GhostBottleneck",
    "GhostModule",
    "Recording",
    "Router",
    "dynamic_conv2d",
    "match_routers",
    "record_routing_weights",
    "set_temperature",
]
