"""A reward model that `rm` trained, as the environment of `ppo`."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch
from programs import Run, World
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from RL2.config.scripts import ScriptError
from RL2.rollout.environment import Unscored, load_environment

SCRIPT = Path(__file__).resolve().parents[2] / "envs" / "reward_model.py"


@pytest.fixture(scope="module")
def trained(world: World) -> Run:
    return world.run("rm", "trainer.max_steps=20").succeeded()


def test_rewards_are_the_values_of_the_trained_model(
    trained: Run, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = trained.save_dir / "latest"
    monkeypatch.setenv("REWARD_MODEL", str(name))
    run = world.run("ppo", f"rollout.env_path={SCRIPT}", "adv.norm_var=true", "trainer.max_steps=2").succeeded()

    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForSequenceClassification.from_pretrained(name)
    rewards = [sample["reward"] for sample in run.samples]
    assert len(set(rewards)) > 8
    for sample in run.samples:
        text = "".join(sample["texts"]) + tokenizer.eos_token
        with torch.no_grad():
            expected = model(**tokenizer(text, return_tensors="pt", add_special_tokens=False)).logits.item()
        assert sample["reward"] == sample["score"] == pytest.approx(expected, abs=1e-4)


def test_many_at_once_and_solutions_above_their_words_backwards(trained: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REWARD_MODEL", str(trained.save_dir / "latest"))
    environment = load_environment(SCRIPT, 30)
    good = "Ben has 12 apples and buys 30 more. So he has 12+30=42 apples.\n#### 42"
    bad = " ".join(good.split()[::-1])

    async def judge() -> list[float]:
        results = await asyncio.gather(*(environment.step("", answer, {}) for answer in [good, bad] * 20))
        return [result.reward for result in results]

    rewards = asyncio.run(judge())
    environment.close()
    assert set(rewards[::2]) == {rewards[0]}
    assert set(rewards[1::2]) == {rewards[1]}
    assert rewards[0] > rewards[1]


def test_a_text_that_it_cannot_read_has_no_reward(trained: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REWARD_MODEL", str(trained.save_dir / "latest"))
    environment = load_environment(SCRIPT, 30)
    with pytest.raises(Unscored, match="1000001 tokens, but the reward model reads at most 4096"):
        asyncio.run(environment.step("", "7" * 10**6, {}))
    environment.close()


def test_it_says_which_variable_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REWARD_MODEL", raising=False)
    with pytest.raises(ScriptError, match="REWARD_MODEL is not set"):
        load_environment(SCRIPT, 1)
