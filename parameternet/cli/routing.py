"""`parameternet routing`: which experts of a network pictures use."""

import sys
from pathlib import Path
from typing import Any

import click

from parameternet.cli._output import echo, print_json, print_table
from parameternet.prediction import Predictor
from parameternet.routing import LayerRouting, Routing, draw, dynamic_layers, find_pictures, measure
from parameternet.text import printable

FORMATS = (".png", ".pdf", ".svg", ".jpg", ".webp")
HEADERS = ("layer", "experts", "picture entropy", "overall entropy", "experts in use", "active")


def _picture_path(_: click.Context, __: click.Parameter, path: Path) -> Path:
    if path.suffix.lower() not in FORMATS:
        raise click.BadParameter(f"{path} names no format of pictures: let it end in {', '.join(FORMATS)}")
    if not path.parent.is_dir():
        raise click.BadParameter(f"the folder {path.parent} does not exist")
    return path


@click.command()
@click.argument("name")
@click.argument("images", nargs=-1, required=True, metavar="IMAGES...")
@click.option("--per-class", default=10, show_default=True, type=click.IntRange(min=1), help="Pictures a class.")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default="routing.png",
    show_default=True,
    callback=_picture_path,
    help="The heat map.",
)
@click.option("--batch-size", default=16, show_default=True, type=click.IntRange(min=1), help="Pictures a step.")
@click.option("--device", metavar="DEVICE", help="cpu, cuda, cuda:1, mps.  [default: a CUDA device if there is one]")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def routing(
    name: str, images: tuple[str, ...], per_class: int, output: Path, batch_size: int, device: str | None, as_json: bool
) -> None:
    """Show which experts of NAME the pictures of IMAGES use, as a table and a heat map.

    NAME is a checkpoint, a folder or run folder, a .safetensors file, local-dir:DIR or hf-hub:ORG/NAME. IMAGES are
    files, folders, or .tar files; in a folder or .tar with one sub-folder a class, the rows of the heat map are the
    classes.

    Entropies go from 0 (one expert alone) to 1 (all alike): that of one picture's shares, on average, and that of the
    mean shares. Experts in use is the effective number; active are those with a mean share of at least 1 / (10 E).

    Images that cannot be read are named and the others go on; the exit code is 1 then.
    """
    predictor = Predictor(name, device)
    dynamic_layers(predictor.model)  # before pictures are looked for, which may be many
    found = measure(predictor, find_pictures(images, per_class), batch_size)
    print_json(_plain(found)) if as_json else _show(found)
    for path, why in found.unreadable:
        echo(printable(f"{path}: {why}"), err=True)
    draw(found, output)
    echo(f"picture: {output}", err=True)
    if found.unreadable:
        sys.exit(1)


def _show(found: Routing) -> None:
    rows = [
        (
            layer.name,
            str(layer.num_experts),
            f"{layer.picture_entropy:.4f}",
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
        "pictures": found.pictures,
        "rows": [row._asdict() for row in found.rows],
        "layers": [_plain_layer(layer) for layer in found.layers],
        "unreadable": [{"path": path, "error": why} for path, why in found.unreadable],
    }


def _plain_layer(layer: LayerRouting) -> dict[str, Any]:
    return {
        "name": layer.name,
        "num_experts": layer.num_experts,
        "picture_entropy": layer.picture_entropy,
        "overall_entropy": layer.overall_entropy,
        "experts_in_use": layer.experts_in_use,
        "active_experts": layer.active_experts,
        "mean_shares": layer.mean_shares.tolist(),
        "coefficients": layer.coefficients.tolist(),
        "shares": layer.shares.tolist(),
    }
