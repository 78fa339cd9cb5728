"""The programs from start to end, on one process and on two."""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from programs import NUM_ROWS, Run, World, without_times
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from transformers import AutoModelForCausalLM, AutoTokenizer

from RL2.config.load import load, show
from RL2.data.cursor import Cursor

Runs = dict[str, Future[Run]]

REINFORCEMENT = {
    "ppo": ("adv.norm_var=true", "actor.kl.coef=0.01", "rollout.max_turns=2"),
    "spo": ("actor.average_over=kept",),
    # an untrained model gives no token a probability above a half
    "spo_0p5": ("actor.path.region=all", "actor.entropy.coef=0.01"),
}


@pytest.fixture(scope="module")
def runs(world: World) -> Iterator[Runs]:
    """All of them, two at a time; each test waits for its own."""
    tests = f"test_data.path={world.root}/rl.jsonl", "trainer.test_freq=2"
    batches = Cursor(NUM_ROWS, 8, seed=0)
    first, second, third = (batches.next() for _ in range(3))
    # no sequence is correct in the first step, and a single one in each of the others
    lonely = (
        world.reward(f"extra_info['row'] in {(second[0], third[0])}"),
        "train_data.prompts_per_rollout=8",
        "train_data.responses_per_prompt=1",
        "actor.weight_decay=0",
        "trainer.save_freq=1",
    )
    assert len({*first, *second, *third}) == NUM_ROWS

    with ThreadPoolExecutor(2) as pool:
        sft = pool.submit(world.run, "sft")
        yield {
            "sft": sft,
            "sft on two": pool.submit(world.run, "sft", nproc=2),
            **{p: pool.submit(world.run, p, *overrides, *tests) for p, overrides in REINFORCEMENT.items()},
            "lonely": pool.submit(world.run, "spo", *lonely, nproc=2),
            "again": pool.submit(lambda: world.run("sft", save_dir=sft.result().save_dir)),
        }
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("program", ["sft", *REINFORCEMENT])
def test_a_run_leaves_metrics_configuration_and_a_model_that_loads(program: str, runs: Runs, world: World) -> None:
    run = runs[program].result().succeeded()
    steps = [row for row in run.metrics if "actor/loss" in row]
    assert [row["step"] for row in steps] == [0, 1, 2]
    assert all(math.isfinite(row["actor/loss"]) and row["actor/loss"] != 0 for row in steps)
    assert all(math.isfinite(row["actor/grad_norm"]) and row["actor/grad_norm"] > 0 for row in steps)
    assert (run.save_dir / "config.yaml").read_text() == show(load(program, run.settings))

    lm = AutoModelForCausalLM.from_pretrained(run.save_dir / "latest")
    tokenizer = AutoTokenizer.from_pretrained(run.save_dir / "latest")
    ids = tokenizer("Ben has 12 apples.", return_tensors="pt").input_ids
    assert torch.isfinite(lm(ids).logits).all()
    assert tokenizer.decode(ids[0]) == "Ben has 12 apples."
    before, after = load_file(world.weights), load_file(run.weights)
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("program", REINFORCEMENT)
def test_the_engine_has_the_weights_of_the_trainer_at_every_step(program: str, runs: Runs) -> None:
    metrics = runs[program].result().succeeded().metrics
    assert all(row["actor/logp_gap_max"] <= 1e-4 for row in metrics if "actor/loss" in row)


@pytest.mark.parametrize("program", REINFORCEMENT)
def test_samples_and_tests_are_there_to_read(program: str, runs: Runs) -> None:
    run = runs[program].result().succeeded()
    assert [row["step"] for row in run.metrics if "test/score" in row] == [0, 2, 3]
    shown = {(row["step"], row["split"]) for row in run.samples}
    assert shown == {(0, "train"), (1, "train"), (2, "train"), (0, "test"), (2, "test"), (3, "test")}
    assert {row["reward"] for row in run.samples} == {0.0, 1.0}
    assert all(row["unscored"] is None and len(row["texts"]) in (2, 4) for row in run.samples)


def test_two_processes_train_as_one_does(runs: Runs) -> None:
    one, two = runs["sft"].result().succeeded(), runs["sft on two"].result().succeeded()
    for row, other in zip(without_times(one.metrics), without_times(two.metrics), strict=True):
        assert other == pytest.approx(row, rel=1e-5)
    weights, others = load_file(one.weights), load_file(two.weights)
    for name in weights:
        torch.testing.assert_close(others[name], weights[name], rtol=0, atol=1e-6)


def test_two_processes_with_fewer_correct_sequences_than_processes(runs: Runs, world: World, tmp_path: Path) -> None:
    run = runs["lonely"].result().succeeded()
    assert [row["train/score"] for row in run.metrics] == [0, 1 / 8, 1 / 8]
    assert [row["actor/loss"] == 0 for row in run.metrics] == [True, False, False]
    assert [row["actor/grad_norm"] == 0 for row in run.metrics] == [True, False, False]
    assert all(row["actor/logp_gap_max"] <= 1e-4 for row in run.metrics[1:])

    # a step without a correct sequence leaves the weights as they were, bit for bit
    before = load_file(world.weights)
    dcp_to_torch_save(run.save_dir / "step_000001" / "state", tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt")["model"]
    assert all(torch.equal(saved[f"lm.{name}"], weight) for name, weight in before.items())

    lm = AutoModelForCausalLM.from_pretrained(run.save_dir / "latest")
    assert any(not torch.equal(lm.state_dict()[name], weight) for name, weight in before.items())


def test_a_folder_that_holds_a_run_is_not_written_over(runs: Runs) -> None:
    first, second = runs["sft"].result().succeeded(), runs["again"].result()
    assert second.process.returncode == 1
    assert second.errors.splitlines()[-1] == (
        f"sft: trainer.save_dir={first.save_dir} already contains a run; "
        "resume it (trainer.load_ckpt_from=latest) or choose another trainer.save_dir"
    )
    assert len(first.metrics) == 3


def test_a_compiled_engine_samples_the_same(world: World) -> None:
    """On the actor's own weights, which move under the compiled program from step to step."""
    settings = ("trainer.max_steps=4", "trainer.samples_per_step=16")
    plain, compiled = (world.run("spo", *settings, *more).succeeded() for more in ((), ("rollout.compile=true",)))
    assert "cannot be compiled" not in compiled.errors
    assert max(row["actor/logp_gap"] for row in compiled.metrics) < 1e-4
    first, same = ([each["texts"] for each in run.samples if each["step"] == 0] for run in (compiled, plain))
    assert first == same
