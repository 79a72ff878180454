"""Where the experts go: routing coefficients of every dynamic layer, for pictures and for classes of pictures.

>>> routing = measure(Predictor("parameternet_50m.tin200"), find_pictures(["val.tar"]))
>>> round(routing.layers[0].experts_in_use, 2)
3.98
>>> draw(routing, "routing.png")
"""

import math
import random
import tarfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from parameternet import files
from parameternet.data import images
from parameternet.data.errors import DataError, ImageError
from parameternet.data.sources import Folder, Tar, Unreadable, arrange, is_tar, open_files
from parameternet.layers import DynamicConv
from parameternet.prediction import ImageLike, Predictor
from parameternet.surgery.collapse import listening
from parameternet.text import printable

__all__ = ["LayerRouting", "Picture", "Routing", "Row", "draw", "dynamic_layers", "find_pictures", "measure"]


class Row(NamedTuple):
    """What a row of coefficients stands for: a class, or one picture. `label` is its name in words."""

    name: str
    label: str
    pictures: int
    is_class: bool


@dataclass(frozen=True)
class LayerRouting:
    """How pictures use the E experts of one layer.

    A picture's shares are its coefficients divided by their sum, as those of a sigmoid do not sum to one; where all
    are 0, they are 1/E each. Entropies are divided by log E: 0 is one expert alone, 1 is all alike; with E = 1, 0.

    coefficients: Means (C, E) over the pictures of each row, float64.
    shares: Mean shares (C, E), likewise.
    mean_shares: (E,) over all pictures: how much each expert is used.
    picture_entropy: Mean over pictures of the entropy of their shares: how mixed one picture's kernel is.
    pictures: How many were seen.
    """

    name: str
    coefficients: Tensor
    shares: Tensor
    mean_shares: Tensor
    picture_entropy: float
    pictures: int

    @property
    def num_experts(self) -> int:
        return len(self.mean_shares)

    @property
    def overall_entropy(self) -> float:
        """Entropy of the mean shares: how evenly experts are used overall.

        By as much as it is above `picture_entropy`, routing depends on the picture.
        """
        return float(_entropy(self.mean_shares))

    @property
    def experts_in_use(self) -> float:
        """Effective number of experts, 1 to E: exp(entropy of the mean shares)."""
        return self.num_experts**self.overall_entropy

    @property
    def active_experts(self) -> int:
        """How many experts have a mean share of at least 1 / (10 E)."""
        return int((self.mean_shares >= 1 / (10 * self.num_experts)).sum())


@dataclass(frozen=True)
class Routing:
    """What a network's routers say: `rows` are the C rows of each layer, `unreadable` is (name, why) of pictures."""

    model: str
    rows: list[Row]
    layers: list[LayerRouting]
    unreadable: list[tuple[str, str]]

    @property
    def pictures(self) -> int:
        return sum(row.pictures for row in self.rows)


# ---------------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------------


class Picture(NamedTuple):
    """One picture: where it is, the class whose folder it lies in (None: it is a row by itself), and how to get it."""

    name: str
    group: str | None
    get: Callable[[], ImageLike | Unreadable]

    @property
    def row(self) -> str:
        return self.group or self.name


def find_pictures(given: Iterable[str | Path], per_class: int = 10) -> list[Picture]:
    """The pictures of files, folders and tars.

    Args:
        given: Image files, http(s) addresses, folders, .tar files. Pictures in sub-folders of a folder or tar are of
            the class that the sub-folder is named for.
        per_class: Pictures of each class that are taken at most; the same ones on every call.

    Raises:
        DataError, ValueError: A .tar without images, or that cannot be read.
    """
    singles: list[Picture] = []
    classes: dict[str, list[Picture]] = defaultdict(list)
    for item in given:
        for picture in _found(item):
            (singles if picture.group is None else classes[picture.group]).append(picture)
    return singles + [picture for members in classes.values() for picture in _some(members, per_class)]


def _found(given: str | Path) -> Iterator[Picture]:
    """Pictures of a folder or tar, or `given` itself if it is neither."""
    if not is_tar(given) and not Path(given).is_dir():
        yield Picture(str(given), None, lambda: given)
        return
    try:
        store = open_files(given)
    except (OSError, tarfile.TarError) as error:
        raise DataError(f"cannot read images from {given}: {error}. Expected a folder or a .tar of images") from error
    listing = arrange(store)
    if not listing.samples and not listing.outside:
        if isinstance(store, Tar):
            raise DataError(f"no images in {given}. Expected a folder or a .tar of images")
        yield Picture(str(given), None, lambda: given)
    classes = list(listing.class_to_idx)
    for name, group in [(n, None) for n in listing.outside] + [(n, classes[label]) for n, label in listing.samples]:
        yield Picture(f"{Path(given)}/{name}", group, lambda name=name: _get(store, name))


def _get(store: Folder | Tar, name: str) -> ImageLike | Unreadable:
    if isinstance(store, Folder):
        return store.root / name
    try:
        with images.naming(name):
            data = store.data(name)
        return images.decode(data, name)
    except ImageError as error:
        return Unreadable(0, name, error.reason)


