"""Whole runs whose rollouts come from real vLLM servers (`make test-engine`)."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from programs import Run, World, answered, taught_to_answer
from tiny_models import tiny_config
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

pytestmark = pytest.mark.vllm
ROOT = Path(__file__).resolve().parents[2]
PYTHON = os.environ.get("VLLM_PYTHON", f"{ROOT}/.venv-vllm/bin/python")
STEPS = 20
SETTINGS = (
    "rollout.engine=vllm",
    f"rollout.vllm.python={PYTHON}",
    "rollout.max_running_requests=16",
    "rollout.train_sampling_params.max_new_tokens=60",
    "trainer.samples_per_step=16",
    f"trainer.max_steps={STEPS}",
)
BROADCAST = ("rollout.vllm.transport=broadcast", "rollout.vllm.max_restarts=0")
"""And no files beside it."""


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


AGENT = """
import json, os, urllib.request

def play(task):
    messages = list(task["messages"])
    for turn in range(2):
        body = json.dumps({"model": "any", "messages": messages, "max_tokens": 20}).encode()
        key = {"Authorization": f"Bearer {os.environ['OPENAI_API_KEY']}"}
        request = urllib.request.Request(os.environ["OPENAI_BASE_URL"] + "/chat/completions", body, key)
        answer = json.load(urllib.request.urlopen(request))["choices"][0]["message"]
        messages += [answer, {"role": "user", "content": "Sure?"}]
    return float(any(character.isdigit() for character in answer["content"]))
"""


def test_an_agent(world: World, tmp_path: Path) -> None:
    (tmp_path / "agent.py").write_text(AGENT)
    agent = ("rollout.env_path=null", f"rollout.agent={tmp_path}/agent.py:play", "rollout.max_turns=2")
    run = world.run("spo", *SETTINGS, *agent).succeeded()
    check_gaps(run)
    assert all(row["train/unscored"] == 0 and row["train/turns"] == 2 for row in run.metrics)


def test_with_a_head_of_its_own(world: World, tmp_path: Path) -> None:
    lm = AutoModelForCausalLM.from_pretrained(world.model)
    lm.config.tie_word_embeddings = False
    untied = type(lm)(lm.config)
    untied.load_state_dict(lm.state_dict())
    untied.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(world.model).save_pretrained(tmp_path)
    check_gaps(world.run("spo", *SETTINGS, f"actor.model_name={tmp_path}").succeeded())


def write_family(model_type: str, world: World, folder: Path) -> None:
    """Write a tiny random model with the tokenizer of `world`."""
    tokenizer = AutoTokenizer.from_pretrained(world.model)
    settings = {
        "vocab_size": AutoConfig.from_pretrained(world.model).vocab_size,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "hidden_size": 128,
        "head_dim": 32,  # vLLM has no smaller heads on CPUs
    }
    AutoModelForCausalLM.from_config(tiny_config(model_type, settings)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# windows that are shorter than the responses; experts; a hybrid with Mamba
@pytest.mark.parametrize("model_type", ["gemma3_text", "qwen3_moe", "granitemoehybrid"])
def test_other_families(model_type: str, world: World, tmp_path: Path) -> None:
    write_family(model_type, world, tmp_path)
    check_gaps(world.run("spo", *SETTINGS, f"actor.model_name={tmp_path}").succeeded())


def test_adapters_alone_are_as_good_as_merged_weights(world: World) -> None:
    """The server merges them with the base, which it gets once."""
    lora = ("actor.lora.rank=4", "actor.lr=1e-2", "trainer.max_steps=4")
    merged = world.run("spo", *SETTINGS, *lora).succeeded()
    adapters = world.run("spo", *SETTINGS, *lora, "rollout.vllm.lora=adapter").succeeded()
    assert adapters.samples == merged.samples
    assert adapters.weights.read_bytes() == merged.weights.read_bytes()
    assert max(row["engine/probe_gap"] for row in adapters.metrics) < 1e-4
    assert any(row["actor/grad_norm"] > 0 for row in adapters.metrics)


def test_a_base_model_ends_its_turns_there_too(world: World, tmp_path: Path) -> None:
    """After six steps of `sft` on a template that ends turns with another token than the model's eos."""
    learnt = taught_to_answer(world, tmp_path).succeeded()
    there, here = (answered(world, learnt, tmp_path, *settings) for settings in (SETTINGS[:3], ()))
    assert [sample["truncated"] for sample in there] == [False]
    assert [sample["texts"] for sample in there] == [sample["texts"] for sample in here]


def test_a_compiled_server_gets_new_weights_too(world: World) -> None:
    check_gaps(world.run("spo", *SETTINGS, "rollout.compile=true").succeeded())


