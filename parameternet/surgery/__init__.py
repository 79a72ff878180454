"""Networks into networks."""

from .fuse import fuse

__all__ = ["fuse"]
