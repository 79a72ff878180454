"""`parameternet list`: networks and checkpoints."""

from typing import Any

import click

from parameternet.cli.output import count, echo, print_json, print_table
from parameternet.models.summary import find_names, summarise

IMAGENET, UNTRAINED = "Trained on ImageNet", "Without weights"
DEMOS = "Trained on small data sets: demonstrations, not for accuracy"
GROUPS = (IMAGENET, UNTRAINED, DEMOS)
HEADERS = ("name", "tag", "parameters", "MACs", "input", "top-1", "weights")


@click.command("list")
@click.argument("pattern", default="*")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list(pattern: str, as_json: bool) -> None:
    """List networks and checkpoints whose name contains PATTERN ('300m') or matches it ('*.tin200').

    MACs are multiply-adds per image at the input size shown. Weights are looked up in the folder PARAMETERNET_WEIGHTS,
    in the checkout and on the Hub; `parameternet doctor` checks them.
    """
    rows = [summarise(name) for name in find_names(pattern)]
    if as_json:
        print_json(rows)
        return
    groups = {title: [row for row in rows if _group(row) == title] for title in GROUPS}
    for number, (title, found) in enumerate((title, found) for title, found in groups.items() if found):
        echo(f"{chr(10) if number else ''}{title}")
        found.sort(key=lambda row: -(row["top1"] or 0))
        print_table(HEADERS, [_cells(row) for row in found], right=("parameters", "MACs", "input", "top-1"))


def _group(row: dict[str, Any]) -> str:
    if row["tag"] is None:
        return UNTRAINED
    return IMAGENET if row["tag"].startswith("in1k") else DEMOS


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        row["name"],
        row["tag"] or "-",
        count(row["parameters"]),
        count(row["macs"]),
        "{} px".format(" x ".join(map(str, sorted(set(row["input_size"][1:]))))),
        "-" if row["top1"] is None else f"{row['top1']:.2f}",
        row["weights"] or "-",
    )
