"""Ctrl-C and SIGTERM: the first asks for an end after the step that is under way; a second Ctrl-C ends at once."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

WORDS = {
    signal.SIGINT: "Ctrl-C: the run ends after this step, with a checkpoint; press it again to end at once",
    signal.SIGTERM: "SIGTERM: the run ends after this step, with a checkpoint",
}
"""Signal -> what is said when it comes first."""


class Interrupted(Exception):
    """The run was asked to end, and has saved what it takes to go on."""

    def __init__(self, text: str, number: int) -> None:
        super().__init__(text)
        self.exit_code = 128 + number
        """Exit code that shells give to a program that the signal `number` has ended."""


class Interrupt:
    """Request to end the run by a signal, if there was one."""

    def __init__(self) -> None:
        self.asked: int | None = None

    def ask(self, number: int, frame: FrameType | None) -> None:
        """Note the signal; end at once at a second Ctrl-C.

        Not at a second SIGTERM: schedulers send it to each process, and torchrun hands its own on.
        """
        if self.asked is None:
            self.asked = number
            print(WORDS[signal.Signals(number)], file=sys.stderr, flush=True)
        elif number == signal.SIGINT:
            os._exit(128 + number)  # threads may be waiting for long, and would hold the interpreter back


@contextmanager
def listening() -> Iterator[Interrupt]:
    """Call `ask` of what is yielded at SIGINT and SIGTERM; only the main thread may listen."""
    interrupt = Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return
    before = {number: signal.signal(number, interrupt.ask) for number in WORDS}
    try:
        yield interrupt
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
