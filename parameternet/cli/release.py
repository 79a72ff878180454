"""`parameternet release RUN NAME.TAG --data VAL`: turn a finished run into a checkpoint."""

from pathlib import Path

import click

from parameternet.cli.options import InputPath, OutputFolder, device_option
from parameternet.cli.output import echo
from parameternet.cli.terminal import Terminal, handle_errors
from parameternet.hub import release as make


@click.command()
@click.argument("run", type=InputPath(file_okay=False))
@click.argument("name")
@click.option("--data", required=True, help="Validation images, for the figures on the card.")
@click.option("--destination", type=OutputFolder(), help="[default: weights/]")
@click.option("--data-name", help="Name of the data set, for the card.  [default: the recipe's]")
@click.option("--data-terms", help="Terms of its images, for the card.  [default: the recipe's]")
@click.option("--batch-size", default=128, show_default=True, type=click.IntRange(min=1), help="Images per step.")
@click.option("--workers", default=2, show_default=True, type=click.IntRange(min=0), help="Data loading workers.")
@device_option
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads.  [default: torch's choice]")
@handle_errors
def release(run: Path, name: str, data: str, **options) -> None:
    """Write the checkpoint NAME (architecture.tag) from the run folder RUN.

    The checkpoint contains float16 weights, config, card, recipe and history. The written file is validated.
    """
    terminal = Terminal()
    try:
        found = make(run, name, data, reporter=terminal, **options)
    finally:
        terminal.close()
    echo(f"top1 {found['top1']:.2f} ± {found['top1_interval']:.2f}  top5 {found['top5']:.2f}")
    echo(f"sha256 {found['sha256']}, {found['bytes']:,} bytes -> {found['folder']}")


if __name__ == "__main__":
    release()
