"""Network surgery: convert, fold and dilate layers of a network."""

from .collapse import collapse, measure_routing
from .compare import compare
from .condconv import convert_condconv
from .dilate import dilate
from .fuse import fuse
from .upcycle import upcycle, upcycle_state_dict

__all__ = [
    "collapse",
    "compare",
    "convert_condconv",
    "dilate",
    "fuse",
    "measure_routing",
    "upcycle",
    "upcycle_state_dict",
]
