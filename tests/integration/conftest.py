"""A world small enough for whole runs of the programs within seconds."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

import pytest
import warm
from programs import NUM_ROWS, World

from RL2.tools import jobs
from RL2.tools.reproduce.model import build_model
from RL2.tools.reproduce.problems import Demonstrator, draw_problems


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root, rng = tmp_path_factory.mktemp("world"), Random(0)
    pairs = [(p.question, Demonstrator().solve(p, rng)) for p in draw_problems(rng, NUM_ROWS, held_out=False)]
    build_model(root / "model", [text for pair in pairs for text in pair], seed=0)
    _write(root / "sft.jsonl", [{"prompt": question, "response": solution} for question, solution in pairs])
    _write(root / "rl.jsonl", [{"prompt": question, "extra_info": {"row": i}} for i, (question, _) in enumerate(pairs)])
    # separable: what was rejected is written backwards
    _write(
        root / "pairs.jsonl",
        [{"prompt": p, "chosen": text, "rejected": " ".join(text.split()[::-1])} for p, text in pairs],
    )
    return World(root, count())


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


def _write(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
