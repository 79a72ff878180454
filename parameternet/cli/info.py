"""`parameternet info`: a network in detail."""

from typing import Any

import click

from parameternet.cli.output import count, echo, print_json, print_table
from parameternet.models.summary import describe


@click.command()
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def info(name: str, as_json: bool) -> None:
    """Show the stages, features and experts of NAME, and a breakdown of its parameters and MACs.

    NAME is an architecture (parameternet_150m), a checkpoint (parameternet_50m.tin200), a folder or run folder, a
    .safetensors file, local-dir:DIR, hf-hub:ORG/NAME, or a timm model.
    """
    facts = describe(name)
    print_json(facts) if as_json else _show(facts)


def _show(facts: dict[str, Any]) -> None:
    channels, height, width = facts["input_size"]
    mixed = facts["experts"]
    echo(f"{facts['name']}: {facts['description']}\n")
    rows = [
        ("input", f"{channels} x {height} x {width}"),
        ("classes", str(facts["num_classes"])),
        ("features", f"{facts['num_features']} in the last map, {facts['head_hidden_size']} before the classifier"),
        ("dynamic", _experts_in_words(mixed)),
        ("top-1", "-" if facts["top1"] is None else f"{facts['top1']:.2f} %"),
        ("weights", facts["weights"] or "none"),
    ]
    echo("\n".join(f"{key:10}{value}" for key, value in rows) + "\n")
    print_table(
        ("stage", "module", "stride", "resolution", "channels"),
        [
            (str(i), s["module"], str(s["reduction"]), f"{s['height']} x {s['width']}", str(s["channels"]))
            for i, s in enumerate(facts["stages"])
        ],
        right=("stage", "stride", "resolution", "channels"),
    )
    echo()
    _show_split("parameters", facts["parameters"])
    echo()
    _show_split("MACs per image", facts["macs"])
    echo(f"\nnot counted: {', '.join(f'{kind} x {calls}' for kind, calls in facts['not_counted'].items())}")


def _experts_in_words(mixed: dict[str, Any]) -> str:
    if not mixed["dynamic_convolutions"]:
        return "no dynamic convolutions"
    numbers = ", ".join(map(str, mixed["num_experts"]))
    return f"{mixed['dynamic_convolutions']} convolutions of {numbers} experts, {'/'.join(mixed['routing'])} routing"


def _show_split(title: str, split: dict[str, int]) -> None:
    total = split["total"] or 1
    rows = [(kind, count(number), f"{number / total:.1%}") for kind, number in split.items() if number]
    print_table((title, "number", "share"), rows, right=("number", "share"))
