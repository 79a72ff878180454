from . import catalogue, dynamic_timm, dynamic_yolo, parameternet
from .builder import build_from_config, build_model

__all__ = ["build_from_config", "build_model", "catalogue", "dynamic_timm", "dynamic_yolo", "parameternet"]
