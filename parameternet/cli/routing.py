"""`parameternet routing`: which experts images use."""

import sys
from pathlib import Path
from typing import Any

import click

from parameternet.cli.options import OutputFile, device_option
from parameternet.cli.output import echo, print_json, print_table
from parameternet.cli.progress import Bar, working
from parameternet.cli.terminal import Terminal
from parameternet.files import check_file
from parameternet.layers.recording import dynamic_layers
from parameternet.prediction import Predictor
from parameternet.routing import Ablated, LayerRouting, Routing, ablate, draw, find_images, measure
from parameternet.text import printable

HEAT_MAP = "routing.png"
FORMATS = (".png", ".pdf", ".svg", ".jpg", ".webp")
HEADERS = ("layer", "experts", "image entropy", "overall entropy", "experts in use", "active")


@click.command()
@click.argument("name")
@click.argument("images", nargs=-1, required=True, metavar="IMAGES...")
@click.option("--per-class", default=10, show_default=True, type=click.IntRange(min=1), help="Images per class.")
@click.option(
    "--output",
    type=OutputFile(FORMATS),
    show_default=HEAT_MAP,
    help="File of the heat map.",
)
@click.option("--batch-size", default=16, show_default=True, type=click.IntRange(min=1), help="Images per step.")
@device_option
@click.option("--ablate", "ablating", is_flag=True, help="Measure top-1 with parts of the routing replaced.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def routing(
    name: str,
    images: tuple[str, ...],
    per_class: int,
    output: Path | None,
    batch_size: int,
    device: str,
    ablating: bool,
    as_json: bool,
) -> None:
    """Show which experts of NAME the given IMAGES use, as a table and a heat map.

    NAME is a checkpoint, a folder or run folder, a .safetensors file, local-dir:DIR or hf-hub:ORG/NAME. IMAGES are
    files, folders, or .tar files. Sub-folders of a folder or .tar are classes, and the heat map has a row per class.

    Shares are an image's routing weights divided by their sum. Entropies range from 0 (a single expert) to 1 (all
    experts equally): the mean entropy of an image's shares, and the entropy of the mean shares. "experts in use" is the
    effective number of experts, "active" counts those with a mean share of at least 1 / (10 E).

    With --ablate, IMAGES is one labelled data set, as for `parameternet val`. Top-1 is measured with the network's own
    routing weights; with their mean over the data set; with mean shares but each image's own sum (the drop shows the
    value of choosing experts); with own shares but the mean sum (the drop shows the value of scaling the kernel per
    image); and without each expert.

    Images that cannot be read are listed and skipped, and the exit code is 1.
    """
    if ablating:
        return _ablate(name, images, batch_size, device, as_json)
    output = output or Path(HEAT_MAP)
    check_file(output)
    predictor = Predictor(name, device)
    dynamic_layers(predictor.model)  # fail before the search for images, which may take long
    with Bar("routing") as bar:
        found = measure(predictor, find_images(images, per_class), batch_size, progress=bar)
    print_json(_plain(found)) if as_json else _show(found)
    for path, why in found.unreadable:
        echo(printable(f"{path}: {why}"), err=True)
    with working("heat map"):
        draw(found, output)
    echo(f"heat map: {output}", err=True)
    if found.unreadable:
        sys.exit(1)


def _ablate(name: str, images: tuple[str, ...], batch_size: int, device: str, as_json: bool) -> None:
    if len(images) != 1:
        raise click.UsageError(f"--ablate takes one data set of labelled images, got {len(images)}")
    terminal = Terminal()
    try:
        rows = ablate(name, images[0], batch_size=batch_size, device=device, reporter=terminal)
    finally:
        terminal.close()
    if as_json:
        print_json([row._asdict() for row in rows])
    else:
        headers = ("routing weights", "top-1", "difference")
        print_table(headers, [_cells(row) for row in rows], right=headers[1:])


def _cells(row: Ablated) -> tuple[str, str, str]:
    return row.routing, f"{row.top1:.2f}", "" if row.routing == "own" else f"{row.difference:+.2f}"


def _show(found: Routing) -> None:
    rows = [
        (
            layer.name,
            str(layer.num_experts),
            f"{layer.image_entropy:.4f}",
            f"{layer.overall_entropy:.4f}",
            f"{layer.experts_in_use:.2f}",
            str(layer.active_experts),
        )
        for layer in found.layers
    ]
    print_table(HEADERS, rows, right=HEADERS[1:])


def _plain(found: Routing) -> dict[str, Any]:
    return {
        "model": found.model,
        "images": found.images,
        "pictures": found.images,  # deprecated, like the other old names below
        "rows": [{**row._asdict(), "pictures": row.images} for row in found.rows],
        "layers": [_plain_layer(layer) for layer in found.layers],
        "unreadable": [{"path": path, "error": why} for path, why in found.unreadable],
    }


def _plain_layer(layer: LayerRouting) -> dict[str, Any]:
    return {
        "name": layer.name,
        "num_experts": layer.num_experts,
        "image_entropy": layer.image_entropy,
        "picture_entropy": layer.image_entropy,
        "overall_entropy": layer.overall_entropy,
        "experts_in_use": layer.experts_in_use,
        "active_experts": layer.active_experts,
        "mean_shares": layer.mean_shares.tolist(),
        "routing_weights": layer.routing_weights.tolist(),
        "coefficients": layer.routing_weights.tolist(),
        "shares": layer.shares.tolist(),
    }
