from . import parameternet

__all__ = ["parameternet"]
