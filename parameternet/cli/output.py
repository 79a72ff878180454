"""Output of all commands: tables on a terminal, plain columns in a pipe, JSON for programs."""

import json
import sys
from collections.abc import Sequence
from typing import Any

import click

from parameternet.text import escape_json, printable, printable_lines

__all__ = ["count", "echo", "print_json", "print_table"]


def echo(text: str = "", err: bool = False, nl: bool = True) -> None:
    """Print text that may contain untrusted names; escape terminal control sequences."""
    click.echo(printable_lines(text), err=err, nl=nl)


def print_json(value: Any) -> None:
    click.echo(escape_json(json.dumps(value, indent=2, ensure_ascii=False)))


def print_table(headers: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str] = ()) -> None:
    """Print rows under headers; columns in `right` are right-aligned. Piped output is never truncated."""
    rows = [[printable(cell) for cell in row] for row in rows]
    if sys.stdout.isatty():
        _rich_table(headers, rows, right)
    else:
        click.echo("\n".join(plain_table(headers, rows, right)))


def plain_table(headers: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str] = ()) -> list[str]:
    """Return lines of aligned columns, two spaces apart."""
    widths = [max(map(len, column)) for column in zip(headers, *rows, strict=True)]
    lines = []
    for row in [headers, *rows]:
        cells = [
            cell.rjust(width) if header in right else cell.ljust(width)
            for header, cell, width in zip(headers, row, widths, strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


def _rich_table(headers: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False)
    for header in headers:
        last = header == headers[-1]
        table.add_column(header, justify="right" if header in right else "left", no_wrap=not last, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    Console(highlight=False).print(table)


def count(number: float | None) -> str:
    """Format a count: Format a count: 2_463_856 -> '2.46 M'; None -> '-'."""
    if number is None:
        return "-"
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.3g} {unit}" if number < 1000 * limit else f"{number / limit:,.0f} {unit}"
    return f"{number:,.0f}"