def _some(pictures: list[Picture], number: int) -> list[Picture]:
    """At most `number` of them, in their order; a class's choice does not depend on the other classes."""
    if len(pictures) <= number:
        return pictures
    return [pictures[index] for index in sorted(random.Random(0).sample(range(len(pictures)), number))]


# ---------------------------------------------------------------------------------------------------------------------
# Measurement
# ---------------------------------------------------------------------------------------------------------------------


def dynamic_layers(model: nn.Module) -> dict[str, DynamicConv]:
    """The dynamic convolutions of a network by name.

    Raises:
        ValueError: There are none.
    """
    convs = {name: module for name, module in model.named_modules() if isinstance(module, DynamicConv)}
    if not convs:
        raise ValueError(
            f"expected a network with dynamic convolutions, but this {type(model).__name__} has none and so routes "
            "nothing: choose one of `parameternet list`, or make one by `parameternet upcycle`"
        )
    return convs


def measure(predictor: Predictor, pictures: Sequence[Picture], batch_size: int = 16) -> Routing:
    """Run pictures through a network, and note the coefficients of all its dynamic layers.

    Args:
        predictor: The network, with the transform of its pictures.
        pictures: As `find_pictures` gives them.
        batch_size: Pictures that go through the network at once.

    Raises:
        ValueError: Nothing to measure: no dynamic layer, or not one readable picture.
    """
    convs = dynamic_layers(predictor.model)
    coefficients: dict[str, list[Tensor]] = {name: [] for name in convs}
    seen: list[Picture] = []
    unreadable: list[tuple[str, str]] = []
    for start in range(0, len(pictures), batch_size):
        with listening(convs) as heard:
            for picture, error in _look(predictor, pictures[start : start + batch_size]):
                unreadable.append((picture.name, error)) if error else seen.append(picture)
        for name, calls in heard.items():
            if calls:  # a layer that stands in several places speaks once in each
                coefficients[name].append(torch.stack(calls).mean(0))
    if not seen:
        raise ValueError(_nothing_seen(unreadable))
    silent = [name for name, parts in coefficients.items() if not parts]
    if silent:
        raise ValueError(f"no image reached {', '.join(silent[:5])}: the network does not use every layer")
    rows, places = _rows(seen, predictor.model.pretrained_cfg.get("label_descriptions") or {})
    layers = [_layer(name, torch.cat(parts), places, len(rows)) for name, parts in coefficients.items()]
    return Routing(predictor.name, rows, layers, unreadable)


def _look(predictor: Predictor, pictures: Sequence[Picture]) -> list[tuple[Picture, str | None]]:
    """Each picture, and why it could not be read; the others have gone through the network together, in order."""
    opened = [(picture, picture.get()) for picture in pictures]
    damaged = [(picture, image.why) for picture, image in opened if isinstance(image, Unreadable)]
    whole = [(picture, image) for picture, image in opened if not isinstance(image, Unreadable)]
    results = predictor.predict([image for _, image in whole], topk=1, batch_size=len(pictures))
    return damaged + [(picture, result.error) for (picture, _), result in zip(whole, results, strict=True)]


def _nothing_seen(unreadable: list[tuple[str, str]]) -> str:
    first = f" (the first is {': '.join(unreadable[0])})" if unreadable else ""
    return (
        f"expected at least one picture, but of {len(unreadable)} given none could be read{first}: "
        "give image files, folders of them, or a .tar with one sub-folder a class"
    )


def _rows(seen: list[Picture], words: dict[str, str]) -> tuple[list[Row], Tensor]:
    """The rows, in the order of their first pictures, and the row (N,) of each picture."""
    counts = Counter(picture.row for picture in seen)
    namesakes = Counter(Path(name).name for name in counts)
    labels = {p.row: words.get(p.group, p.group) if p.group else _short(p.name, namesakes) for p in seen}
    places = {name: place for place, name in enumerate(counts)}
    classes = {picture.group for picture in seen}
    rows = [Row(name, labels[name], number, name in classes) for name, number in counts.items()]
    return rows, torch.tensor([places[picture.row] for picture in seen])


def _short(name: str, namesakes: Counter[str]) -> str:
    """The file's name, after its folder's where there are others of that name."""
    path = Path(name)
    return path.name if namesakes[path.name] == 1 else "/".join(path.parts[-2:])


def _layer(name: str, coefficients: Tensor, rows: Tensor, num_rows: int) -> LayerRouting:
    """From coefficients (N, E) and the row (N,) of each picture."""
    total = coefficients.sum(1, keepdim=True)
    shares = torch.where(total > 0, coefficients / total, 1 / coefficients.shape[1])
    return LayerRouting(
        name,
        _means(coefficients, rows, num_rows),
        _means(shares, rows, num_rows),
        shares.mean(0),
        float(_entropy(shares).mean()),
        len(shares),
    )


