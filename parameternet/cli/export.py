"""`parameternet export`: convert a network for another runtime."""

from pathlib import Path
from typing import Any

import click
import timm
from torch import nn

from parameternet.cli.options import InputPath
from parameternet.cli.output import echo, print_table
from parameternet.cli.progress import working
from parameternet.export import FORMATS, FORMS, Exported, check_output
from parameternet.export import export as write
from parameternet.models import catalogue
from parameternet.models.summary import registered
from parameternet.text import printable


@click.command()
@click.argument("name")
@click.option("--format", "format_", type=click.Choice(FORMATS), default="onnx", show_default=True)
@click.option(
    "--form",
    type=click.Choice(FORMS),
    default="computed",
    show_default=True,
    help="computed: mix kernels in the graph (fast); constant: for TensorRT; looped: one image at a time in the "
    "graph, for several large images on a CPU.",
)
@click.option("--batch", type=click.IntRange(min=1), help="Batch size.  [default: any]  Required for mobile formats.")
@click.option("--size", type=click.IntRange(min=1), help="Height and width.  [default: the checkpoint's]")
@click.option("--dynamic-size", is_flag=True, help="Allow any height and width; slower in some runtimes.")
@click.option("--output", type=click.Path(path_type=Path), help="File.  [default: NAME with the format's suffix]")
@click.option("--opset", type=int, help="ONNX opset.  [default: 18]")
@click.option(
    "--int8",
    type=InputPath(),
    help="Write 8-bit weights, calibrated on the images of this folder or .tar (at least 200); for onnx and openvino.",
)
@click.option(
    "--calibration-images", type=click.IntRange(min=1), default=300, show_default=True, help="How many calibrate."
)
@click.option("--untrained", is_flag=True, help="Export an architecture with random weights, to test a runtime.")
def export(
    name: str,
    format_: str,
    form: str,
    batch: int | None,
    size: int | None,
    dynamic_size: bool,
    output: Path | None,
    opset: int | None,
    int8: Path | None,
    calibration_images: int,
    untrained: bool,
) -> None:
    """Export NAME for another runtime, run the file, and keep it if its outputs match the network's.

    NAME is a checkpoint, a folder or run folder, a .safetensors file or hf-hub:ORG/NAME; with --untrained, an
    architecture. The file includes preprocessing and class names; the formats of timmx (ncnn, litert, executorch,
    coreml, tensorrt) have them in FILE.json. The exit code is 1 if outputs differ by more than 1e-4; with --int8, that
    is checked before quantisation, and the cost of 8 bits is printed and written to FILE.int8.json. Core ML and
    TensorRT files are not checked; a warning says so.
    """
    check_output(output, format_)
    with working(f"exporting {printable(name)}"):
        made = write(
            _untrained(name) if untrained else _trained(name),
            output,
            format_,
            form=form,
            batch=batch,
            size=size,
            dynamic_size=dynamic_size,
            opset=opset,
            int8=int8,
            calibration_images=calibration_images,
        )
    _show(made)


def _untrained(name: str) -> nn.Module:
    return timm.create_model(registered(name).partition(".")[0]).eval()


def _trained(name: str) -> str:
    if name in catalogue.architectures() and not catalogue.checkpoint(name):
        raise click.UsageError(f"{name} has no checkpoint; --untrained exports it with random weights")
    return name


def _show(made: Exported) -> None:
    batch = "any batch" if made.batch is None else f"batch {made.batch}"
    size = ", any height and width" if made.dynamic_size else ""
    files = " and ".join(str(file) for file in made.files)
    checked = ", not checked" if made.unchecked else ""
    echo(f"{files}: {made.format}, {made.form} kernels, {batch}{size}, {made.bytes / 1e6:.1f} MB{checked}")
    if made.unchecked:
        return
    rows = [(where, f"{value:.1e}") for where, value in made.differences.items()]
    print_table(("the file run at", "largest relative difference"), rows, right=("largest relative difference",))
    if made.int8:
        _show_int8(made.int8)


def _show_int8(report: dict[str, Any]) -> None:
    size, time, top1, routing = (report[key] for key in ("bytes", "ms", "top1", "routing_agreement"))
    rows = [
        ("size", f"{size['int8'] / 1e6:.1f} MB, {size['ratio']:.2f} of {size['float32'] / 1e6:.1f} MB"),
        (
            "difference of outputs",
            f"{100 * report['difference']:.1f} % on average of {report['checked_images']} images",
        ),
    ]
    if report["agreement"] is not None:
        rows.append(("same class as in floats", f"{report['agreement']:.2f} %"))
    if top1:
        rows.append(("top-1", f"{top1['int8']:.2f}, in floats {top1['float32']:.2f}, lost {top1['lost']:.2f}"))
    if routing:
        worst = min(routing, key=routing.__getitem__)
        mean = sum(routing.values()) / len(routing)
        rows.append(("same preferred expert", f"{mean:.2f} % on average, {routing[worst]:.2f} % in {worst}"))
    rows.append(("ms for one batch, one thread", f"{time['int8']:.2f}, in floats {time['float32']:.2f}"))
    print_table((f"8 bits, {report['calibration_images']} images for calibration", "compared with floats"), rows)
