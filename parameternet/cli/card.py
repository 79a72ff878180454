"""`parameternet card NAME.TAG|DIR`: the card of a checkpoint."""

from pathlib import Path

import click

from parameternet import files
from parameternet.cli.options import OutputFile
from parameternet.cli.output import echo
from parameternet.hub import write_card


@click.command()
@click.argument("checkpoint")
@click.option("-o", "--output", type=OutputFile(), help="File.  [default: print the card]")
def card(checkpoint: str, output: Path | None) -> None:
    """Write the card of CHECKPOINT (a name, folder, file or hf-hub:ORG/NAME) from its config and measured results.

    The header is Hub metadata. `parameternet publish` writes the card itself.
    """
    text = write_card(checkpoint)
    if output is None:
        echo(text, nl=False)
    else:
        files.write_text(output, text)
