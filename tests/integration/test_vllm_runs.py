"""Whole runs whose rollouts come from real vLLM servers (`make test-engine`)."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import psutil
import pytest
from programs import Run, World
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = pytest.mark.vllm
ROOT = Path(__file__).resolve().parents[2]
PYTHON = os.environ.get("VLLM_PYTHON", f"{ROOT}/.venv-vllm/bin/python")
STEPS = 20
SETTINGS = (
    "rollout.engine=vllm",
    f"rollout.vllm.python={PYTHON}",
    "rollout.max_running_requests=16",
    "rollout.train_sampling_params.max_new_tokens=100",
    "trainer.samples_per_step=16",
    f"trainer.max_steps={STEPS}",
)


@pytest.fixture(scope="module")
def undisturbed(world: World) -> Run:
    """One process, one server, tied head."""
    return world.run("spo", *SETTINGS).succeeded()


def check_gaps(run: Run) -> None:
    """At every step engine and trainer are one, although the weights move all the time."""
    assert [row["step"] for row in run.metrics] == list(range(STEPS))
    assert max(row["actor/logp_gap"] for row in run.metrics) < 1e-4
    assert max(row["engine/probe_gap"] for row in run.metrics) < 1e-4
    assert min(row["actor/changed_share"] for row in run.metrics if row["actor/tokens"]) > 0.9


def test_engine_and_trainer_stay_together(undisturbed: Run) -> None:
    check_gaps(undisturbed)
    assert {row["engine/restarts"] for row in undisturbed.metrics} == {0}


def test_with_a_head_of_its_own(world: World, tmp_path: Path) -> None:
    lm = AutoModelForCausalLM.from_pretrained(world.model)
    lm.config.tie_word_embeddings = False
    untied = type(lm)(lm.config)
    untied.load_state_dict(lm.state_dict())
    untied.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(world.model).save_pretrained(tmp_path)
    check_gaps(world.run("spo", *SETTINGS, f"actor.model_name={tmp_path}").succeeded())


def test_two_servers_and_two_processes(world: World, undisturbed: Run) -> None:
    run = world.run("spo", *SETTINGS, "rollout.vllm.num_servers=2", nproc=2).succeeded()
    check_gaps(run)
    assert {row["engine/imbalance"] for row in run.metrics if row["engine/imbalance"] < 2}  # both have work
    # seeds, not servers, decide what is sampled
    assert [row for row in run.samples if row["step"] == 0] == [row for row in undisturbed.samples if row["step"] == 0]


def test_a_server_killed_in_mid_rollout_costs_time_and_nothing_else(world: World, undisturbed: Run) -> None:
    run = world.start("spo", *SETTINGS)
    wait_for_step(run, 6)
    time.sleep(3 * run.metrics[-1]["engine/sync_s"])  # the next sync is over, the rollout after it is not
    (server,) = psutil.Process(run.process.pid).children()
    os.killpg(server.pid, signal.SIGKILL)
    run.wait().succeeded()
    check_gaps(run)
    assert run.metrics[-1]["engine/restarts"] == 1
    assert sum(row["engine/retried"] for row in run.metrics) > 0
    assert run.samples == undisturbed.samples


def test_a_sync_that_leaves_the_tied_head_as_it_was_ends_the_run_there(world: World) -> None:
    run = world.run("spo", *SETTINGS, "rollout.vllm.env.RL2_FAULT_STALE_HEAD_AFTER=3")
    assert run.process.returncode == 1
    assert "weights of version 3: the vLLM server at http://127.0.0.1" in run.errors
    assert "computes with others than the trainer" in run.errors
    assert [row["step"] for row in run.metrics] == [0, 1, 2]


def wait_for_step(run: Run, step: int) -> None:
    """Until its metrics are written."""
    file = run.save_dir / "metrics.jsonl"
    while run.process.poll() is None:
        if file.exists() and any(json.loads(row)["step"] == step for row in file.read_text().split("\n")[:-1]):
            return
        time.sleep(0.01)
    raise AssertionError(f"it ended before step {step}:\n{run.errors}")
