"""Progress output: lines, a bar on a terminal, and a status line after each minute of silence."""

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
"""Longest silence while a run works, in seconds."""
LOOKS = 10
"""Number of checks per interval."""


class Phase:
    """One part of the work; it may know its total, and then shows an estimate of the time left."""

    def __init__(self, what: str, total: float | None, unit: str, bar: tqdm[Any]) -> None:
        self.what, self.total, self.unit, self.bar = what, total, unit, bar
        self.done = 0.0
        self.begun = time.monotonic()

    def update(self, more: float) -> None:
        """Add `more` units to those done."""
        self.done += more
        self.bar.update(more)

    def to(self, done: float) -> None:
        """Set the number of units done."""
        self.update(done - self.done)

    def resize(self, total: float) -> None:
        """Set the total number of units."""
        self.total = self.bar.total = total

    def __str__(self) -> str:
        seconds = time.monotonic() - self.begun
        elapsed = f"{duration(seconds)} so far"
        if self.total is None:
            return f"{self.what}: {elapsed}"
        if self.done > 0:
            elapsed += f", about {duration(seconds * max(0.0, self.total - self.done) / self.done)} left"
        counted = f"{self.done:.0f} of {self.total:.0f} {self.unit} " if self.unit else ""
        share = f"{self.done / self.total:.0%}" if self.total else "100%"
        return f"{self.what}: {counted}({share}), {elapsed}" if self.unit else f"{self.what}: {share}, {elapsed}"


class Progress:
    """Output of a process while it works. Only the first process of a run prints; a thread there ends long silences."""

    def __init__(self, speaks: bool = True, interval_s: float = INTERVAL_S) -> None:
        self.speaks, self.interval_s = speaks, interval_s
        self._phases: list[Phase] = []
        self._lock = threading.Lock()
        self._last = time.monotonic()
        """Time of the last output, by `time.monotonic`."""
        self._thread: threading.Thread | None = None

    def say(self, *lines: str) -> None:
        """Print `lines` at once, above the progress bar if there is one."""
        if self.speaks and lines:
            self._last = time.monotonic()
            tqdm.write(printable("\n".join(lines)))
            sys.stdout.flush()  # a file or pipe would hold back many lines

    @contextmanager
    def phase(self, what: str, total: float | None = None, unit: str = "") -> Iterator[Phase]:
        """Report the body of the `with` block as a phase called `what`.

        `total` is the number of units, if known. An empty `unit` means that progress is counted in shares of 1.
        """
        # None: show a bar only on a terminal
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
        """Print the current phase after each silent interval; return once no phase is open."""
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
    """Return the time of day as HH:MM:SS."""
    return time.strftime("%H:%M:%S")


def duration(seconds: float) -> str:
    """Format a number of seconds as 0:07, 12:31 or 3:02:05."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
