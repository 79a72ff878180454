"""Measure how images use the experts of every dynamic layer."""

import math
import random
import tarfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from parameternet.data import images
from parameternet.data.errors import DataError, ImageError
from parameternet.data.sources import Folder, Tar, Unreadable, arrange, is_tar, location, open_files
from parameternet.deprecation import renamed, renamed_arguments
from parameternet.layers.recording import dynamic_layers, record_routing_weights
from parameternet.prediction import ImageLike, Predictor

__all__ = ["LayerRouting", "Routing", "Row", "Sample", "find_images", "measure"]


class Row(NamedTuple):
    """A row of the result: a class or a single image. `label` is its readable name, `images` its number of images."""

    name: str
    label: str
    images: int
    is_class: bool

    pictures = renamed("pictures", "images")


@dataclass(frozen=True)
class LayerRouting:
    """How images use the E experts of a layer.

    The shares of an image are its routing weights divided by their sum, since sigmoid weights do not sum to one; 1/E
    each if all are 0. Entropies are divided by log E: 0 is a single expert, 1 is all experts equally; 0 if E = 1.

    routing_weights: Mean over the images of each row, (C, E), float64.
    shares: Mean shares of each row, (C, E), float64.
    mean_shares: Mean over all images, (E,): how much each expert is used.
    image_entropy: Entropy of an image's shares, mean over images: how mixed its kernel is.
    images: Number of images.
    """

    name: str
    routing_weights: Tensor
    shares: Tensor
    mean_shares: Tensor
    image_entropy: float
    images: int

    coefficients = renamed("coefficients", "routing_weights")
    picture_entropy = renamed("picture_entropy", "image_entropy")
    pictures = renamed("pictures", "images")

    @property
    def num_experts(self) -> int:
        return len(self.mean_shares)

    @property
    def overall_entropy(self) -> float:
        """Return the entropy of the mean shares; it exceeds `image_entropy` if images are routed differently."""
        return float(_entropy(self.mean_shares))

    @property
    def experts_in_use(self) -> float:
        """Return the effective number of experts, 1 to E: exp(entropy of the mean shares)."""
        return self.num_experts**self.overall_entropy

    @property
    def active_experts(self) -> int:
        """Return how many experts have a mean share of at least 1 / (10 E)."""
        return int((self.mean_shares >= 1 / (10 * self.num_experts)).sum())


@dataclass(frozen=True)
class Routing:
    """Routing of a network: `rows` are the C rows of each layer, `unreadable` has (name, reason) of skipped images."""

    model: str
    rows: list[Row]
    layers: list[LayerRouting]
    unreadable: list[tuple[str, str]]

    pictures = renamed("pictures", "images")

    @property
    def images(self) -> int:
        return sum(row.images for row in self.rows)


# ---------------------------------------------------------------------------------------------------------------------
# Images
# ---------------------------------------------------------------------------------------------------------------------


class Sample(NamedTuple):
    """An image: its name, the class of its folder (None: its own row), and a function that returns it."""

    name: str
    group: str | None
    get: Callable[[], ImageLike | Unreadable]

    @property
    def row(self) -> str:
        return self.group or self.name


def find_images(given: Iterable[str | Path], per_class: int = 10) -> list[Sample]:
    """Find the images of files, folders and tars. Images that several of them contain, under any path, are found once.

    Args:
        given: Image files, http(s) URLs, folders, .tar files. Sub-folders of a folder or tar are classes.
        per_class: At most this many images of each class, the same ones on every call.

    Raises:
        DataError, ValueError: A .tar that has no images or cannot be read.
    """
    singles: list[Sample] = []
    classes: dict[str, list[Sample]] = defaultdict(list)
    known: set[tuple[str, str]] = set()
    for item in given:
        found = [(place, sample) for place, sample in _found(item) if place not in known]
        known.update(place for place, _ in found)
        for _, sample in found:
            (singles if sample.group is None else classes[sample.group]).append(sample)
    return singles + [sample for members in classes.values() for sample in _some(members, per_class)]


def _found(given: str | Path) -> Iterator[tuple[tuple[str, str], Sample]]:
    """Return the images of a folder or tar, or `given` itself if it is neither, each with its location."""
    if not is_tar(given) and not Path(given).is_dir():
        yield location(given), Sample(str(given), None, lambda: given)
        return
    try:
        store = open_files(given)
    except (OSError, tarfile.TarError) as error:
        raise DataError(f"cannot read images from {given}: {error}. Expected a folder or a .tar of images") from error
    listing = arrange(store)
    if not listing.samples and not listing.outside:
        if isinstance(store, Tar):
            raise DataError(f"no images in {given}. Expected a folder or a .tar of images")
        yield location(given), Sample(str(given), None, lambda: given)
    classes = list(listing.class_to_idx)
    for name, group in [(n, None) for n in listing.outside] + [(n, classes[label]) for n, label in listing.samples]:
        sample = Sample(f"{Path(given)}/{name}", group, lambda name=name: _get(store, name))
        yield store.location(name), sample


