"""How the process gets and returns memory."""

import ctypes
import sys

__all__ = ["keep_freed_memory"]

# Parameters of glibc's mallopt(3).
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST = 2**31 - 1


def keep_freed_memory() -> bool:
    """Make the process reuse freed memory instead of returning it to the system. Return whether it can.

    glibc returns every tensor above 32 MiB when it is freed, so each layer of a large batch asks for fresh pages. On
    some virtual machines that takes longer than the computation. The commands of the command line do this; a script
    can, too. With other C libraries than glibc nothing is changed.
    """
    if not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    return all(library.mallopt(parameter, LARGEST) for parameter in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD))
