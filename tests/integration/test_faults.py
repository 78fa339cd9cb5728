"""Processes that die or stop, and disks that are full: no run hangs, no checkpoint is damaged, nothing is lost.

RL2_KILLS sets how often the restarted run is killed (here 3 times; 20 takes some minutes).
"""

from __future__ import annotations

import os
import random
import re
import resource
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import warm
from programs import LIMIT_S, Run, World, ranks_of, wait_for_line, without_times

from RL2.engines.served.server import free_port

KILLS = int(os.environ.get("RL2_KILLS", 3))
TIMEOUT_S = 6
SETTINGS = (
    f"trainer.timeout_s={TIMEOUT_S}",
    "trainer.save_freq=1",
    "trainer.test_freq=2",
    f"trainer.max_steps={max(6, 9 * (KILLS - 3))}",
    "actor.update_per_rollout=2",
)


@pytest.fixture(scope="module")
def settings(world: World) -> tuple[str, ...]:
    return (*SETTINGS, f"test_data.path={world.root}/rl.jsonl")


@pytest.fixture(scope="module")
def uninterrupted(world: World, settings: tuple[str, ...]) -> Run:
    return world.run("spo", *settings, nproc=2).succeeded()


def test_ranks_killed_at_random_moments_are_restarted_and_nothing_changes(
    world: World, settings: tuple[str, ...], uninterrupted: Run
) -> None:
    """torchrun starts all again; the run ends with the uninterrupted one's weights and metrics, bit for bit."""
    draw, killed_at = random.Random(), []
    # one restart more: under heavy load, gloo's own thread was once seen to crash
    run = world.start("spo", *settings, nproc=2, max_restarts=KILLS + 1)
    for _ in range(KILLS):
        began, old = time.monotonic(), {worker.pid for worker in ranks_of(run.process.pid)}
        wait_for_line(run.save_dir / "metrics.jsonl", run)
        while run.process.poll() is None and not is_at_work(run, began):
            time.sleep(0.05)
        time.sleep(draw.uniform(0, 4))  # anywhere in a rollout, an update, a save or a test
        if not (ranks := ranks_of(run.process.pid)):
            break  # it has ended
        victim = draw.choice(ranks)
        victim.kill()
        killed_at.append(f"{time.monotonic() - began:.1f} s")
        limit = time.monotonic() + TIMEOUT_S + 60  # torchrun gives the others 30 s before it kills them
        while run.process.poll() is None and not {w.pid for w in ranks_of(run.process.pid)}.isdisjoint(
            old | {rank.pid for rank in ranks}
        ):
            assert time.monotonic() < limit, "the other rank has not stopped"
            time.sleep(0.05)
    run.wait().succeeded()
    print(f"killed {', '.join(killed_at)} after each start")
    assert killed_at
    assert run.weights.read_bytes() == uninterrupted.weights.read_bytes()
    assert without_times(run.metrics) == without_times(uninterrupted.metrics)
    assert run.samples == uninterrupted.samples


def test_a_run_that_was_refused_is_not_gone_on_with(
    world: World, settings: tuple[str, ...], uninterrupted: Run
) -> None:
    """torchrun starts it again, as if it had failed; what lies in its folder is of another."""
    before = uninterrupted.weights.read_bytes()
    more = f"trainer.max_steps={2 * len(uninterrupted.metrics)}"
    run = world.run("spo", *settings, more, nproc=2, max_restarts=1, save_dir=uninterrupted.save_dir)
    assert run.process.returncode == 1
    assert run.errors.count("already contains a run") >= 2
    assert uninterrupted.weights.read_bytes() == before


def is_at_work(run: Run, since: float) -> bool:
    """Its present processes have written something, or are old enough to be loading."""
    ages = [time.time() - worker.create_time() for worker in ranks_of(run.process.pid)]
    return bool(ages) and min(ages) > 6


@pytest.fixture
def pair(world: World, settings: tuple[str, ...], tmp_path: Path) -> Iterator[list[warm.Program]]:
    """Two ranks that nobody watches over: no launcher ends one when the other has gone."""
    arguments = [*world.rl, *settings, f"trainer.save_dir={tmp_path}/run", "trainer.max_steps=1000"]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = []
    for rank in ("0", "1"):
        log, environment = tmp_path / f"rank_{rank}.log", os.environ | common | {"RANK": rank, "LOCAL_RANK": rank}
        ranks.append(warm.Program("RL2.trainer.spo", arguments, Path(os.devnull), log, env=environment))
    yield ranks
    for rank in ranks:
        rank.kill()
        rank.wait()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["dead", "stuck"])
@pytest.mark.parametrize("victim", [0, 1])
def test_the_rank_that_is_left_says_what_it_waited_for(
    how: signal.Signals, victim: int, pair: list[warm.Program], tmp_path: Path
) -> None:
    metrics, limit = tmp_path / "run" / "metrics.jsonl", time.monotonic() + LIMIT_S
    while not (metrics.exists() and metrics.read_text().count("\n") > 1):
        assert time.monotonic() < limit and all(rank.poll() is None for rank in pair)
        time.sleep(0.05)
    pair[victim].send_signal(how)
    began = time.monotonic()
    left = 1 - victim
    assert pair[left].wait(timeout=TIMEOUT_S + 20) == 1
    said = (tmp_path / f"rank_{left}.log").read_text().splitlines()[-1]
    print(f"{time.monotonic() - began:.1f} s: {said}")
    assert re.fullmatch(
        rf"spo \(rank {left}\): failed while waiting for .+: another of the 2 processes died or did not "
        rf"arrive within trainer.timeout_s={TIMEOUT_S}",
        said,
    )


def test_a_full_disk_leaves_the_checkpoint_before(world: World, settings: tuple[str, ...]) -> None:
    whole = world.run("spo", *settings, "trainer.max_steps=2").succeeded()
    parts = whole.save_dir.glob("step_000001/**/*")
    largest = max(part.stat().st_size for part in parts)
    again = ("trainer.load_ckpt_from=latest", "trainer.max_steps=4")

    def no_file_larger() -> None:  # what is written beyond fails, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest // 2, largest // 2))

    run = world.run("spo", *settings, *again, save_dir=whole.save_dir, preexec=no_file_larger)
    assert run.process.returncode == 1
    assert re.fullmatch(
        rf"spo: the checkpoint of step 3 could not be written into {whole.save_dir} \(.+\); "
        "resume from the previous one with trainer.load_ckpt_from=latest",
        run.errors.splitlines()[-1],
    )
    assert sorted(path.name for path in whole.save_dir.glob("step_*") if not path.suffix) == [
        "step_000001",
        "step_000002",
    ]
    straight = world.run("spo", *settings, "trainer.max_steps=4").succeeded()
    rescued = world.run("spo", *settings, *again, save_dir=whole.save_dir).succeeded()
    assert rescued.weights.read_bytes() == straight.weights.read_bytes()
