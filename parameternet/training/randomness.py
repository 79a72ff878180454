"""Derive random numbers from the seed and the position in a run, without state.

An image's augmentation depends on (seed, epoch, index), a step's mixing and dropout on (seed, epoch, step, rank). So
the number of workers does not matter, and a run can resume in the middle of an epoch.
"""

from __future__ import annotations

import hashlib
import random
import struct

import numpy as np
import torch

IMAGE, STEP, ORDER, INIT = range(4)  # purposes, which never share a stream


def mix(*numbers: int) -> int:
    """Hash integers into a 63-bit seed, the same on every machine and in every version of Python."""
    packed = struct.pack(f"<{len(numbers)}q", *numbers)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little") >> 1


def seed_all(seed: int) -> None:
    """Seed Python, NumPy and torch on every device."""
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.manual_seed(seed)


def seed_cpu(seed: int) -> None:
    """Seed Python, NumPy and torch's CPU generator, which a worker's transforms use."""
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.default_generator.manual_seed(seed)
