"""`parameternet list`: what there is."""

import fnmatch
from typing import Any

import click

from parameternet.cli import _networks
from parameternet.cli._output import count, print_json, print_table
from parameternet.flops import count_flops
from parameternet.models import catalogue
from parameternet.models._builder import build_on_meta
from parameternet.models.loading import Source, parse_source


@click.command("list")
@click.argument("pattern", default="*")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list(pattern: str, as_json: bool) -> None:
    """Networks and checkpoints whose name holds PATTERN ('300m'; with * or ?: matches it, '*.tin200').

    MACs are multiply-adds for one image of the input size shown. Weights of this package are looked for in the folder
    PARAMETERNET_WEIGHTS, in the checkout and on the Hub; `parameternet doctor` checks them.
    """
    wanted = pattern if any(sign in pattern for sign in "*?[") else f"*{pattern}*"
    names = fnmatch.filter(_networks.names(), wanted)
    if not names:
        _networks.resolve(pattern)
    rows = [_row(name) for name in names]
    if as_json:
        print_json(rows)
        return
    headers = ("name", "tag", "parameters", "MACs", "input", "top-1", "weights")
    print_table(headers, [_cells(row) for row in rows], right=("parameters", "MACs", "input", "top-1"))


def _row(name: str) -> dict[str, Any]:
    source = parse_source(name) if name in catalogue.checkpoints() else Source(name, "architecture", name)
    config = _networks.config(source)
    model, size = build_on_meta(config), _networks.input_size(config)
    return {
        "name": name.partition(".")[0],
        "tag": name.partition(".")[2] or None,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "macs": count_flops(model, size).total,
        "input_size": size,
        "top1": _networks.top1(config),
        "weights": _networks.whereabouts(source),
    }


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
