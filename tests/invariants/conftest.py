"""What these tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from RL2.parallel.processes import Processes

pytest.register_assert_rewrite("pools")


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    """This process alone."""
    processes = Processes.start(timeout_s=60)
    yield processes
    processes.stop()
