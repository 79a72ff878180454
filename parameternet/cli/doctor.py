"""`parameternet doctor`: what is here, what is broken, how to mend it. It asks nothing of the network."""

import importlib.metadata
import importlib.util
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from parameternet import __version__, weights
from parameternet.cli import EXTRAS
from parameternet.cli._output import echo, print_json, print_table
from parameternet.models import catalogue

# distribution -> the oldest release that this package is tested with
NEEDED = {
    "torch": "2.4",
    "torchvision": "",
    "timm": "1.0.21",
    "huggingface-hub": "0.30",
    "safetensors": "",
    "pillow": "10.1",
    "click": "",
    "rich": "",
}
VARIABLES = ("PARAMETERNET_WEIGHTS", "PARAMETERNET_HUB", "HF_HOME", "HF_ENDPOINT", "HF_HUB_OFFLINE")


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(as_json: bool) -> None:
    """Check this installation: versions, devices, extras, weights. Exit code 1 if something is broken."""
    report = examine()
    print_json(report) if as_json else _show(report)
    if report["problems"]:
        sys.exit(1)


def examine() -> dict[str, Any]:
    """Everything that the command says, as plain data. `problems` is empty where all is well."""
    checkpoints = [checkpoint(name) for name in weights.known()]
    return {
        "versions": versions(),
        "devices": devices(),
        "extras": extras(),
        "places": places(),
        "checkpoints": checkpoints,
        "problems": [*_old_versions(), *_missing_places(), *_unregistered(), *_damaged(checkpoints)],
    }


def versions() -> dict[str, str | None]:
    """Version of each package that is needed; None where it is missing."""
    found = {name: _version(name) for name in NEEDED}
    return {"parameternet": __version__, "python": platform.python_version(), **found}


def devices() -> list[dict[str, Any]]:
    """Where networks can be computed."""
    import torch

    found = [{"device": "cpu", "name": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}]
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        facts = torch.cuda.get_device_properties(index)
        found.append(
            {"device": f"cuda:{index}", "name": facts.name, "memory_gib": round(facts.total_memory / 2**30, 1)}
        )
    if torch.backends.mps.is_available():
        found.append({"device": "mps", "name": "Apple GPU"})
    return found


def extras() -> list[dict[str, Any]]:
    """Optional parts, what each lacks, and the line that installs it."""
    return [
        {
            "extra": extra,
            "missing": [name for name in names if importlib.util.find_spec(name) is None],
            "install": f"pip install 'parameternet[{extra}]'",
        }
        for extra, names in EXTRAS.items()
    ]


def places() -> dict[str, Any]:
    """Where weights are looked for, and the settings that decide it."""
    from huggingface_hub import constants

    return {
        "folders": [str(path.parent.parent) for path in weights.places("any")],
        "hub": f"{constants.ENDPOINT}/{weights.hub()}",
        "hub_cache": str(constants.HF_HUB_CACHE),
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def checkpoint(name: str) -> dict[str, Any]:
    """Whether the copy of a checkpoint that would be taken here is the recorded one; `state` says it in a word."""
    path = weights.local(name)
    found = {"name": name, "path": str(path) if path else None, "bytes": weights.known()[name]["bytes"], "error": None}
    if path is None:
        return found | {"state": "not here"}
    try:
        weights.read(path, *weights.digests(name))
        if path in weights.places(name):
            weights.config(name)
    except weights.WeightsError as error:
        return found | {"state": "broken", "error": str(error)}
    return found | {"state": "verified"}


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _old_versions() -> Iterator[dict[str, str]]:
    for name, oldest in NEEDED.items():
        version = _version(name)
        if version is None:
            yield {"problem": f"{name} is missing", "mend": f"pip install {name}"}
        elif oldest and _numbers(version) < _numbers(oldest):
            yield {"problem": f"{name} is {version}, older than {oldest}", "mend": f"pip install -U '{name}>={oldest}'"}


def _numbers(version: str) -> tuple[int, ...]:
    numbers = (part for part in version.partition("+")[0].split(".") if part.isdigit())
    return tuple(map(int, numbers))


def _missing_places() -> Iterator[dict[str, str]]:
    own = os.environ.get("PARAMETERNET_WEIGHTS")
    if own and not Path(own).expanduser().is_dir():
        yield {
            "problem": f"PARAMETERNET_WEIGHTS names {own}, which is not a folder",
            "mend": "make that folder, set the variable to another, or unset it",
        }


def _unregistered() -> Iterator[dict[str, str]]:
    for name in weights.known():
        if name.partition(".")[0] not in catalogue.architectures():
            yield {
                "problem": f"weights.json records {name}, but no network of that name is registered",
                "mend": "install parameternet again: its parts are of different versions",
            }


def _damaged(checkpoints: list[dict[str, Any]]) -> Iterator[dict[str, str]]:
    for found in checkpoints:
        if found["state"] == "broken":
            yield {"problem": f"{found['name']} is not usable", "mend": found["error"]}


def _show(report: dict[str, Any]) -> None:
    print_table(("package", "version"), [(name, version or "missing") for name, version in report["versions"].items()])
    echo()
    print_table(("device", "what"), [(device["device"], _device_in_words(device)) for device in report["devices"]])
    echo()
    rows = [(e["extra"], "missing " + ", ".join(e["missing"]) if e["missing"] else "complete",
             e["install"] if e["missing"] else "") for e in report["extras"]]  # fmt: skip
    print_table(("extra", "state", "to install it"), rows)
    echo("\nWeights are looked for in this order:")
    where = report["places"]
    for place in [*where["folders"], f"{where['hub_cache']} (copies from the Hub)", where["hub"]]:
        echo(f"  {place}")
    echo("".join(f"  {name}={value}\n" for name, value in where["environment"].items()))
    rows = [(c["name"], c["state"], c["path"] or "downloaded when it is first used") for c in report["checkpoints"]]
    print_table(("checkpoint", "state", "where"), rows or [("none recorded yet", "", "")])
    _show_problems(report["problems"])


def _show_problems(problems: list[dict[str, str]]) -> None:
    echo("\n" + ("Broken:" if problems else "All is well."))
    for found in problems:
        echo(f"  {found['problem']}\n    {found['mend']}")


def _device_in_words(device: dict[str, Any]) -> str:
    size = f"{device['memory_gib']} GiB" if "memory_gib" in device else ""
    threads = f"{device['threads']} threads" if "threads" in device else ""
    return ", ".join(filter(None, (device["name"], size, threads)))
