"""Time limit for Python code in any thread, for many short pieces in sequence."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from RL2.config.scripts import raise_in
from RL2.data.last_resort import LastResort

LOOKS = 20
"""Number of checks per limit; the limit is exceeded by at most one interval."""


class Watchdog:
    """Thread that interrupts code running longer than `limit_s`; it ends when nothing is watched.

    C code that holds the GIL cannot be interrupted: another process then prints `words` and kills this one.
    """

    def __init__(self, limit_s: float, words: str) -> None:
        self.limit_s = limit_s
        self._words = words
        self._last_resort: LastResort | None = None
        self._lock = threading.Lock()
        self._watched: dict[int, float] = {}
        """Thread id -> time at which its limit expires."""
        self._interrupted: set[int] = set()
        self._number = 0
        """Number of pieces watched so far."""
        self._thread: threading.Thread | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Raise TimeoutError in the code of the `with` block once it takes longer than the limit."""
        thread = threading.get_ident()
        with self._lock:
            self._watched[thread] = time.monotonic() + self.limit_s
            self._number += 1
            if self._last_resort is None:
                self._last_resort = LastResort(self.limit_s, self._words)
            self._last_resort.now(self._number, len(self._watched))
            if self._thread is None:
                self._thread = threading.Thread(target=self._look, name="watchdog", daemon=True)
                self._thread.start()
        try:
            yield
        except TimeoutError as error:
            raise TimeoutError(f"it takes longer than {self.limit_s:g} s") from error
        finally:
            with self._lock:
                del self._watched[thread]
                assert self._last_resort is not None
                self._last_resort.now(self._number, len(self._watched))
                if thread in self._interrupted:
                    self._interrupted.discard(thread)
                    raise_in(thread, None)  # cancel an interrupt that came too late

    def _look(self) -> None:
        seen = -1
        while True:
            time.sleep(self.limit_s / LOOKS)
            with self._lock:
                now = time.monotonic()
                for thread, end in self._watched.items():
                    if end < now and thread not in self._interrupted:
                        self._interrupted.add(thread)
                        raise_in(thread, TimeoutError)
                if not self._watched and seen == self._number:
                    self._thread = None
                    return
                seen = self._number
