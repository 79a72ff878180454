"""`parameternet list`: networks and checkpoints."""

from typing import Any

import click

from parameternet.cli.output import count, print_json, print_table
from parameternet.models.summary import find_names, summarise


@click.command("list")
@click.argument("pattern", default="*")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list(pattern: str, as_json: bool) -> None:
    """List networks and checkpoints whose name contains PATTERN ('300m'), or matches it ('*.tin200').

    MACs are multiply-adds per image at the input size shown. Weights are searched in the folder PARAMETERNET_WEIGHTS,
    in the checkout and on the Hub; `parameternet doctor` checks them.
    """
    rows = [summarise(name) for name in find_names(pattern)]
    if as_json:
        print_json(rows)
        return
    headers = ("name", "tag", "parameters", "MACs", "input", "top-1", "weights")
    print_table(headers, [_cells(row) for row in rows], right=("parameters", "MACs", "input", "top-1"))


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
