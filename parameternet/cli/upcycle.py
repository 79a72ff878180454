"""`parameternet upcycle SOURCE -o DIR`: convert a dense checkpoint to a dynamic one."""

from collections import Counter
from pathlib import Path

import click
from torch import nn

from parameternet.cli.options import OutputFolder
from parameternet.cli.output import count, echo, print_table
from parameternet.cli.progress import working
from parameternet.models.upcycled import upcycle_checkpoint
from parameternet.surgery.compare import Comparison
from parameternet.surgery.upcycle import KINDS, NOISE
from parameternet.text import printable


@click.command()
@click.argument("source")
@click.option("-o", "--output", required=True, type=OutputFolder(), metavar="DIR")
@click.option("--experts", default=4, show_default=True, type=click.IntRange(min=1), help="Kernels per layer.")
@click.option(
    "--include",
    multiple=True,
    default=["*"],
    metavar="PATTERN",
    help="Convert only layers that match.",
)
@click.option("--exclude", multiple=True, metavar="PATTERN", help="Skip layers that match.")
@click.option(
    "--kind", "kinds", multiple=True, type=click.Choice(KINDS), help="Convert only this kind.  [default: all]"
)
@click.option("--min-channels", default=1, show_default=True, type=click.IntRange(min=1), help="Skip smaller layers.")
@click.option("--stem", is_flag=True, help="Convert the first convolution too.")
@click.option("--head", is_flag=True, help="Convert the head and squeeze-and-excitation too.")
@click.option("--routing", type=click.Choice(["softmax", "sigmoid"]), default="softmax", show_default=True)
@click.option(
    "--noise",
    default=NOISE,
    show_default=True,
    help="Standard deviation of the noise between experts, relative to the kernel.",
)
@click.option(
    "--redraw", default=0.0, show_default=True, help="Fraction of each expert's output channels to re-initialise."
)
@click.option("--seed", default=0, show_default=True, help="Seed of the noise and of re-initialised channels.")
@click.option("--architecture", metavar="NAME", help="timm name of the model, for a file without a config.")
@click.option("--overwrite", is_flag=True, help="Replace a checkpoint in DIR.")
@click.option("--layers", is_flag=True, help="List every convolution, and why it was left dense.")
def upcycle(source: str, output: Path, experts: int, kinds: tuple[str, ...], layers: bool, **options) -> None:
    """Convert a dense network to a dynamic one with the same outputs, as a starting point for training.

    SOURCE is a timm model (resnet18.a1_in1k), hf-hub:ORG/NAME, local-dir:DIR, a run folder, a weights folder, or a
    .safetensors file. Load the result with timm.create_model("local-dir:DIR", pretrained=True), `parameternet predict
    --model DIR`, and so on.
    """
    with working(f"converting {printable(source)}"):
        dynamic, compared = upcycle_checkpoint(source, output, num_experts=experts, kinds=kinds or KINDS, **options)
    _show(dynamic, compared, layers)
    echo(f"\n{output}: model.safetensors, config.json")


def _show(dynamic: nn.Module, compared: Comparison, layers: bool) -> None:
    upcycling = dynamic.upcycling
    if layers:
        rows = [(layer.name, layer.kind, layer.shape, layer.left or "dynamic") for layer in upcycling.layers]
        print_table(("convolution", "kind", "kernel", "now"), rows)
    else:
        left = Counter(layer.left for layer in upcycling.layers if layer.left)
        rows = [("dynamic", str(len(upcycling.converted))), *((why, str(number)) for why, number in left.items())]
        print_table(("convolutions", "number"), rows, right=("number",))
    echo()
    before, after = compared.flops
    rows = [
        ("parameters", count(compared.parameters[0]), count(compared.parameters[1])),
        ("MACs per image", count(before.total), count(after.total)),
    ]
    print_table(("", "dense", "dynamic"), rows, right=("dense", "dynamic"))
    echo(f"\nlargest difference of outputs, relative to the largest output: {compared.difference:.1e}")
