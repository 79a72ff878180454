"""Options and types of arguments that several commands have."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from parameternet.distributed import choose_device, local_rank
from parameternet.files import check_file, check_folder
from parameternet.text import address_error

__all__ = ["InputPath", "OutputFile", "OutputFolder", "device_option"]


class InputPath(click.Path):
    """A file or folder, which must exist unless `exists` is False."""

    def __init__(self, exists: bool = True, **options: Any) -> None:
        super().__init__(exists, path_type=Path, **options)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not Path(value).exists() and (error := address_error(str(value))):
            self.fail(error, param, ctx)
        return super().convert(value, param, ctx)


class OutputFile(click.Path):
    """A file that can be written.

    Args:
        suffixes: Supported endings; none: any.
    """

    def __init__(self, suffixes: Sequence[str] = ()) -> None:
        super().__init__(path_type=Path)
        self.suffixes = suffixes

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        path = Path(value)
        if self.suffixes and path.suffix.lower() not in self.suffixes:
            self.fail(f"unsupported image format {path}; use {', '.join(self.suffixes)}", param, ctx)
        return _checked(self, check_file, path, param, ctx)


class OutputFolder(click.Path):
    """A folder that can be written; it may not exist yet."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return _checked(self, check_folder, Path(value), param, ctx)


def _checked(kind: click.ParamType, check: Any, path: Path, param: Any, ctx: Any) -> Path:
    try:
        check(path)
    except (ValueError, OSError) as error:
        kind.fail(str(error), param, ctx)
    return path


def _device(_: click.Context, __: click.Parameter, name: str) -> str:
    try:
        choose_device(name, local_rank())
    except ValueError as error:
        raise click.BadParameter(str(error)) from error
    return name


device_option = click.option(
    "--device",
    metavar="DEVICE",
    default="auto",
    show_default=True,
    callback=_device,
    help="cpu, cuda, cuda:1, mps, or auto: the first accelerator, or the CPU.",
)
