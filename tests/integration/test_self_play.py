"""Runs with several roles in an episode: self-play, frozen opponents, and running means in checkpoints."""

from __future__ import annotations

import signal
from pathlib import Path
from statistics import fmean

import pytest
from programs import World, wait_for_line, without_times, write_rows

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]

DUEL = """
import asyncio

ROLES = ("first", "second")

async def play(ask, task):
    said = await asyncio.gather(*(ask(role, "Your move?") for role in ROLES))
    first, second = (ord(text[:1] or "b") % 2 for text in said)  # every text is one of two moves, and 1 beats 0
    won = first - second
    return {"rewards": {"first": won, "second": -won}, "metrics": {"ones": first + second}}
"""


def game(world: World, *, name: str = "duel") -> list[str]:
    (world.root / f"{name}.py").write_text(DUEL)
    return [
        "train_data.path=null",
        f"rollout.env_path={world.root}/{name}.py",
        "rollout.max_turns=2",
        "rollout.train_sampling_params.max_new_tokens=1",
        "trainer.token_stats_freq=null",
    ]


def test_self_play_beats_the_policy_before_training(world: World) -> None:
    run = world.run(
        "ppo",
        *game(world),
        "adv.estimator=rae",
        "train_data.prompts_per_rollout=8",
        "train_data.responses_per_prompt=4",
        "actor.lr=1e-2",
        "actor.scheduler=constant",
        "rollout.test_sampling_params.temperature=1",
        "test_data.sets.first.prompts_per_rollout=64",
        "test_data.sets.first.opponents.second=start",
        "test_data.sets.second.prompts_per_rollout=64",
        "test_data.sets.second.opponents.first=start",
        "test_data.sets.itself.prompts_per_rollout=8",
        "trainer.test_freq=8",
        "trainer.max_steps=8",
        "trainer.samples_per_step=2",
    ).succeeded()
    trained, tested = [row for row in run.metrics if "actor/loss" in row], [r for r in run.metrics if "test/score" in r]
    for row in trained:
        assert row["train/reward/first"] == pytest.approx(-row["train/reward/second"])
        assert row["train/unscored"] == 0 and row["train/turns"] == 2
        assert row["actor/logp_gap_max"] < 1e-4
    for seat in ("first", "second"):
        assert all(row[f"test/{seat}/score"] == row[f"test/{seat}/reward/{seat}"] for row in tested), "the policy's"
    before, after = ([row[f"test/{seat}/score"] for seat in ("first", "second")] for row in (tested[0], tested[-1]))
    assert sum(before) == 0, "against itself, with the same random numbers in both seats"
    assert sum(after) / 2 > 0.15, (before, after)
    assert all(row["test/itself/score"] == 0 for row in tested), "what one seat wins the other loses"
    lines = [row for row in run.samples if row["split"] == "train" and row["step"] == 0]
    assert [row["role"] for row in lines] == ["first", "second"] * 2
    assert lines[0]["reward"] == -lines[1]["reward"]
    frozen = [row for row in run.samples if row.get("set") == "first" and row["role"] == "second"]
    assert frozen and all(row["reward"] is None and row["num_tokens"] == 0 and row["texts"] for row in frozen)


def test_a_debate_has_a_judge_of_its_own(world: World, tmp_path: Path) -> None:
    questions = [{"prompt": f"Is {n} odd?", "extra_info": {"answer": "yes" if n % 2 else "no"}} for n in range(8)]
    write_rows(tmp_path / "questions.jsonl", questions)
    asked = [{"role": "user", "content": "The question"}, {"role": "assistant", "content": "yes"}]
    write_rows(tmp_path / "verdicts.jsonl", [{"messages": asked}])
    how = (
        "data.batch_size=1",
        "trainer.max_steps=8",
        "trainer.n_epochs=8",
        "actor.lr=1e-2",
        "actor.scheduler=constant",
    )
    judge = world.run("sft", f"data.path={tmp_path}/verdicts.jsonl", *how).succeeded()
    run = world.run(
        "spo",
        f"train_data.path={tmp_path}/questions.jsonl",
        f"rollout.env_path={ROOT}/envs/debate.py",
        f"rollout.opponents.judge={judge.save_dir}/latest",
        "rollout.max_turns=5",
        "rollout.train_sampling_params.max_new_tokens=4",
        "actor.max_length_per_device=1024",
        "train_data.prompts_per_rollout=2",
        "train_data.responses_per_prompt=2",
        "trainer.max_steps=2",
        "trainer.token_stats_freq=1",
    ).succeeded()
    judged = [row for row in run.samples if row["role"] == "judge" and row["unscored"] is None]
    assert judged, run.samples
    assert all("yes" in row["texts"][-1].lower() and "PRO: " in row["texts"][0] for row in judged)
    for row in run.metrics:
        assert row["train/reward/pro"] == 1 and row["train/reward/con"] == -1
        assert "train/reward/judge" not in row and 0 <= row["train/env/right"] <= 1


@pytest.mark.parametrize("estimator", ["reinforce", "gae"])
def test_two_processes_play_the_same_games_as_one(world: World, estimator: str) -> None:
    settings = [*game(world), f"adv.estimator={estimator}", "rollout.opponents.second=start", "trainer.max_steps=2"]
    one, two = (world.run("ppo", *settings, nproc=number).succeeded() for number in (1, 2))
    for name in ("train/reward", "train/reward/first", "train/env/ones"):
        assert [row[name] for row in one.metrics] == [row[name] for row in two.metrics]
    for a, b in zip(one.metrics, two.metrics, strict=True):
        assert a["actor/grad_norm"] == pytest.approx(b["actor/grad_norm"], rel=1e-3)


def test_an_interrupted_run_has_the_same_means_and_opponents(world: World) -> None:
    settings = [
        *game(world),
        "adv.estimator=rae",
        "rollout.opponents.second=latest",
        "rollout.max_running_requests=1",  # so that no request is computed beside another, in another last bit
        "trainer.save_freq=2",
        "trainer.max_steps=7",
    ]
    whole, stopped = world.start("ppo", *settings), world.start("ppo", *settings)
    wait_for_line(stopped.save_dir / "metrics.jsonl", stopped)
    stopped.process.send_signal(signal.SIGINT)  # it ends with a checkpoint, at a step that 2 may not divide
    stopped.wait()
    again = world.run("ppo", *settings, "trainer.load_ckpt_from=latest", save_dir=stopped.save_dir).succeeded()
    whole.wait().succeeded()
    assert again.weights.read_bytes() == whole.weights.read_bytes()
    assert without_times(again.metrics) == without_times(whole.metrics)
    assert fmean(row["train/length"] for row in whole.metrics) == 1, "the tokens of the opponent are not counted"


def test_what_cannot_play_is_refused(world: World) -> None:
    for overrides, reason in {
        "rollout.opponents.third=start": "has the roles first, second",
        "rollout.opponents.first=start rollout.opponents.second=start": "rollout.opponents has all roles of",
        "rollout.opponents.second=latest": "rollout.opponents.second=latest needs trainer.save_freq",
        "rollout.opponents.second=/nowhere/at/all": "rollout.opponents.second",
    }.items():
        refused = world.run("ppo", *game(world), *overrides.split())
        assert refused.process.returncode != 0
        assert reason in refused.errors, refused.errors
