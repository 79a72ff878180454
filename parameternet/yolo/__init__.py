# SPDX-License-Identifier: AGPL-3.0-or-later
"""Add dynamic convolutions and timm backbones to stock Ultralytics on import.

>>> import parameternet.yolo
>>> from ultralytics import YOLO
>>> model = YOLO("yolov8n-dynamicconv.yaml")

It builds on Ultralytics and is under its licence, AGPL-3.0, unlike the rest of this package.
"""

try:
    from ultralytics import YOLO
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] != "ultralytics":
        raise
    raise ModuleNotFoundError(
        "parameternet.yolo needs ultralytics: pip install 'parameternet[yolo]'", name=error.name
    ) from error

from .backbone import TimmBackbone, TimmBatchNorm, TimmStage
from .layers import (
    C2f_DynamicConv,
    C2f_GhostModule_DynamicConv,
    C3k2_DynamicConv,
    C3k2_GhostModule_DynamicConv,
    C3k_DynamicConv,
    DynamicConv,
    DynamicConvBnAct,
    GhostBottleneck,
    GhostModule,
)
from .registration import gflops, register
from .yamls import rules

__all__ = [
    "YOLO",
    "C2f_DynamicConv",
    "C2f_GhostModule_DynamicConv",
    "C3k2_DynamicConv",
    "C3k2_GhostModule_DynamicConv",
    "C3k_DynamicConv",
    "DynamicConv",
    "DynamicConvBnAct",
    "GhostBottleneck",
    "GhostModule",
    "TimmBackbone",
    "TimmBatchNorm",
    "TimmStage",
    "gflops",
    "register",
    "rules",
]

register()
