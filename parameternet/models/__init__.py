from . import dynamic_timm, parameternet
from ._builder import build_from_config, build_model

__all__ = ["build_from_config", "build_model", "dynamic_timm", "parameternet"]
