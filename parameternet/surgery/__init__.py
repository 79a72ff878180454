"""Networks into networks."""

from .fuse import fuse
from .upcycle import upcycle, upcycle_state_dict

__all__ = ["fuse", "upcycle", "upcycle_state_dict"]
