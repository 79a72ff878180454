"""Draw routing as a heat map."""

import math
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from parameternet import files
from parameternet.routing.measure import LayerRouting, Routing
from parameternet.text import printable

__all__ = ["draw"]

INK, FAINT, LINE, ACCENT = "#1b1f24", "#6b7280", "#d5d9e0", "#b42318"
LARGEST_LABEL, SMALLEST_LABEL = 8.0, 4.5  # points; if names would be smaller, only every n-th is shown
LONGEST_LABEL = 32  # characters of a row's name
STRIP, GAP = 0.9, 0.14  # inches


def draw(routing: Routing, path: str | Path) -> None:
    """Draw a heat map of shares to a file (.png, .pdf, .svg, .jpg, .webp).

    A row is a class or image, a column is an expert of a layer. Colours show the share relative to 1/E on a logarithmic
    scale. Below are the entropies and the number of experts in use.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # needs neither a display nor global state
    from matplotlib.figure import Figure

    edges = [0, *accumulate(layer.num_experts for layer in routing.layers)]
    width, height = _size(edges[-1], len(routing.rows))
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    heat = _panel(figure, edges, 0, height)
    _draw_shares(figure, heat, routing, edges)
    entropies = _panel(figure, edges, -(GAP + STRIP), STRIP)
    _draw_entropies(entropies, routing.layers, edges)
    in_use = _panel(figure, edges, -2 * (GAP + STRIP), STRIP)
    _draw_in_use(in_use, routing.layers, edges)
    _name_layers(in_use, routing.layers, edges, width)
    kind = Path(path).suffix.removeprefix(".")
    with files.atomic_write(path) as file:  # "tight" makes room for everything next to the heat map
        figure.savefig(file, format=kind, dpi=150, bbox_inches="tight", pad_inches=0.25, facecolor="white")


def _size(columns: int, rows: int) -> tuple[float, float]:
    """Return width and height of the heat map in inches: the more cells, the smaller each."""
    width = max(min(0.16 * columns, 16), 0.045 * columns, 6)
    return width, max(min(0.35 * rows, max(8, 0.1 * rows), 40), 0.7)


def _panel(figure: Any, edges: list[int], bottom: float, height: float) -> Any:
    """Add axes as wide as the heat map; `bottom` and `height` in inches, x in columns."""
    axes = figure.add_axes([0, bottom / figure.get_figheight(), 1, height / figure.get_figheight()])
    axes.set_xlim(0, edges[-1])
    axes.tick_params(length=0, labelsize=LARGEST_LABEL, colors=INK)
    axes.set_xticks([])
    for spine in axes.spines.values():
        spine.set(color=LINE, linewidth=0.8)
    axes.vlines(edges[1:-1], 0, 1, color=LINE, linewidth=0.6, transform=axes.get_xaxis_transform(), zorder=1)
    return axes


def _draw_shares(figure: Any, axes: Any, routing: Routing, edges: list[int]) -> None:
    relative = torch.cat([layer.shares * layer.num_experts for layer in routing.layers], 1)
    limit = _colour_limit(relative, max(layer.num_experts for layer in routing.layers))
    shades = relative.log2().clamp(-limit, limit).numpy()
    rows, columns = shades.shape
    image = axes.imshow(shades, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest",
                        extent=(0, columns, rows, 0), zorder=0)  # fmt: skip
    line = min(1.5, 0.12 * 72 * figure.get_figwidth() / columns)
    axes.vlines(edges[1:-1], 0, rows, color=FAINT, linewidth=line)
    size, step = _label_size(figure.get_figheight() / rows)
    labels = [_cut(row.label) for row in routing.rows]
    axes.set_yticks([row + 0.5 for row in range(0, rows, step)], labels[::step], fontsize=size)
    title = printable(_title(routing))
    axes.annotate(title, (0, 1), (0, 22), "axes fraction", "offset points", weight="bold", color=INK)
    _note(axes, "columns: the experts of each layer, in order")
    _draw_scale(figure, image, limit)


def _note(axes: Any, words: str) -> None:
    axes.annotate(words, (0, 1), (0, 8), "axes fraction", "offset points", fontsize=LARGEST_LABEL, color=FAINT)


def _title(routing: Routing) -> str:
    classes = sum(row.is_class for row in routing.rows)
    of_classes = f" of {_count(classes, 'class', 'es')}" if classes == len(routing.rows) else ""
    return f"{routing.model}: which experts {_count(routing.images, 'image')}{of_classes} use"


def _count(number: int, thing: str, plural: str = "s") -> str:
    return f"{number:,} {thing}{'' if number == 1 else plural}"


def _colour_limit(relative: Tensor, num_experts: int) -> float:
    """Return the end of the scale, as a power of two; at least 1.25, so that rounding does not look like routing."""
    farthest = float(relative.log2().abs().max())
    return max(min(farthest, math.log2(num_experts)), math.log2(1.25))


def _draw_scale(figure: Any, image: Any, limit: float) -> None:
    width, height = figure.get_size_inches()
    tall = min(height, 1.8)
    axes = figure.add_axes([1 + 0.15 / width, 1 - tall / height, 0.14 / width, tall / height])
    scale = figure.colorbar(image, cax=axes)
    shown = (0.125, 0.25, 0.5, 1, 2, 4, 8) if limit >= 1.2 else (0.5, 0.67, 0.8, 1, 1.25, 1.5, 2)
    ratios = [ratio for ratio in shown if abs(math.log2(ratio)) <= limit + 1e-9]
    scale.set_ticks([math.log2(ratio) for ratio in ratios], labels=[f"{ratio:g}" for ratio in ratios])
    scale.ax.tick_params(labelsize=LARGEST_LABEL, length=2, color=FAINT, labelcolor=INK)
    scale.outline.set(color=LINE, linewidth=0.8)
    _note(axes, "share relative to 1/E")


def _draw_entropies(axes: Any, layers: list[LayerRouting], edges: list[int]) -> None:
    centres = _centres(edges)
    overall, per_image = ([getattr(x, f"{kind}_entropy") for x in layers] for kind in ("overall", "image"))
    keys = [
        *axes.plot(centres, overall, "o", color=INK, markersize=3.5, label="overall", zorder=3),
        axes.vlines(centres, per_image, overall, color=ACCENT, linewidth=2.5, label="depends on the image", zorder=2),
        *axes.plot(centres, per_image, "o", color=INK, mfc="white", markersize=3.5, label="one image", zorder=3),
    ]
    _finish_strip(axes, "entropy", min(per_image), 1)
    axes.legend(handles=keys, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=LARGEST_LABEL,
                labelcolor=INK, borderaxespad=0)  # fmt: skip


def _draw_in_use(axes: Any, layers: list[LayerRouting], edges: list[int]) -> None:
    numbers = [layer.experts_in_use for layer in layers]
    axes.hlines([layer.num_experts for layer in layers], edges[:-1], edges[1:], color=FAINT, linewidth=1)
    axes.plot(_centres(edges), numbers, "o", color=INK, markersize=3.5, zorder=3)
    _finish_strip(axes, "experts\nin use", min(numbers), max(layer.num_experts for layer in layers))


def _finish_strip(axes: Any, label: str, low: float, high: float) -> None:
    """Start the scale near the lowest value: sigmoid routers stay near the top."""
    span = max(high - low, 0.02 * high)
    axes.set_ylim(high - 1.15 * span, high + 0.15 * span)
    axes.locator_params(axis="y", nbins=4)
    axes.set_ylabel(label, fontsize=LARGEST_LABEL, color=FAINT, rotation=0, ha="right", va="center")


def _name_layers(axes: Any, layers: list[LayerRouting], edges: list[int], width: float) -> None:
    size, step = _label_size(width / len(layers))
    names = [layer.name for layer in layers]
    axes.set_xticks(_centres(edges)[::step], names[::step], rotation=90, fontsize=size)


def _centres(edges: list[int]) -> list[float]:
    return [(low + high) / 2 for low, high in pairwise(edges)]


def _label_size(inches: float) -> tuple[float, int]:
    """Return the font size in points for labels this far apart, and the step at which they fit."""
    points = 0.85 * 72 * inches
    step = math.ceil(SMALLEST_LABEL / points)
    return min(LARGEST_LABEL, points * step), step


def _cut(words: str) -> str:
    """Shorten a long name in the middle, since names often differ at the end; escape $ for matplotlib."""
    words, half = printable(words), LONGEST_LABEL // 2 - 2
    short = words if len(words) <= LONGEST_LABEL else f"{words[:half]}...{words[-half:]}"
    return short.replace("$", r"\$")
