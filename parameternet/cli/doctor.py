"""`parameternet doctor`: check this installation."""

import sys
from typing import Any

import click

from parameternet.cli.output import echo, print_json, print_table
from parameternet.diagnosis import examine


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(as_json: bool) -> None:
    """Check versions, devices, extras and weights of this installation. Exit code 1 if something is broken."""
    report = examine()
    print_json(report) if as_json else _show(report)
    if report["problems"]:
        sys.exit(1)


def _show(report: dict[str, Any]) -> None:
    print_table(("package", "version"), [(name, version or "missing") for name, version in report["versions"].items()])
    echo()
    print_table(("device", "what"), [(device["device"], _device_in_words(device)) for device in report["devices"]])
    echo()
    rows = [(e["extra"], "missing " + ", ".join(e["missing"]) if e["missing"] else "complete",
             e["install"] if e["missing"] else "") for e in report["extras"]]  # fmt: skip
    print_table(("extra", "state", "to install it"), rows)
    echo("\nWeights are searched in this order:")
    where = report["places"]
    for place in [*where["folders"], f"{where['hub_cache']} (copies from the Hub)", where["hub"]]:
        echo(f"  {place}")
    echo("".join(f"  {name}={value}\n" for name, value in where["environment"].items()))
    rows = [(c["name"], c["state"], c["path"] or "downloaded at first use") for c in report["checkpoints"]]
    print_table(("checkpoint", "state", "where"), rows or [("none recorded yet", "", "")])
    _show_problems(report["problems"])


def _show_problems(problems: list[dict[str, str]]) -> None:
    echo("\n" + ("Broken:" if problems else "All is well."))
    for found in problems:
        echo(f"  {found['problem']}\n    {found['mend']}")


def _device_in_words(device: dict[str, Any]) -> str:
    size = f"{device['memory_gib']} GiB" if "memory_gib" in device else ""
    threads = f"{device['threads']} threads" if "threads" in device else ""
    kernels = f"native kernels: {device['native_kernels']}" if "native_kernels" in device else ""
    return ", ".join(filter(None, (device["name"], size, threads, kernels)))
