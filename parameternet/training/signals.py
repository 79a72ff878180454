"""Catch SIGINT and SIGTERM, so that a run stops between two updates."""

from __future__ import annotations

import signal
import threading
from types import FrameType


class StopSignals:
    """Record SIGINT and SIGTERM in a `with` block; a second signal has its usual effect.

    `received` is the signal's number, or 0.
    """

    def __init__(self):
        self.received = 0

    def __enter__(self) -> StopSignals:
        self.old = {}
        if threading.current_thread() is threading.main_thread():  # Python sets handlers in the main thread only
            self.old = {s: signal.signal(s, self._receive) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        self.received = signum
        self.__exit__()

    def __exit__(self, *_: object) -> None:
        for signum, handler in self.old.items():
            signal.signal(signum, handler)
        self.old = {}
