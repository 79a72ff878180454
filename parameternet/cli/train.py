"""`parameternet train RECIPE`: train by a recipe, or go on with a run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from parameternet import training


class Terminal(training.Reporter):
    """Shows a run: a progress bar on a terminal, lines where the output is piped."""

    def __init__(self):
        self.bar = None
        self.live = sys.stderr.isatty()

    def start(self, facts: dict[str, Any]) -> None:
        parameters, trained = facts["parameters"], facts["trained_parameters"]
        frozen = "" if parameters == trained else f" ({trained:,} trained)"
        self._say(f"{facts['model']}: {parameters:,} parameters{frozen}, {facts['classes']} classes")
        self._say(f"{facts['epochs']} epochs of {facts['steps_per_epoch']} steps, {facts['processes']} process(es) on "
                  f"{facts['device']} -> {facts['folder']}")  # fmt: skip
        if facts["epoch"] or facts["step"]:
            self._say(f"goes on after epoch {facts['epoch']}, step {facts['step']}")

    def step(self, epoch: int, step: int, steps: int, facts: dict[str, float]) -> None:
        if self.live:
            self._draw(f"epoch {epoch + 1}", step, steps)
        if not facts:
            return
        text = f"loss {facts['loss']:.4f}  lr {facts['lr']:.2e}  {facts['images_per_second']:.0f} images/s"
        if self.live:
            self.bar.set_postfix_str(text, refresh=False)
        else:
            self._say(f"epoch {epoch + 1}  step {step}/{steps}  {text}")

    def validating(self, step: int, steps: int) -> None:
        if self.live:
            self._draw("validation", step, steps)

    def epoch(self, row: dict[str, Any], best: bool) -> None:
        self._clear()
        score = "" if row["top1"] is None else f"  top1 {row['top1']:.2f}  top5 {row['top5']:.2f}"
        self._say(f"epoch {row['epoch']}  train loss {row['train_loss']:.4f}{score}  {row['seconds']:.0f} s"
                  f"{'  best' if best else ''}")  # fmt: skip

    def note(self, text: str) -> None:
        self._say(text, err=True)

    def close(self) -> None:
        self._clear()

    def _draw(self, title: str, step: int, steps: int) -> None:
        from tqdm import tqdm

        if self.bar is None or self.bar.desc != f"{title}: ":
            self._clear()
            self.bar = tqdm(total=steps, desc=title, initial=step - 1, leave=False, dynamic_ncols=True)
        self.bar.update(step - self.bar.n)

    def _clear(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def _say(self, text: str, err: bool = False) -> None:
        if self.bar is not None:
            self.bar.clear()
        click.echo(text, err=err)
        if not err:
            sys.stdout.flush()


@click.command()
@click.argument("recipe", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--set", "overrides", metavar="KEY=VALUE", multiple=True, help="Override a field: lr=0.1, model_kwargs.width=1.2")
@click.option("--output", type=click.Path(file_okay=False, path_type=Path), help="Run folder.  [default: runs/RECIPE]")
@click.option("--fields", is_flag=True, is_eager=True, expose_value=False, callback=lambda c, p, v: v and _fields(c),
              help="List the fields of a recipe and exit.")  # fmt: skip
def train(recipe: Path, overrides: tuple[str, ...], output: Path | None) -> None:
    """Train by RECIPE, a YAML file; a run folder that is there already is gone on with.

    Many processes: torchrun --nproc-per-node N -m parameternet.cli.train RECIPE
    """
    try:
        wanted = training.load_recipe(recipe, overrides)
        result = training.run(wanted, output or Path("runs") / recipe.stem, Terminal())
    except training.Interrupted as stop:
        click.echo(str(stop), err=True)
        sys.exit(128 + stop.signum)
    except training.TrainingError as error:
        raise click.ClickException(str(error)) from error
    best = result["best"]
    if best["top1"] is not None:
        click.echo(f"best: top1 {best['top1']:.2f} top5 {best['top5']:.2f} in epoch {best['epoch']} -> {result['folder']}")


def _fields(context: click.Context) -> None:
    import dataclasses

    for item in dataclasses.fields(training.Recipe):
        default = item.default if item.default is not dataclasses.MISSING else item.default_factory()
        click.echo(f"{item.name}: {default!r}\n    {item.metadata['doc']}")
    context.exit()


if __name__ == "__main__":
    train()
