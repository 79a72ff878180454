"""Progress on a terminal: a bar for images, a spinner for other slow steps. Pipes get no output."""

import sys
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType

__all__ = ["Bar", "working"]


def working(title: str) -> AbstractContextManager:
    """Show a spinner with `title` on stderr while a block runs, if that is a terminal."""
    if not sys.stderr.isatty():
        return nullcontext()
    from rich.console import Console

    return Console(stderr=True).status(title)


class Bar:
    """Show images done, images per second and time left on stderr, if that is a terminal.

    >>> with Bar("predict") as bar:  # doctest: +SKIP
    ...     bar(32, 10_000)
    """

    def __init__(self, title: str) -> None:
        self.title = title
        self.bar = None

    def __call__(self, done: int, total: int) -> None:
        if self.bar is None:
            self._start(total)
        self.bar.update(self.task, completed=done)

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.stop()

    def _start(self, total: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
        from rich.progress import TimeRemainingColumn as TimeLeft
        from rich.text import Text

        class Speed(ProgressColumn):
            def render(self, task: Task) -> Text:
                speed = task.finished_speed or task.speed
                return Text("" if speed is None else f"{speed:.0f} images/s")

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Speed(), TimeLeft())
        self.bar = Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty())
        self.task = self.bar.add_task(self.title, total=total)
        self.bar.start()