def _get(store: Folder | Tar, name: str) -> ImageLike | Unreadable:
    if isinstance(store, Folder):
        return store.root / name
    try:
        with images.naming(name):
            data = store.data(name)
        return images.decode(data, name)
    except ImageError as error:
        return Unreadable(0, name, error.reason)


def _some(samples: list[Sample], number: int) -> list[Sample]:
    """Choose at most `number` images, keeping their order; the choice does not depend on other classes."""
    if len(samples) <= number:
        return samples
    return [samples[index] for index in sorted(random.Random(0).sample(range(len(samples)), number))]


# ---------------------------------------------------------------------------------------------------------------------
# Measurement
# ---------------------------------------------------------------------------------------------------------------------


@renamed_arguments(pictures="samples")
def measure(
    predictor: Predictor,
    samples: Sequence[Sample],
    batch_size: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> Routing:
    """Run images through a network and record the routing weights of every dynamic layer.

    Args:
        predictor: The network and its transform.
        samples: From `find_images`.
        batch_size: Images per forward pass.
        progress: Called with (images done, images) after each forward pass.

    Raises:
        ValueError: No dynamic layer, or no readable image.
    """
    weights: dict[str, list[Tensor]] = {name: [] for name in dynamic_layers(predictor.model)}
    seen: list[Sample] = []
    unreadable: list[tuple[str, str]] = []
    for start in range(0, len(samples), batch_size):
        with record_routing_weights(predictor.model) as recording:
            for sample, error in _predict(predictor, samples[start : start + batch_size]):
                unreadable.append((sample.name, error)) if error else seen.append(sample)
        for name, calls in recording.calls.items():
            if calls:  # a layer used in several places is called once per place
                weights[name].append(torch.stack(calls).mean(0))
        if progress:
            progress(min(start + batch_size, len(samples)), len(samples))
    if not seen:
        raise ValueError(_nothing_seen(unreadable))
    unused = [name for name, parts in weights.items() if not parts]
    if unused:
        raise ValueError(f"no image reached {', '.join(unused[:5])}: the network does not use every layer")
    rows, places = _rows(seen, predictor.model.pretrained_cfg.get("label_descriptions") or {})
    layers = [_layer(name, torch.cat(parts), places, len(rows)) for name, parts in weights.items()]
    return Routing(predictor.name, rows, layers, unreadable)


def _predict(predictor: Predictor, samples: Sequence[Sample]) -> list[tuple[Sample, str | None]]:
    """Run the readable samples through the network in one batch; return each sample and why it could not be read."""
    opened = [(sample, sample.get()) for sample in samples]
    damaged = [(sample, image.why) for sample, image in opened if isinstance(image, Unreadable)]
    whole = [(sample, image) for sample, image in opened if not isinstance(image, Unreadable)]
    results = predictor.predict([image for _, image in whole], topk=1, batch_size=len(samples))
    return damaged + [(sample, result.error) for (sample, _), result in zip(whole, results, strict=True)]


def _nothing_seen(unreadable: list[tuple[str, str]]) -> str:
    first = f" (the first is {': '.join(unreadable[0])})" if unreadable else ""
    return (
        f"expected at least one image, but none of the {len(unreadable)} given could be read{first}: "
        "give image files, folders of them, or a .tar with one sub-folder a class"
    )


def _rows(seen: list[Sample], words: dict[str, str]) -> tuple[list[Row], Tensor]:
    """Return the rows, in the order of their first images, and the row (N,) of each image."""
    counts = Counter(sample.row for sample in seen)
    namesakes = Counter(Path(name).name for name in counts)
    labels = {p.row: words.get(p.group, p.group) if p.group else _short(p.name, namesakes) for p in seen}
    places = {name: place for place, name in enumerate(counts)}
    classes = {sample.group for sample in seen}
    rows = [Row(name, labels[name], number, name in classes) for name, number in counts.items()]
    return rows, torch.tensor([places[sample.row] for sample in seen])


def _short(name: str, namesakes: Counter[str]) -> str:
    """Return the file's name, with its folder if other files have the same name."""
    path = Path(name)
    return path.name if namesakes[path.name] == 1 else "/".join(path.parts[-2:])


def _layer(name: str, routing_weights: Tensor, rows: Tensor, num_rows: int) -> LayerRouting:
    """Compute a layer's routing from routing weights (N, E) and the row (N,) of each image."""
    total = routing_weights.sum(1, keepdim=True)
    shares = torch.where(total > 0, routing_weights / total, 1 / routing_weights.shape[1])
    return LayerRouting(
        name,
        _means(routing_weights, rows, num_rows),
        _means(shares, rows, num_rows),
        shares.mean(0),
        float(_entropy(shares).mean()),
        len(shares),
    )


def _means(values: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    sums = values.new_zeros(num_rows, values.shape[1]).index_add_(0, rows, values)
    return sums / torch.bincount(rows, minlength=num_rows)[:, None]


def _entropy(shares: Tensor) -> Tensor:
    """Return the entropy of shares (..., E), divided by log E; `entr` takes 0 log 0 as 0."""
    return torch.special.entr(shares).sum(-1) / (math.log(shares.shape[-1]) or 1.0)
