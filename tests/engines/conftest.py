"""What the tests of engines share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from RL2.parallel.processes import Processes


@pytest.fixture(scope="module")  # one process may have one group only, and other tests want theirs
def processes() -> Iterator[Processes]:
    processes = Processes.start(timeout_s=60)
    yield processes
    processes.stop()
