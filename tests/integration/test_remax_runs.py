"""A run with ReMax: one response to each prompt beside a greedy one, the same on two processes."""

from __future__ import annotations

import pytest
from programs import World

pytestmark = pytest.mark.slow


def test_the_greedy_reward_is_that_of_the_test_and_two_processes_agree(world: World) -> None:
    rows = f"{world.root}/rl.jsonl"
    settings = (
        "adv.estimator=remax",
        "train_data.prompts_per_rollout=24",  # all rows, as in the test
        "train_data.responses_per_prompt=1",
        f"test_data.path={rows}",
        "rollout.test_sampling_params.temperature=0",
        "trainer.test_freq=1",
        "trainer.max_steps=2",
        "trainer.n_epochs=2",
    )
    alone, two = (world.start("ppo", *settings, nproc=nproc) for nproc in (1, 2))
    found = [row for row in alone.wait().succeeded().metrics if "actor/loss" in row]
    assert len(found) == 2
    for row in found:  # the same weights, prompts and sampling
        assert row["train/greedy_reward"] == pytest.approx(row["test/reward"])
        assert row["train/greedy_tokens"] == row["test/tokens"]
        assert row["actor/grad_norm"] > 0
    names = ("actor/loss", "train/greedy_reward", "actor/grad_norm")
    of_two = [row for row in two.wait().succeeded().metrics if "actor/loss" in row]
    for mine, theirs in zip(found, of_two, strict=True):
        assert [theirs[name] for name in names] == pytest.approx([mine[name] for name in names], rel=1e-4)
