"""What these tests share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from RL2.parallel.processes import Processes

pytest.register_assert_rewrite("pools")

from pools import in_pool  # noqa: E402 - afterwards, so that its assertions are rewritten


@pytest.fixture(scope="module")
def one(request: pytest.FixtureRequest, folder: Path, processes: Processes) -> Any:
    """The results of the module's `run_cases` on this process."""
    return request.module.run_cases(folder, processes)


@pytest.fixture(scope="module")
def two(request: pytest.FixtureRequest, folder: Path) -> Any:
    """The results of the module's `run_cases` on two processes."""
    return in_pool(request.module.run_cases, folder, 2)[0]
