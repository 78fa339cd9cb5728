"""Signs of life of a run: lines, a bar on a terminal, and whenever nothing was said for a minute, what is going on."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from RL2.errors import printable

INTERVAL_S = 60.0
"""Longest silence while a run works."""
LOOKS = 10
"""Number of looks within one interval."""


class Phase:
    """A part of the work, which may know how much of it is done."""

    def __init__(self, what: str, total: float | None, unit: str, bar: tqdm[Any]) -> None:
        self.what, self.total, self.unit, self.bar = what, total, unit, bar
        self.done = 0.0
        self.begun = time.monotonic()

    def update(self, more: float) -> None:
        """Count `more` units as done."""
        self.done += more
        self.bar.update(more)

    def to(self, done: float) -> None:
        """Count `done` units as done in all."""
        self.update(done - self.done)

    def resize(self, total: float) -> None:
        """Change the number of units in all."""
        self.total = self.bar.total = total

    def __str__(self) -> str:
        seconds = time.monotonic() - self.begun
        said = f"{duration(seconds)} so far"
        if self.total is None:
            return f"{self.what}: {said}"
        if self.done > 0:
            said += f", about {duration(seconds * max(0.0, self.total - self.done) / self.done)} left"
        counted = f"{self.done:.0f} of {self.total:.0f} {self.unit} " if self.unit else ""
        share = f"{self.done / self.total:.0%}" if self.total else "100%"
        return f"{self.what}: {counted}({share}), {said}" if self.unit else f"{self.what}: {share}, {said}"


class Progress:
    """What a process says while it works. Only the first of a run speaks; there a thread breaks long silences."""

    def __init__(self, speaks: bool = True, interval_s: float = INTERVAL_S) -> None:
        self.speaks, self.interval_s = speaks, interval_s
        self._phases: list[Phase] = []
        self._lock = threading.Lock()
        self._last = time.monotonic()
        """When something was said."""
        self._thread: threading.Thread | None = None

    def say(self, *lines: str) -> None:
        """Print `lines` at once, above a bar if there is one."""
        if self.speaks and lines:
            self._last = time.monotonic()
            tqdm.write(printable("\n".join(lines)))
            sys.stdout.flush()  # a file or pipe would hold back many lines

    @contextmanager
    def phase(self, what: str, total: float | None = None, unit: str = "") -> Iterator[Phase]:
        """Do `what` within: `total` units, if they are known; without a name of the unit, shares of 1 are meant."""
        # None: a bar on a terminal alone
        bar = tqdm(total=total, desc=what, leave=False, disable=None if self.speaks and total is not None else True)
        phase = Phase(what, total, unit, bar)
        with self._lock:
            self._phases.append(phase)
            if self.speaks and self._thread is None:
                self._thread = threading.Thread(target=self._watch, name="progress", daemon=True)
                self._thread.start()
        try:
            yield phase
        finally:
            with self._lock:
                self._phases.remove(phase)
            bar.close()

    def _watch(self) -> None:
        """Say what is going on whenever nothing was said for an interval; end when nothing goes on."""
        idle = 0
        while idle < LOOKS:
            time.sleep(self.interval_s / LOOKS)
            with self._lock:
                idle = 0 if self._phases else idle + 1
                if idle == LOOKS:
                    self._thread = None
                phase = self._phases[-1] if self._phases else None
            is_silent = time.monotonic() - self._last >= self.interval_s
            if phase is not None and phase.bar.disable and is_silent:
                self.say(f"{time_of_day()}  {phase}")


def time_of_day() -> str:
    """Return the time of day."""
    return time.strftime("%H:%M:%S")


def duration(seconds: float) -> str:
    """Return 0:07, 12:31 or 3:02:05 for a number of seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
