"""Memory of training on a CPU."""

import ctypes
import os
import sys

__all__ = ["keep_freed_memory"]

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # names of glibc's mallopt(3)
_LARGEST = 2**31 - 1


def keep_freed_memory() -> bool:
    """Make glibc keep the memory of freed tensors for the next ones, and return whether it does.

    By default it returns blocks of more than 32 MiB to the operating system, which clears every page of the next one:
    65,000 page faults in a step of `parameternet_300m` (batch 128, 64 px), which takes 1.10 to 1.15 times as long. Peak
    memory grows by 1 to 2 %. Nothing is changed on other systems, or if the environment sets a MALLOC_ variable.
    """
    if not sys.platform.startswith("linux") or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    return bool(mallopt and mallopt(_MMAP_MAX, 0) and mallopt(_TRIM_THRESHOLD, _LARGEST))
