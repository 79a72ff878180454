"""`parameternet export`: convert a network for another runtime."""

from pathlib import Path

import click
import timm
from torch import nn

from parameternet.cli.output import echo, print_table
from parameternet.export import FORMATS, FORMS, Exported
from parameternet.export import export as write
from parameternet.models import catalogue
from parameternet.models.summary import registered


@click.command()
@click.argument("name")
@click.option("--format", "format_", type=click.Choice(FORMATS), default="onnx", show_default=True)
@click.option(
    "--form",
    type=click.Choice(FORMS),
    default="computed",
    show_default=True,
    help="computed: mix kernels in the graph (fast); constant: for TensorRT and mobile runtimes.",
)
@click.option("--batch", type=click.IntRange(min=1), help="Batch size.  [default: any]")
@click.option("--size", type=click.IntRange(min=1), help="Height and width.  [default: the checkpoint's]")
@click.option("--dynamic-size", is_flag=True, help="Allow any height and width; slower in some runtimes.")
@click.option("--output", type=click.Path(path_type=Path), help="File.  [default: NAME with the format's suffix]")
@click.option("--opset", type=int, help="ONNX opset.  [default: the exporter's choice]")
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
    untrained: bool,
) -> None:
    """Export NAME for another runtime, run the file, and keep it if its outputs match the network's.

    NAME is a checkpoint, a folder or run folder, a .safetensors file or hf-hub:ORG/NAME; with --untrained, an
    architecture. The file includes preprocessing and class names. The exit code is 1 if outputs differ by more than
    1e-4.
    """
    made = write(
        _untrained(name) if untrained else _trained(name),
        output,
        format_,
        form=form,
        batch=batch,
        size=size,
        dynamic_size=dynamic_size,
        opset=opset,
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
    echo(f"{files}: {made.format}, {made.form} kernels, {batch}{size}, {made.bytes / 1e6:.1f} MB")
    rows = [(where, f"{value:.1e}") for where, value in made.differences.items()]
    print_table(("the file run at", "largest relative difference"), rows, right=("largest relative difference",))
