"""Content of the page for an image: classes, routing weights, and the static baseline's results."""

import statistics
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from parameternet import flops, weights
from parameternet.data import images
from parameternet.layers.recording import record_routing_weights
from parameternet.prediction import Predictor, expand
from parameternet.surgery import collapse

__all__ = ["Cost", "Explainer", "Explanation", "photos"]

ROUNDS = 3  # per network, in turn; an image should take less than a second


class Cost(NamedTuple):
    """Parameters and multiply-adds of a network, and its time for one image in milliseconds."""

    parameters: int
    macs: int
    milliseconds: float


class Explanation(NamedTuple):
    """Results of the network and of its static baseline for an image.

    classes, static_classes: The most probable classes with their probabilities.
    routing: Routing weights (E,) of each dynamic layer.
    cost, static_cost: Measured on this image, in turn.
    """

    classes: dict[str, float]
    static_classes: dict[str, float]
    routing: dict[str, Tensor]
    cost: Cost
    static_cost: Cost


def photos() -> list[Path]:
    """Return the example photos that come with the package."""
    return sorted(weights.shipped("tests/photos").glob("*.jpg"))


class Explainer:
    """Explain images with a network and its static baseline.

    The static baseline is the same network with one kernel per layer: the experts, mixed with their mean routing
    weights over `examples`.

    Args:
        model, device: As in `Predictor`.
        examples: Images or folders; None: the photos that come with the package.

    Raises:
        ValueError: A network without dynamic convolutions.
        WeightsError: The weights are missing or invalid.
    """

    def __init__(
        self,
        model: str | Path | nn.Module | None = None,
        device: str | torch.device | None = None,
        examples: Sequence[str | Path] | None = None,
    ) -> None:
        self.turn = threading.Lock()  # recordings of concurrent requests would mix
        self.predictor = Predictor(model, device)
        self.name = self.predictor.name
        given = photos() if examples is None else examples
        self.examples = [Path(path) for item in given for path in expand(item)]
        inputs = [self._input(images.read(path)) for path in self.examples]
        self.static = Predictor(collapse(self.predictor.model, inputs, float("inf"))[0], self.predictor.device)
        size = self.predictor.data_config["input_size"]
        self.facts = [_facts(predictor.model, size) for predictor in (self.predictor, self.static)]

    def __call__(self, image: Image.Image, topk: int = 5) -> Explanation:
        """Explain an image; `topk` is the number of classes."""
        x = self._input(image)
        with self.turn, torch.inference_mode():
            classes, routing = self._recorded(x, topk)
            static_classes = self._classes(self.static, x, topk)
            times = self._times(x)
        costs = [Cost(*facts, milliseconds) for facts, milliseconds in zip(self.facts, times, strict=True)]
        return Explanation(classes, static_classes, routing, *costs)

    def routing(self, image: Image.Image) -> dict[str, Tensor]:
        """Return the routing weights (E,) of each dynamic layer that the image reaches."""
        with self.turn:
            return self._recorded(self._input(image), 1)[1]

    def _recorded(self, x: Tensor, topk: int) -> tuple[dict[str, float], dict[str, Tensor]]:
        with record_routing_weights(self.predictor.model) as recording:
            classes = self._classes(self.predictor, x, topk)
        # A layer used in several places is called once per place.
        return classes, {name: torch.cat(calls).mean(0) for name, calls in recording.calls.items() if calls}

    def _input(self, image: Image.Image) -> Tensor:
        return self.predictor.preprocess(image)[None].to(self.predictor.device)

    def _classes(self, predictor: Predictor, x: Tensor, topk: int) -> dict[str, float]:
        ((probabilities, indices),) = predictor.classify(x, topk)
        return {predictor.labels[index]: value for index, value in zip(indices, probabilities, strict=True)}

    def _times(self, x: Tensor) -> list[float]:
        """Return the median milliseconds of the network and of its static baseline, run in turn."""
        times: list[list[float]] = [[], []]
        for _ in range(ROUNDS):
            for predictor, found in zip((self.predictor, self.static), times, strict=True):
                start = time.perf_counter()
                predictor.model(x).sum().item()  # waits for an accelerator too
                found.append(1e3 * (time.perf_counter() - start))
        return [statistics.median(found) for found in times]


def _facts(model: nn.Module, size: Sequence[int]) -> tuple[int, int]:
    return sum(parameter.numel() for parameter in model.parameters()), flops.count_flops(model, size).total
