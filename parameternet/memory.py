"""Configure how the process allocates and frees memory."""

import ctypes
import sys

__all__ = ["keep_freed_memory"]

# Parameters of glibc's mallopt(3).
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST = 2**31 - 1


def keep_freed_memory() -> bool:
    """Make the process reuse freed memory instead of returning it to the system; return whether that is supported.

    glibc returns every tensor above 32 MiB when it is freed, so each layer of a large batch requests new pages. On some
    virtual machines that takes longer than the computation. The commands of the CLI call this function; scripts can
    call it too. It has no effect with C libraries other than glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    return all(library.mallopt(parameter, LARGEST) for parameter in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD))
