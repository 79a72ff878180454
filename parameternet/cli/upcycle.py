"""`parameternet upcycle SOURCE -o DIR`: a dense checkpoint as a dynamic one."""

from collections import Counter
from pathlib import Path

import click
from torch import nn

from parameternet.cli.output import count, echo, print_table
from parameternet.models.upcycled import upcycle_checkpoint
from parameternet.surgery.compare import Comparison
from parameternet.surgery.upcycle import KINDS, NOISE


@click.command()
@click.argument("source")
@click.option("-o", "--output", required=True, type=click.Path(file_okay=False, path_type=Path), metavar="DIR")
@click.option("--experts", default=4, show_default=True, type=click.IntRange(min=1), help="Kernels that are mixed.")
@click.option("--include", multiple=True, default=["*"], metavar="PATTERN", help="Only layers named so, as 'blocks.*'.")
@click.option("--exclude", multiple=True, metavar="PATTERN", help="Not layers named so.")
@click.option(
    "--kind", "kinds", multiple=True, type=click.Choice(KINDS), help="Only such convolutions.  [default: all]"
)
@click.option("--min-channels", default=1, show_default=True, type=click.IntRange(min=1), help="Leave smaller ones.")
@click.option("--stem", is_flag=True, help="The first convolution, too.")
@click.option("--head", is_flag=True, help="The head and squeeze-and-excitation, too.")
@click.option("--routing", type=click.Choice(["softmax", "sigmoid"]), default="softmax", show_default=True)
@click.option("--noise", default=NOISE, show_default=True, help="Between experts, relative to the dense kernel.")
@click.option("--seed", default=0, show_default=True, help="Of the noise.")
@click.option("--architecture", metavar="NAME", help="timm's name of the network, for a file without a config.")
@click.option("--overwrite", is_flag=True, help="Replace a checkpoint in DIR.")
@click.option("--layers", is_flag=True, help="List every convolution, and why it stayed dense.")
def upcycle(source: str, output: Path, experts: int, kinds: tuple[str, ...], layers: bool, **options) -> None:
    """Make a dynamic network of a dense one: the same function, more experts to train on with.

    SOURCE is a network of timm (resnet18.a1_in1k), hf-hub:ORG/NAME, local-dir:DIR, a run folder, a folder in the Hub's
    layout, or a .safetensors file. DIR is then loaded by timm.create_model("local-dir:DIR", pretrained=True), by
    `parameternet predict --model DIR`, and so on.
    """
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
        ("MACs an image", count(before.total), count(after.total)),
    ]
    print_table(("", "dense", "dynamic"), rows, right=("dense", "dynamic"))
    echo(f"\nlargest difference of outputs, relative to the largest output: {compared.difference:.1e}")
