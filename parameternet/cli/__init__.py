"""The command line: one module per command, imported on first use."""

import difflib
import importlib
import warnings
from collections.abc import Sequence
from typing import Any

import click

from parameternet import __version__
from parameternet.diagnosis import EXTRAS
from parameternet.memory import keep_freed_memory
from parameternet.text import printable_lines

__all__ = ["main"]

COMMANDS = {
    "list": "List networks and checkpoints: size, cost, accuracy.",
    "info": "Describe a network: stages, experts, parameters and MACs.",
    "predict": "Classify images.",
    "routing": "Show which experts images use, per layer and class.",
    "train": "Train from a recipe.",
    "val": "Measure the accuracy of a checkpoint.",
    "release": "Turn a finished run into a checkpoint.",
    "upcycle": "Convert a dense network to a dynamic one with the same outputs.",
    "card": "Write the model card of a checkpoint.",
    "publish": "Publish a checkpoint on the Hub.",
    "export": "Export to ONNX, OpenVINO, mobile and other formats, and check the file.",
    "app": "Serve a web page to try a network.",
    "doctor": "Check the installation.",
}


class Commands(click.Group):
    """Import commands on first use, and report errors without a traceback."""

    def list_commands(self, ctx: click.Context) -> Sequence[str]:
        return [*COMMANDS]  # not list(): parameternet.cli.list hides it once it is imported

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        try:
            return getattr(importlib.import_module(f"parameternet.cli.{cmd_name}"), cmd_name)
        except ModuleNotFoundError as error:
            raise click.ClickException(f"`parameternet {cmd_name}` {_missing(error)}") from error

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        name = args[0]
        if not name.startswith("-") and name not in COMMANDS:
            near = difflib.get_close_matches(name, COMMANDS, n=2, cutoff=0.5)
            hint = f"closest: {', '.join(near)}" if near else f"there are: {', '.join(COMMANDS)}"
            raise click.UsageError(f"no such command {name!r}; {hint}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):  # click would import every command for this
            formatter.write_dl([*COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        except Exception as error:
            if ctx.params["debug"] or not _is_ours_to_tell(error):
                raise
            raise _as_sentence(error, ctx) from error


def _is_ours_to_tell(error: Exception) -> bool:
    """Return True for errors raised on purpose; anything else is a bug and needs its traceback."""
    expected = isinstance(error, RuntimeError | ValueError | OSError | ImportError)
    return expected or type(error).__module__.startswith("parameternet.")


def _as_sentence(error: Exception, ctx: click.Context) -> click.ClickException:
    from parameternet.weights import UnknownWeights

    if isinstance(error, UnknownWeights):
        return click.UsageError(printable_lines(str(error)), ctx)
    if isinstance(error, ModuleNotFoundError):
        return click.ClickException(f"this {_missing(error)}")
    return click.ClickException(printable_lines(str(error)) or type(error).__name__)


def _missing(error: ModuleNotFoundError) -> str:
    package = (error.name or "").partition(".")[0]
    if package == "parameternet":
        return f"is not part of this installation ({error.name} is missing): install parameternet again"
    extra = next((extra for extra, names in EXTRAS.items() if package in names), None)
    wanted = f"'parameternet[{extra}]'" if extra else package
    return f"needs the package {package}: pip install {wanted}"


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="parameternet")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.pass_context
def main(ctx: click.Context, debug: bool) -> None:
    """List, inspect, use, train and export networks with dynamic convolutions."""
    keep_freed_memory()
    ctx.with_resource(warnings.catch_warnings())
    warnings.showwarning = lambda message, *_, **__: click.echo(f"Warning: {printable_lines(str(message))}", err=True)
