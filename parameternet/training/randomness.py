"""Randomness without state: every draw is a function of the seed and of where in the run it happens.

An image's augmentation depends on (seed, epoch, index), a step's mixing and dropout on (seed, epoch, step, rank). So
the number of workers does not matter, and a run resumes in the middle of an epoch by knowing where it was.
"""

from __future__ import annotations

import hashlib
import random
import struct

import numpy as np
import torch

IMAGE, STEP, ORDER, INIT = range(4)  # what is drawn: different purposes never share a stream


def mix(*numbers: int) -> int:
    """A 63-bit seed from whole numbers; the same on every machine and in every version of Python."""
    packed = struct.pack(f"<{len(numbers)}q", *numbers)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little") >> 1


def seed_all(seed: int) -> None:
    """Seed Python, numpy and torch (every device)."""
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.manual_seed(seed)


def seed_cpu(seed: int) -> None:
    """Seed Python, numpy and torch's CPU generator: what a worker's transforms draw from."""
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.default_generator.manual_seed(seed)
