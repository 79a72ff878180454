"""`parameternet train RECIPE`: train from a recipe, or resume a run."""

from pathlib import Path

import click

from parameternet import training
from parameternet.cli.options import InputPath, OutputFolder
from parameternet.cli.output import echo
from parameternet.cli.terminal import Terminal, handle_errors
from parameternet.training.recipe import allowed


def _fields(context: click.Context, _: click.Parameter, wanted: bool) -> None:
    if not wanted:
        return
    for name, default, doc in training.Recipe.fields():
        echo(f"{name}: {default!r}\n    {doc}\n    {allowed(name)}")
    context.exit()


@click.command()
@click.argument("recipe", type=InputPath(exists=False, dir_okay=False))
@click.option(
    "--set",
    "overrides",
    metavar="KEY=VALUE",
    multiple=True,
    help="Override a field, e.g. lr=0.1; the last override of a field wins.",
)
@click.option("--output", type=OutputFolder(), help="Run folder.  [default: runs/RECIPE]")
@click.option(
    "--fields",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_fields,
    help="List the recipe fields.",
)
@handle_errors
def train(recipe: Path, overrides: tuple[str, ...], output: Path | None) -> None:
    """Train from RECIPE, a YAML file. Resumes if the run folder exists.

    Several processes: torchrun --nproc-per-node N -m parameternet.cli.train RECIPE
    """
    result = training.run(
        training.load_recipe(recipe, overrides), output or Path("runs") / recipe.stem, reporter=Terminal()
    )
    best = result["best"]
    if best["top1"] is not None:
        echo(f"best: top1 {best['top1']:.2f}  top5 {best['top5']:.2f}  epoch {best['epoch']}")


if __name__ == "__main__":
    train()