def _means(values: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    sums = values.new_zeros(num_rows, values.shape[1]).index_add_(0, rows, values)
    return sums / torch.bincount(rows, minlength=num_rows)[:, None]


def _entropy(shares: Tensor) -> Tensor:
    """Of shares (..., E), divided by log E; `entr` takes 0 log 0 as 0."""
    return torch.special.entr(shares).sum(-1) / (math.log(shares.shape[-1]) or 1.0)


# ---------------------------------------------------------------------------------------------------------------------
# The heat map
# ---------------------------------------------------------------------------------------------------------------------

INK, FAINT, LINE, ACCENT = "#1b1f24", "#6b7280", "#d5d9e0", "#b42318"
LARGEST_LABEL, SMALLEST_LABEL = 8.0, 4.5  # points; names that would be smaller are left out evenly
LONGEST_LABEL = 32  # characters of a row's name
STRIP, GAP = 0.9, 0.14  # inches


def draw(routing: Routing, path: str | Path) -> None:
    """Draw a heat map of shares to a file; its suffix is the format (.png, .pdf, .svg, .jpg, .webp).

    A row is a class or picture, a column is an expert of a layer. The colour is the share relative to 1/E, on a
    logarithmic scale that ends at the farthest share, at E or 1/E at most. Below are entropies and experts in use.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # the canvas of a file: no display, no global state
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
    with files.atomic_write(path) as file:  # "tight" makes room for all that stands beside the heat map
        figure.savefig(file, format=kind, dpi=150, bbox_inches="tight", pad_inches=0.25, facecolor="white")


def _size(columns: int, rows: int) -> tuple[float, float]:
    """Width and height of the heat map in inches: few cells are large, many as small as can be told apart."""
    width = max(min(0.16 * columns, 16), 0.045 * columns, 6)
    return width, max(min(0.35 * rows, max(8, 0.1 * rows), 40), 0.7)


def _panel(figure: Any, edges: list[int], bottom: float, height: float) -> Any:
    """Axes as wide as the heat map; `bottom` and `height` are in inches. Columns are the unit of x."""
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
    axes.annotate(
        printable(_title(routing)), (0, 1), (0, 22), "axes fraction", "offset points", weight="bold", color=INK
    )
    _note(axes, "columns: the experts of each layer, in order")
    _draw_scale(figure, image, limit)


def _note(axes: Any, words: str) -> None:
    axes.annotate(words, (0, 1), (0, 8), "axes fraction", "offset points", fontsize=LARGEST_LABEL, color=FAINT)


def _title(routing: Routing) -> str:
    classes = sum(row.is_class for row in routing.rows)
    of_classes = f" of {_count(classes, 'class', 'es')}" if classes == len(routing.rows) else ""
    return f"{routing.model}: which experts {_count(routing.pictures, 'picture')}{of_classes} use"


def _count(number: int, thing: str, plural: str = "s") -> str:
    return f"{number:,} {thing}{'' if number == 1 else plural}"


def _colour_limit(relative: Tensor, num_experts: int) -> float:
    """The end of the scale as a power of two; never so near that rounding looks like routing."""
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
    overall, picture = ([getattr(x, f"{kind}_entropy") for x in layers] for kind in ("overall", "picture"))
    keys = [
        *axes.plot(centres, overall, "o", color=INK, markersize=3.5, label="overall", zorder=3),
        axes.vlines(centres, picture, overall, color=ACCENT, linewidth=2.5, label="depends on the picture", zorder=2),
        *axes.plot(centres, picture, "o", color=INK, mfc="white", markersize=3.5, label="one picture", zorder=3),
    ]
    _finish_strip(axes, "entropy", min(picture), 1)
    axes.legend(handles=keys, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=LARGEST_LABEL,
                labelcolor=INK, borderaxespad=0)  # fmt: skip


def _draw_in_use(axes: Any, layers: list[LayerRouting], edges: list[int]) -> None:
    numbers = [layer.experts_in_use for layer in layers]
    axes.hlines([layer.num_experts for layer in layers], edges[:-1], edges[1:], color=FAINT, linewidth=1)
    axes.plot(_centres(edges), numbers, "o", color=INK, markersize=3.5, zorder=3)
    _finish_strip(axes, "experts\nin use", min(numbers), max(layer.num_experts for layer in layers))


def _finish_strip(axes: Any, label: str, low: float, high: float) -> None:
    """The scale begins near the lowest value, since routers of sigmoids stay near the top."""
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
    """Points of labels that are so far apart, and the step at which they have room."""
    points = 0.85 * 72 * inches
    step = math.ceil(SMALLEST_LABEL / points)
    return min(LARGEST_LABEL, points * step), step


def _cut(words: str) -> str:
    """Without its middle if it is long, as names of one camera differ at their ends; a dollar begins no formula."""
    words, half = printable(words), LONGEST_LABEL // 2 - 2
    short = words if len(words) <= LONGEST_LABEL else f"{words[:half]}...{words[-half:]}"
    return short.replace("$", r"\$")
