"""Progress, errors and exit codes, shared by the training commands."""

import functools
import signal
import sys
from collections.abc import Callable
from typing import Any

import click

from parameternet import training, weights
from parameternet.cli.output import echo
from parameternet.text import printable, printable_lines

__all__ = ["Terminal", "handle_errors"]


def handle_errors(command: Callable) -> Callable:
    """Show training errors without a traceback and exit with 1, or with 128 + N after signal N."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except training.Interrupted as stop:
            echo(str(stop), err=True)
            sys.exit(128 + stop.signum)
        except KeyboardInterrupt:
            sys.exit(128 + signal.SIGINT)
        except (training.TrainingError, weights.WeightsError) as error:
            raise click.ClickException(printable_lines(str(error))) from error

    return wrapped


class Terminal(training.Reporter):
    """Show a run: a progress bar on a terminal, plain lines if the output is piped."""

    def __init__(self) -> None:
        self.bar = None
        self.live = sys.stderr.isatty()

    def start(self, facts: dict[str, Any]) -> None:
        parameters, trained = facts["parameters"], facts["trained_parameters"]
        frozen = "" if parameters == trained else f" ({trained:,} trained)"
        processes = f"{facts['processes']} processes" if facts["processes"] > 1 else "one process"
        self._say(f"{facts['model']}: {parameters:,} parameters{frozen}, {facts['classes']} classes")
        self._say(f"{facts['epochs']} epochs of {facts['steps_per_epoch']} steps, {processes} on {facts['device']}")
        self._say(f"run folder: {facts['folder']}")
        if facts["epoch"] or facts["step"]:
            self._say(f"resuming from epoch {facts['epoch']}, step {facts['step']}")

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

    def teaching(self, step: int, steps: int) -> None:
        if self.live:
            self._draw("teacher", step, steps)
        elif step == steps:
            self._say(f"teacher: predictions for {steps} batches")

    def epoch(self, row: dict[str, Any], best: bool) -> None:
        self._clear()
        score = "" if row["top1"] is None else f"  top1 {row['top1']:.2f}  top5 {row['top5']:.2f}"
        mark = "  best" if best else ""
        pace = f"{row['images_per_second']:.0f} images/s  waiting for data {row['data_share']:.1%}"
        self._say(
            f"epoch {row['epoch']}  train loss {row['train_loss']:.4f}{score}  {row['seconds']:.0f} s  {pace}{mark}"
        )

    def note(self, text: str) -> None:
        self._say(printable(text), err=True)  # file names may hold control characters

    def close(self) -> None:
        self._clear()

    def _draw(self, title: str, step: int, steps: int) -> None:
        from tqdm import tqdm

        if self.bar is None or self.title != title:
            self._clear()
            self.title = title
            self.bar = tqdm(total=steps, desc=title, initial=step - 1, leave=False, dynamic_ncols=True)
        self.bar.update(step - self.bar.n)

    def _clear(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def _say(self, text: str, err: bool = False) -> None:
        if self.bar is not None:
            self.bar.clear()
        echo(text, err=err)
