"""A world small enough for whole runs of the programs within seconds."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import warm
from programs import World, make_world

from RL2.tools import jobs


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def warm_jobs() -> Iterator[None]:
    """Have jobs on one process forked from a server with their imports done; tests/unit/tools has them started."""

    def start(job: jobs.Job) -> warm.Program:
        assert job.nproc == 1
        environment = os.environ | job.environment
        return warm.Program(f"RL2.trainer.{job.program}", list(job.overrides), job.log, job.log, env=environment)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs, "start", start)
        yield