def test_weights_by_broadcast_change_nothing(world: World, undisturbed: Run) -> None:
    """As when they come in files, to the last bit of what was trained."""
    run = world.run("spo", *SETTINGS, *BROADCAST).succeeded()
    check_gaps(run)
    assert run.samples == undisturbed.samples
    assert run.weights.read_bytes() == undisturbed.weights.read_bytes()
    assert "takes weights from files" not in run.errors


@pytest.mark.parametrize("transport", ["files", "broadcast"])
def test_two_servers_and_two_processes(world: World, undisturbed: Run, transport: str) -> None:
    two = ("rollout.vllm.num_servers=2", f"rollout.vllm.transport={transport}")
    run = world.run("spo", *SETTINGS, *two, nproc=2).succeeded()
    check_gaps(run)
    assert {row["engine/imbalance"] for row in run.metrics if row["engine/imbalance"] < 2}  # both have work
    assert "takes weights from files" not in run.errors
    # seeds, not servers, decide what is sampled
    assert [row for row in run.samples if row["step"] == 0] == [row for row in undisturbed.samples if row["step"] == 0]


TWO_TURNS = """
import asyncio
from pathlib import Path

async def step(state, action, extra_info):
    with Path({file!r}).open("a") as calls:
        calls.write("x")
    await asyncio.sleep(len(action) % 7 / 10)  # so that some second turns are under way while others are to come
    next_state, done = state + action + "\\nOnce more:", "Once more:" in state
    reward = float(any(character.isdigit() for character in action))
    return dict(next_state=next_state, reward=reward, score=reward, done=done, extra_info=extra_info)
"""


def test_a_server_killed_in_mid_rollout_costs_time_and_nothing_else(world: World, tmp_path: Path) -> None:
    calls, script = tmp_path / "calls", tmp_path / "two_turns.py"
    script.write_text(TWO_TURNS.format(file=str(calls)))
    settings = (*SETTINGS, f"rollout.env_path={script}", "rollout.max_turns=2", "trainer.max_steps=4")
    undisturbed = world.run("spo", *settings).succeeded()
    calls.unlink()
    run = world.start("spo", *settings)
    wait_until(run, lambda: calls.exists() and calls.stat().st_size >= 2 * 32 + 12)  # 32 a step, 16 of them first turns
    os.killpg(server_of(run).pid, signal.SIGKILL)
    run.wait().succeeded()
    assert [row["engine/restarts"] for row in run.metrics] == [0, 0, 1, 1]
    assert [row["engine/retried"] > 0 for row in run.metrics] == [False, False, True, False]
    assert max(row["engine/probe_gap"] for row in run.metrics) < 1e-4
    assert len(run.samples) == 64 and run.samples == undisturbed.samples
    assert run.weights.read_bytes() == undisturbed.weights.read_bytes()


@pytest.mark.parametrize("transport", [(), BROADCAST], ids=["files", "broadcast"])
def test_a_sync_that_leaves_the_tied_head_as_it_was_ends_the_run_there(
    world: World, transport: tuple[str, ...]
) -> None:
    run = world.run("spo", *SETTINGS, *transport, "rollout.vllm.env.RL2_FAULT_STALE_HEAD_AFTER=3")
    assert run.process.returncode == 1
    assert "weights of version 3: the vLLM server at http://127.0.0.1" in run.errors
    assert "computes with others than the trainer" in run.errors
    assert [row["step"] for row in run.metrics] == [0, 1, 2]


@pytest.mark.parametrize(
    ("settings", "nproc"),
    [(("rollout.max_staleness=1",), 1), (("rollout.max_staleness=2", "rollout.partial_rollout=0.5"), 2)],
)
def test_rollouts_ahead_and_in_parts(world: World, settings: tuple[str, ...], nproc: int) -> None:
    run = world.run("spo", *SETTINGS, *settings, "trainer.max_steps=8", nproc=nproc).succeeded()
    assert [row["step"] for row in run.metrics] == list(range(8))
    assert any(row["staleness/0"] < 1 for row in run.metrics)
    # tokens of the present weights, as far as there are any
    gaps = [row["actor/logp_gap"] for row in run.metrics if "actor/logp_gap" in row]
    assert gaps and max(gaps) < 1e-4


def test_a_run_that_is_killed_takes_its_servers_along(world: World) -> None:
    run = world.start("spo", *SETTINGS, "trainer.max_steps=1000")
    wait_until(run, (run.save_dir / "metrics.jsonl").exists)
    server = server_of(run)
    processes = [server, *server.children(recursive=True)]
    assert len(processes) == 2  # the API server and its engine
    run.kill()
    assert psutil.wait_procs(processes, timeout=20)[1] == []


def server_of(run: Run) -> psutil.Process:
    """Return the vLLM server that `run` launched; it has other children too."""
    (server,) = (child for child in psutil.Process(run.process.pid).children() if child.cmdline()[0] == PYTHON)
    return server


def wait_until(run: Run, condition: Callable[[], bool]) -> None:
    while run.process.poll() is None:
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError(f"it ended before:\n{run.errors}")
