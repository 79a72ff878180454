"""Check an exported file: run it at several batch sizes, and compare its outputs with the network's."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

__all__ = ["BATCHES", "TOLERANCE", "ExportError", "as_list", "check_tensors", "difference", "differences"]

BATCHES = (1, 3, 8)
TOLERANCE = 1e-4

Run = Callable[[np.ndarray], list[np.ndarray]]


class ExportError(RuntimeError):
    """The network could not be exported, or the file does not reproduce its outputs."""


def as_list(outputs: Any) -> list[Tensor]:
    """Flatten a network's outputs, a tensor or nested tuples, lists and dictionaries of tensors, into a list."""
    return tree_leaves(outputs)


@torch.no_grad()
def check_tensors(model: nn.Module, size: tuple[int, int, int], batch: int = 2) -> None:
    """Run the network once, and check that a file can represent its outputs.

    Raises:
        ValueError: an output that is not a tensor, or a tensor without one entry per image.
    """
    for output in as_list(model(torch.zeros(batch, *size))):
        if not isinstance(output, Tensor):
            raise ValueError(
                f"the network returns {output!r} among its outputs; files support only tensors: wrap it in a module "
                "that returns tensors"
            )
        if output.ndim == 0 or len(output) != batch:
            raise ValueError(
                f"the network returns a tensor of shape {tuple(output.shape)} for {batch} images; every output needs "
                "one entry per image: wrap it in a module that returns such tensors"
            )


def noise_images(batch: int, size: tuple[int, int, int], seed: int = 0) -> Tensor:
    """Return noise (B, C, H, W) whose mean and contrast differ per image, so that routing differs too."""
    generator = torch.Generator().manual_seed(seed)
    channels, height, width = size
    noise = torch.randn(batch, channels, height, width, generator=generator)
    contrast = 0.5 + torch.rand(batch, 1, 1, 1, generator=generator)
    return noise * contrast + torch.randn(batch, channels, 1, 1, generator=generator)


@torch.no_grad()
def difference(model: nn.Module, run: Run, x: Tensor) -> float:
    """Return the largest |file - network| relative to the largest |network| of the same image and output.

    Raises:
        ExportError: the file does not run, or the number or shapes of its outputs differ.
    """
    expected = as_list(model(x))
    try:
        got = run(x.numpy())
    except Exception as error:  # every runtime raises its own exception types
        raise ExportError(f"the file does not run for an input of {tuple(x.shape)}: {error}") from error
    shapes = [tuple(e.shape) for e in expected], [tuple(g.shape) for g in got]
    if shapes[0] != shapes[1]:
        raise ExportError(
            f"for an input of {tuple(x.shape)} the network returns shapes {shapes[0]}, but the file {shapes[1]}"
        )
    worst = 0.0
    for e, g in zip(expected, got, strict=True):
        e = e.double().reshape(len(x), -1)
        g = torch.from_numpy(np.asarray(g)).double().reshape(len(x), -1)
        scale = e.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        # NaN counts as an infinite difference, not a small one.
        worst = max(worst, float(torch.nan_to_num((e - g).abs() / scale, nan=float("inf")).max()))
    return worst


def differences(
    model: nn.Module, run: Run, batches: Iterable[int], sizes: Iterable[tuple[int, int, int]]
) -> dict[str, float]:
    """Return `difference` for every batch and size, such as {"batch 3, 224 x 224": 2e-7}.

    Raises:
        ExportError: a difference exceeds `TOLERANCE`.
    """
    found = {}
    for size in sizes:
        for batch in batches:
            found[f"batch {batch}, {size[1]} x {size[2]}"] = difference(model, run, noise_images(batch, size))
    wrong = {where: value for where, value in found.items() if not value <= TOLERANCE}
    if wrong:
        words = "; ".join(f"{value:.1e} at {where}" for where, value in wrong.items())
        raise ExportError(
            f"the file differs from the network by {words} (relative to its largest output; at most {TOLERANCE:.0e} "
            "is allowed), so it was not kept. Try another form or batch size, and please report this"
        )
    return found
