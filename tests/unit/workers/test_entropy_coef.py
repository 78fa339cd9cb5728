"""The adaptive coefficient of the entropy: the rule, its state, and the loss that it enters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rl_settings import rl_config
from transformers import Qwen3Config, Qwen3ForCausalLM

from RL2.batch.packing import loss_weights, pack
from RL2.config.model import Entropy
from RL2.errors import ConfigError
from RL2.parallel.processes import Processes
from RL2.types import Sequence, TokenBatch, Trajectory
from RL2.workers.actor import Actor
from RL2.workers.entropy_coef import EntropyCoef


def test_the_rule_is_that_of_the_paper() -> None:
    """alpha_k = c_k [e_k <= target], c_(k+1) = c_k + step if e_k < target, and c_k - step if e_k > target."""
    entropies = [0.3, 0.5, 0.1, 0.19, 0.2, 0.21, 0.05, 0.9, 0.9, 0.9, 0.9]
    adaptive, c = EntropyCoef(Entropy(target=0.2, step=0.25)), 0.0
    used, expected = [], []
    for entropy in entropies:
        adaptive.follow(entropy)
        c = max(0.0, c + (0.25 if entropy < 0.2 else -0.25 if entropy > 0.2 else 0.0))
        expected.append(c * (entropy <= 0.2))
        used.append(adaptive.used)
    assert used == expected
    assert max(used) == 0.5
    assert used[-1] == 0


def test_without_a_target_it_stays() -> None:
    fixed = EntropyCoef(Entropy(coef=-0.1))
    fixed.follow(0.0)
    assert fixed.used == -0.1
    assert fixed.state_dict() == {}


def test_the_state_is_kept() -> None:
    adaptive, again = EntropyCoef(Entropy(coef=0.01, target=1.0)), EntropyCoef(Entropy(coef=0.01, target=1.0))
    for entropy in (0.5, 0.5, 1.5):
        adaptive.follow(entropy)
    again.load_state_dict(json.loads(json.dumps(adaptive.state_dict())))
    for entropy in (0.9, 1.1, 0.2):
        assert again.used == adaptive.used
        adaptive.follow(entropy)
        again.follow(entropy)
    again.load_state_dict({})  # of a run without a target
    assert again.used == adaptive.used
    for damaged in (None, [1.0], ["0.1", True], [-1.0, True], [float("nan"), True], [0.1, 1]):
        with pytest.raises(ValueError, match="entropy coefficient"):
            again.load_state_dict({"entropy_coef": damaged})


def make_batch() -> TokenBatch:
    mask, values = [False, *[True] * 5], [0.0] * 6
    batch = pack([Trajectory(n, n, 0, [Sequence([n, 7, 3, 40, 5, 6], mask, values, values)]) for n in range(3)])
    return batch.with_(advantage_T=batch.action_T.float(), weight_T=loss_weights(batch))


def test_each_optimizer_step_has_the_coefficient_that_follows_from_the_last(
    tmp_path: Path, processes: Processes
) -> None:
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}
    Qwen3ForCausalLM(Qwen3Config(vocab_size=51, hidden_size=16, intermediate_size=24, **sizes)).save_pretrained(
        tmp_path
    )

    def steps(*settings: str) -> list[dict[str, float]]:
        config = rl_config(f"actor.model_name={tmp_path}", "actor.lr=1e-9", "actor.tis_coef=0", *settings).actor
        actor = Actor(config, processes, 10, tmp_path)
        return [actor.update(make_batch()) for _ in range(3)]

    plain: list[dict[str, Any]] = steps()
    entropy = plain[0]["actor/entropy"]
    assert "actor/entropy_coef" not in plain[0]
    low = steps(f"actor.entropy.target={entropy + 0.1}", "actor.entropy.step=0.5", "actor.entropy.coef=0.25")
    assert [row["actor/entropy_coef"] for row in low] == [0.25, 0.75, 1.25]
    for row in low:
        expected = plain[0]["actor/loss"] - row["actor/entropy_coef"] * entropy
        assert row["actor/loss"] == pytest.approx(expected, rel=1e-5)
    high = steps(f"actor.entropy.target={entropy - 0.1}", "actor.entropy.step=0.5", "actor.entropy.coef=0.75")
    assert [row["actor/entropy_coef"] for row in high] == [0.75, 0, 0]


def test_settings_without_an_effect_are_refused() -> None:
    for settings, why in (
        (["actor.entropy.step=0.1"], "has no effect without actor.entropy.target"),
        (["actor.entropy.target=1", "actor.entropy.coef=-0.1"], "must be at least 0 with actor.entropy.target"),
        (["actor.entropy.target=1", "trainer.replay_freq=2"], "does not hold the coefficient"),
    ):
        with pytest.raises(ConfigError, match=why):
            rl_config(*settings)
    rl_config("actor.entropy.target=1", "actor.regularize_on=all", "actor.train_on=correct")
