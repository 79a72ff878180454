"""`parameternet val MODEL --data VAL`: measure accuracy and compare it with the recorded one."""

import sys

import click

from parameternet import training
from parameternet.cli.options import device_option
from parameternet.cli.output import echo, print_json
from parameternet.cli.terminal import Terminal, handle_errors


@click.command()
@click.argument("model")
@click.option("--data", required=True, help="Labelled images: a folder, a .tar, hfds/NAME, wds/FOLDER:shards.")
@click.option("--batch-size", default=128, show_default=True, type=click.IntRange(min=1), help="Images per step.")
@click.option("--workers", default=2, show_default=True, type=click.IntRange(min=0), help="Data loading workers.")
@device_option
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads.  [default: torch's choice]")
@click.option("--amp", type=click.Choice(["float16", "bfloat16"]), help="Mixed precision.")
@click.option("--channels-last", is_flag=True, help="Use the channels_last memory format.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@handle_errors
def val(model: str, data: str, as_json: bool, **measuring) -> None:
    """Measure the accuracy of MODEL: a name, a run folder, a weights folder, a .safetensors file, local-dir:DIR or
    hf-hub:ORG/NAME.

    Exits with 1 if the measured top-1 differs from the recorded one by more than 0.1 points.
    """
    terminal = Terminal()
    try:
        found = training.validate(model, data, reporter=terminal, **measuring)
    finally:
        terminal.close()
    if as_json:
        print_json(found)
    else:
        _show(found)
    sys.exit(1 if found["agrees"] is False else 0)


def _show(found: dict) -> None:
    verdict = {None: "", True: ": agrees", False: ": DISAGREES"}[found["agrees"]]
    recorded = "none for these images" if found["recorded"] is None else f"{found['recorded']:.2f}"
    skipped = f", {len(found['unreadable'])} unreadable" if found["unreadable"] else ""
    echo(f"top1 {found['top1']:.2f} ± {found['top1_interval']:.2f} (95 %, {found['images']:,} images{skipped})")
    echo(f"top5 {found['top5']:.2f}   loss {found['loss']:.4f}")
    echo(f"recorded {recorded}{verdict}")
    size = found["input_size"][-1]
    echo(f"{size} px, {found['device']}, {found['threads']} threads, {found['seconds']:.1f} s")


if __name__ == "__main__":
    val()
