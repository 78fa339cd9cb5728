"""Ctrl-C: the first asks for an end after the step that is under way, the second ends at once."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(Exception):
    """The run was asked to end, and has saved what it takes to go on."""


class Interrupt:
    def __init__(self) -> None:
        self.is_asked = False

    def ask(self, number: int, frame: FrameType | None) -> None:
        if self.is_asked:
            os._exit(130)  # threads may be waiting for long, and would hold the interpreter back
        self.is_asked = True
        print(
            "Ctrl-C: the run ends after this step, with a checkpoint; once more: at once", file=sys.stderr, flush=True
        )


@contextmanager
def listening() -> Iterator[Interrupt]:
    """SIGINT asks what is given; only the main thread may listen."""
    interrupt = Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return
    before = signal.signal(signal.SIGINT, interrupt.ask)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, before)
