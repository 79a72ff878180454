"""The page itself, in Gradio; it works offline."""

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from parameternet.app import heat_map
from parameternet.app.explainer import Cost, Explainer
from parameternet.data import images
from parameternet.data.errors import ImageError
from parameternet.text import printable

if TYPE_CHECKING:
    import gradio as gr

__all__ = ["build"]

# From an image to objects, each with a `label`, a `confidence` from 0 to 1 and a `box` in pixels.
Detector = Callable[[Image.Image], Sequence[Any]]
LEGEND = (
    "A column is a dynamic layer, a row one of its experts. Red: a larger share of the layer's routing weights than an "
    "even split; blue: a smaller one. Point at a cell to read it."
)
ALIKE = (
    "Both images have the same routing weights: an upcycled network that was not trained routes every image "
    "the same way."
)


def build(
    model: str | Path | None = None,
    detector: Detector | None = None,
    examples: Sequence[str | Path] | None = None,
    device: str | None = None,
) -> "gr.Blocks":
    """Build the page; `.launch()` serves it.

    Args:
        model, device, examples: As in `Explainer`.
        detector: Maps an image to objects with `label`, `confidence` and `box` (left, top, right, bottom in pixels).

    Raises:
        ModuleNotFoundError: Gradio is not installed.
        ValueError, WeightsError: As in `Explainer`.
    """
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # before the import, which checks for updates
    import gradio as gr

    explainer = Explainer(model, device, examples)
    with gr.Blocks(title=f"parameternet: {explainer.name}", analytics_enabled=False) as page:
        gr.Markdown(f"# {explainer.name}\nDrop an image: its classes, and which experts of each layer it uses.")
        with gr.Row():
            first, second = _image("Image", "image"), _image("Second image, to compare", "second")
        gr.Examples([str(path) for path in explainer.examples], first, label="Images to try")
        with gr.Row():
            classes = gr.Label(label="Network", elem_id="classes")
            static_classes = gr.Label(label="Static baseline", elem_id="static")
        costs = gr.Dataframe(
            headers=["", "parameters", "multiply-adds", "time for one image"], label="Cost", interactive=False
        )
        with gr.Row():
            routing, second_routing = gr.HTML(elem_id="routing"), gr.HTML(elem_id="second_routing")
        note = gr.Markdown()
        found = gr.AnnotatedImage(label="Detections", visible=detector is not None, elem_id="detections")
        outputs = [classes, static_classes, costs, routing, second_routing, note, found]

        for image in (first, second):
            image.change(
                partial(_show, explainer, detector),
                [first, second],
                outputs,
                api_name="explain",
                concurrency_id="network",  # one request at a time, for undisturbed latency measurements
                concurrency_limit=1,
            )
    return page


def _show(explainer: Explainer, detector: Detector | None, path: str | None, other: str | None) -> list[Any]:
    """Return the page's content for two images, in the order of its outputs."""
    if path is None:
        return [None, None, None, "", "", "", None]
    image = _read(path)
    found = explainer(image)
    others = explainer.routing(_read(other)) if other else None
    table = [_row("network", found.cost), _row("static baseline", found.static_cost)]
    maps = [_heat_map(found.routing, "Image"), _heat_map(others, "Second image") if others else ""]
    alike = others is not None and _alike(found.routing, others)
    boxes = (image, [(d.box, f"{d.label} {d.confidence:.0%}") for d in detector(image)]) if detector else None
    return [found.classes, found.static_classes, table, *maps, f"{LEGEND} {ALIKE}" if alike else LEGEND, boxes]


def _heat_map(routing: dict[str, Tensor], title: str) -> str:
    return f"<h3>Routing: {title}</h3>{heat_map.draw(routing, title)}"


def _image(label: str, name: str) -> Any:
    import gradio as gr

    sources = ["upload", "clipboard"]
    image = gr.Image(label=label, elem_id=name, type="filepath", sources=sources, height=280)
    image.preprocess = _path  # read by `data.images` like all images, not decoded by Gradio
    return image


def _path(payload: Any) -> str | None:
    return payload.path if payload else None


def _read(path: str) -> Image.Image:
    import gradio as gr

    try:
        return images.read(path)
    except ImageError as error:
        raise gr.Error(f"This image cannot be read: {printable(error.reason)}") from error


def _row(name: str, cost: Cost) -> list[str]:
    return [name, f"{cost.parameters / 1e6:.2f} M", f"{cost.macs / 1e6:.1f} M", f"{cost.milliseconds:.1f} ms"]


def _alike(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.allclose(one[name], other[name], atol=1e-6) for name in one)
