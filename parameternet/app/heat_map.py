"""Draw the routing weights of one image as SVG, with a column per layer and a row per expert."""

import math
from collections.abc import Mapping
from html import escape

from torch import Tensor

from parameternet.text import printable

__all__ = ["draw"]

CELL = 14  # of a view box that the page scales
LOW, MIDDLE, HIGH = (0x25, 0x63, 0xEB), (0xF3, 0xF4, 0xF6), (0xB4, 0x23, 0x18)
LIMIT = 2.0  # log2 of the share relative to 1/E at which colours end


def draw(routing: Mapping[str, Tensor], title: str) -> str:
    """Return an SVG of routing weights (E,) by layer.

    Colours show an expert's share of its layer's routing weights relative to 1/E, like `parameternet routing`; hovering
    over a cell shows the routing weight.
    """
    rows = max((len(weights) for weights in routing.values()), default=0)
    cells = [
        _cell(x, y, name, weights) for x, (name, weights) in enumerate(routing.items()) for y in range(len(weights))
    ]
    width, height = CELL * len(routing), CELL * rows
    return (
        f'<svg viewBox="0 0 {width} {height}" width="100%" role="img" preserveAspectRatio="none" '
        f'style="height:{max(6 * rows, 72)}px" aria-label="{escape(printable(title))}">{"".join(cells)}</svg>'
    )


def _cell(x: int, expert: int, name: str, weights: Tensor) -> str:
    value, total = float(weights[expert]), float(weights.sum())
    share = value / total if total > 0 else 1 / len(weights)
    words = f"{escape(printable(name))}: expert {expert}, routing weight {value:.3f}, share {share:.1%}"
    return (
        f'<rect x="{x * CELL}" y="{expert * CELL}" width="{CELL - 1}" height="{CELL - 1}" '
        f'fill="{_colour(share * len(weights))}"><title>{words}</title></rect>'
    )


def _colour(ratio: float) -> str:
    """Return a colour from LOW (a quarter of 1/E or less) to HIGH (four times 1/E or more)."""
    place = max(-1.0, min(1.0, math.log2(max(ratio, 1e-9)) / LIMIT))
    end = HIGH if place > 0 else LOW
    parts = (round(middle + abs(place) * (colour - middle)) for middle, colour in zip(MIDDLE, end, strict=True))
    return "#" + "".join(f"{part:02x}" for part in parts)
