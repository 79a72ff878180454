"""`parameternet predict`: classify images."""

import io
import os
import sys
from pathlib import Path
from typing import Any

import click
from PIL import Image

from parameternet.cli.options import OutputFile, device_option
from parameternet.cli.output import echo, print_json
from parameternet.cli.progress import Bar
from parameternet.files import write_bytes
from parameternet.prediction import DEFAULT_MODEL, Predictor, Result, draw, predict_to_file
from parameternet.text import printable


def _image_format(_: click.Context, __: click.Parameter, path: Path | None) -> Path | None:
    if path and Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        raise click.BadParameter(f"unsupported image format {path}; use .png, .jpg or .webp")
    return path


@click.command()
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...")
@click.option(
    "--model",
    metavar="NAME",
    default=DEFAULT_MODEL,
    show_default=True,
    help="A checkpoint, a folder or run folder, a .safetensors file, local-dir:DIR or hf-hub:ORG/NAME.",
)
@click.option("--topk", default=5, show_default=True, type=click.IntRange(min=1), help="Classes per image.")
@click.option(
    "--save",
    type=OutputFile(),
    callback=_image_format,
    help="Save a figure of the images with their classes.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write a row per image to a .csv, .jsonl or .parquet file instead of printing; resumes if interrupted.",
)
@click.option("--batch-size", default=64, show_default=True, type=click.IntRange(min=1), help="Images per step.")
@click.option(
    "--workers", type=click.IntRange(min=0), help="Data loading workers.  [default: one fewer than the cores]"
)
@device_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def predict(
    images: tuple[str, ...],
    model: str,
    topk: int,
    save: Path | None,
    output: Path | None,
    batch_size: int,
    workers: int | None,
    device: str,
    as_json: bool,
) -> None:
    """Classify each IMAGE: a file, a folder, or an http(s) URL.

    Images that cannot be read are listed and skipped, and the exit code is 1.

    With --output, IMAGE is a file, a folder, a .tar, or webdataset shards (wds/FOLDER:shards-{000..009}.tar). The same
    command resumes an interrupted run. Images that cannot be read are listed in FILE.errors.csv, and the exit code is
    0. Several processes: torchrun --nproc-per-node N -m parameternet predict IMAGE --output FILE
    """
    if output:
        if save:
            raise click.UsageError("--save draws what is printed; it does not go with --output")
        return _bulk(images, model, topk, output, batch_size, workers, device, as_json)
    predictor = Predictor(model, device)
    with Bar("predict") as bar:
        results = predictor.predict(images, topk, batch_size, keep_images=save is not None, progress=bar)
    if as_json:
        print_json({"model": predictor.name, "results": [_plain(result) for result in results]})
    else:
        _show(results)
    if save:
        _save(draw(results, predictor.name), save)
        click.echo(f"saved {save}", err=True)
    if any(result.error for result in results):
        sys.exit(1)


def _bulk(
    images: tuple[str, ...],
    model: str,
    topk: int,
    output: Path,
    batch_size: int,
    workers: int | None,
    device: str,
    as_json: bool,
) -> None:
    processes = int(os.environ.get("WORLD_SIZE", 1))
    with Bar("predict" if processes == 1 else f"process 1 of {processes}") as bar:
        made = predict_to_file(
            model, images, output, topk=topk, batch_size=batch_size, workers=workers, device=device, progress=bar
        )
    if made is None:  # another process reports
        return
    for note in made.notes:
        echo(note, err=True)
    if as_json:
        print_json({**made._asdict(), "output": str(made.output), "errors": made.errors and str(made.errors)})
        return
    resumed = f", {made.resumed:,} of them from an earlier start" if made.resumed else ""
    echo(f"{made.output}: {_images(made.images)}{resumed}", err=True)
    if made.errors:
        echo(f"{made.errors}: {_images(made.unreadable)} that cannot be read", err=True)


def _images(number: int) -> str:
    return f"{number:,} image{'' if number == 1 else 's'}"


def _plain(result: Result) -> dict[str, Any]:
    classes = zip(result.indices, result.labels, result.probabilities, strict=True)
    named = [{"index": index, "label": label, "probability": probability} for index, label, probability in classes]
    return {"path": result.path, "error": result.error, "classes": named}


def _show(results: list[Result]) -> None:
    for result in results:
        if result.error:
            click.echo(printable(f"{result.path}: {result.error}"), err=True)
            continue
        click.echo(printable(result.path))
        for label, probability in zip(result.labels, result.probabilities, strict=True):
            click.echo(f"  {probability:6.1%}  {_bar(probability)}{printable(label)}")


def _bar(probability: float) -> str:
    if not sys.stdout.isatty():
        return ""
    eighths = round(probability * 20 * 8)
    bar = "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()
    return click.style(f"{bar:20}", fg="blue") + "  "


def _save(image: Image.Image, path: Path) -> None:
    buffer = io.BytesIO()
    image.save(buffer, Image.registered_extensions()[path.suffix.lower()])
    write_bytes(path, buffer.getvalue())
