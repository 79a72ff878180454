"""A reporter that ends runs."""

from __future__ import annotations

import os
import signal

from parameternet.training import Reporter


class Stop(Reporter):
    """Sends this process a signal after so many steps, as Ctrl-C would."""

    def __init__(self, after: int, signum: int = signal.SIGINT):
        self.after, self.signum, self.notes = after, signum, []

    def step(self, *_):
        self.after -= 1
        if self.after == 0:
            os.kill(os.getpid(), self.signum)

    def note(self, text):
        self.notes.append(text)
