"""What surrounds objectives: importance weights, length, selection, averages, invariants, and update statistics."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from RL2.batch.packing import kept, loss_weights, pack
from RL2.config.load import load
from RL2.config.programs import RLConfig
from RL2.errors import ConfigError
from RL2.objectives.loss import importance_weight, overlong_penalty
from RL2.ops.invariants import breaches, first_breach
from RL2.parallel.processes import Processes
from RL2.trainer.unused_settings import refuse_advantage_objectives, refuse_unused_settings, synthetic_batch
from RL2.types import Sequence, TokenBatch, TokenStats, Trajectory
from RL2.workers.optim import UpdateStats


def batch_of(*actions: int, rewards: tuple[float, ...] = ()) -> TokenBatch:
    """A sequence for each number of actions, after a prompt of two tokens; only the actions, as an objective sees."""
    trajectories = []
    for n, length in enumerate(actions):
        reward = rewards[n] if rewards else 1.0
        mask = [False, False] + [True] * length
        values = [0.0] * (length + 1) + [reward]
        trajectories.append(
            Trajectory(n, n, 0, [Sequence(list(range(length + 2)), mask, [0.0] * (length + 2), values)])
        )
    batch = pack(trajectories)
    return batch.positions(batch.action_T)


# importance weights


@pytest.mark.parametrize(
    ("level", "mode", "expected"),
    [
        ("token", "truncate", [1.5, 2.0, 0.5, 2.0]),
        ("token", "mask", [1.5, 2.0, 0.5, 0.0]),
        ("sequence", "truncate", [2.0, 2.0, 1.5, 1.5]),
        ("sequence", "mask", [0.0, 0.0, 1.5, 1.5]),
    ],
)
def test_importance_weights(level: Any, mode: Any, expected: list[float]) -> None:
    """Ratios 1.5 and 2 in the first sequence, whose product is 3; 0.5 and 3 in the second; cap 2."""
    batch = batch_of(2, 2).with_(engine_logp_T=torch.full((4,), -1.0, dtype=torch.float64))
    ratio_T = torch.tensor([1.5, 2.0, 0.5, 3.0], dtype=torch.float64)
    logp_T = (ratio_T.log() - 1).requires_grad_()
    cap = 2.0 + 1e-12  # 2 itself is not above the cap
    weight_T = importance_weight(logp_T, batch, cap=cap, level=level, mode=mode)
    torch.testing.assert_close(weight_T, torch.tensor(expected, dtype=torch.float64))
    assert not weight_T.requires_grad


# length


def test_overlong_penalty_is_the_formula_of_dapo() -> None:
    lengths = (1, 6, 7, 8, 10)
    batch = batch_of(*lengths)
    cost_T = overlong_penalty(batch, max_new_tokens=10, buffer=4, penalty=1.0)
    starts = batch.cu_seqlens.tolist()
    for b, length in enumerate(lengths):
        paid = min(1.0, max(0.0, (length - (10 - 4)) / 4))
        assert cost_T[starts[b] : starts[b + 1]].tolist() == [0.0] * (length - 1) + [paid]


def test_overlong_penalty_stands_at_the_last_action_before_an_observation() -> None:
    sequence = Sequence([0] * 6, [False, True, True, False, True, False], [0.0] * 6, [0.0] * 6)
    batch = pack([Trajectory(0, 0, 0, [sequence])])
    assert overlong_penalty(batch, max_new_tokens=3, buffer=3, penalty=2.0).tolist() == [0, 0, 0, 2.0, 0]


# selection and averages


def test_selection_is_over_the_whole_minibatch() -> None:
    """The entropies of the second sequence are all larger: the top half is that sequence, not half of each."""
    batch = batch_of(3, 3).with_(old_entropy_T=torch.tensor([0.1, 0.2, 0.3, 1.1, 1.2, 1.3]))
    assert kept(batch, train_on="all", entropy_quantile=0.5).tolist() == [False] * 3 + [True] * 3
    assert kept(batch, train_on="all", entropy_quantile=0.8).tolist() == [False] * 4 + [True] * 2
    assert kept(batch, train_on="all", entropy_quantile=0.999).tolist() == [False] * 5 + [True]


def test_the_quantile_is_among_what_could_train() -> None:
    batch = batch_of(2, 2, rewards=(1.0, 0.0)).with_(old_entropy_T=torch.tensor([0.1, 0.2, 1.1, 1.2]))
    assert kept(batch, train_on="correct", entropy_quantile=0.5).tolist() == [False, True, False, False]
    nothing = batch_of(2, rewards=(0.0,)).with_(old_entropy_T=torch.tensor([0.1, 0.2]))
    assert not kept(nothing, train_on="correct", entropy_quantile=0.5).any()


def test_only_tokens_off_the_mode() -> None:
    off_T = torch.tensor([True, False, False, True])
    batch = batch_of(2, 2, rewards=(1.0, 0.0)).with_(off_mode_T=off_T)
    assert kept(batch, train_on="all", not_mode=True).tolist() == off_T.tolist()
    assert kept(batch, train_on="correct", not_mode=True).tolist() == [True, False, False, False]


AVERAGES: list[tuple[str, str, list[float]]] = [
    # sequences of 1, 2 and 3 actions, of which none, one and two train
    ("token", "all", [0, 1 / 6, 0, 1 / 6, 0, 1 / 6]),
    ("token", "kept", [0, 1 / 3, 0, 1 / 3, 0, 1 / 3]),
    ("sequence", "all", [0, 1 / 6, 0, 1 / 9, 0, 1 / 9]),
    ("sequence", "kept", [0, 1 / 2, 0, 1 / 4, 0, 1 / 4]),
    ("constant", "all", [0, 1 / 30, 0, 1 / 30, 0, 1 / 30]),
    ("constant", "kept", [0, 1 / 20, 0, 1 / 20, 0, 1 / 20]),
]


@pytest.mark.parametrize(("level", "average_over", "expected"), AVERAGES)
def test_averages_with_selection(level: Any, average_over: Any, expected: list[float]) -> None:
    batch = batch_of(1, 2, 3).with_(off_mode_T=torch.tensor([False, True, False, True, False, True]))
    weight_T = loss_weights(batch, train_on="all", level=level, average_over=average_over, length=10, not_mode=True)
    assert weight_T.tolist() == pytest.approx(expected)


# laws


def lawful() -> dict[str, Tensor]:
    logp_T = torch.tensor([-0.5, -2.0, 0.0])
    return {"logp": logp_T, "log1mp": torch.tensor([-1.0, -0.1, -90.0]), "max_logp": logp_T.clamp(min=-0.7)} | {
        "entropy": torch.tensor([0.0, 1.0, math.log(8)])
    }


@pytest.mark.parametrize(
    ("name", "value", "law"),
    [
        ("logp", 1e-6, "-inf < logp <= 0"),
        ("logp", math.nan, "-inf < logp <= 0"),
        ("log1mp", -math.inf, "-inf < log1mp <= 0"),
        ("max_logp", -2.5, "logp <= max_logp"),
        ("max_logp", math.nan, "-inf < max_logp <= 0"),
        ("entropy", -0.01, "0 <= entropy <= ln V"),
        ("entropy", math.log(8) + 0.01, "0 <= entropy <= ln V"),
        ("entropy", math.nan, "0 <= entropy <= ln V"),
    ],
)
def test_a_broken_law_is_found(name: str, value: float, law: str) -> None:
    stats = lawful()
    assert first_breach(TokenStats(**stats), vocabulary=8) is None
    stats[name] = stats[name].clone()
    stats[name][1] = value
    assert breaches(TokenStats(**stats), vocabulary=8)[law].tolist() == [False, True, False]
    found = first_breach(TokenStats(**stats), vocabulary=8)
    assert found is not None and found[1] == 1


def test_no_statistics_break_no_law() -> None:
    assert first_breach(TokenStats(), 8) is None
    assert first_breach(TokenStats(logp=torch.zeros(0)), 8) is None


# update_stats


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_ledger_sees_what_rounding_loses(dtype: torch.dtype, processes: Processes) -> None:
    """Steps of 1e-6 on weights near 1: bfloat16 keeps none of them, float32 most."""
    torch.manual_seed(0)
    weight = nn.Parameter((1 + torch.rand(100, 7)).to(dtype))
    optimizer = torch.optim.AdamW([weight], lr=1e-6, weight_decay=0.0)
    update_stats = UpdateStats(optimizer, torch.bfloat16)
    weight.grad = torch.randn(100, 7).to(dtype)
    update_stats.open()
    optimizer.step()
    metrics = update_stats.close(processes)
    if dtype == torch.bfloat16:
        assert metrics == {"changed_share": 0.0, "update_ratio": 0.0}
    else:
        assert metrics["changed_share"] == 1.0
        assert metrics["update_ratio"] == pytest.approx(1.0, abs=0.05)
        assert metrics["served_changed_share"] < 0.02


def test_the_ledger_asks_for_what_adamw_does(processes: Processes) -> None:
    """In float64 nothing is lost: the ratio is 1 at every step, with decay and two groups."""
    torch.manual_seed(0)
    matrix, vector = (nn.Parameter(torch.randn(*shape, dtype=torch.float64)) for shape in ((300, 300), (5,)))
    groups = [{"params": [matrix], "weight_decay": 0.1}, {"params": [vector], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))
    update_stats = UpdateStats(optimizer, torch.float64)
    for _ in range(3):
        matrix.grad, vector.grad = torch.randn_like(matrix), torch.randn_like(vector)
        update_stats.open()
        optimizer.step()
        assert update_stats.close(processes) == {"changed_share": 1.0, "update_ratio": pytest.approx(1.0, rel=1e-9)}
    optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = 0.0
    update_stats.open()
    optimizer.step()
    assert update_stats.close(processes) == {"changed_share": 0.0}


# settings without effect

RL = [
    "actor.model_name=m",
    "actor.max_length_per_device=512",
    "train_data.path=x.jsonl",
    "train_data.prompts_per_rollout=4",
    "rollout.env_path=x.py",
    "rollout.train_sampling_params.max_new_tokens=16",
    "trainer.experiment_name=x",
]

SFT = [
    "data.path=x.jsonl",
    "data.max_length=64",
    "data.batch_size=4",
    "actor.model_name=m",
    "actor.max_length_per_device=512",
    "trainer.experiment_name=x",
]


def config(program: str, *overrides: str) -> RLConfig:
    return load(program, (*RL, *overrides))


GOOD = [
    ("ppo",),
    ("ppo", "actor.entropy.coef=0.01", "actor.kl.coef=0.1", "actor.clip=0.1", "adv.norm_var=true"),
    ("ppo", "actor.kl.coef=0.1", "actor.kl.type=reward", "actor.kl.estimator=k1"),
    ("ppo", "actor.objective=gspo", "actor.kl.coef=0.1", "actor.kl.type=advantage", "actor.kl.estimator=k1"),
    ("ppo", "actor.tis_level=sequence", "actor.tis_mode=mask", "adv.overlong_buffer=4"),
    ("ppo", "actor.select.entropy_quantile=0.8", "actor.average_over=kept"),
    ("ppo", "actor.select.not_mode=true", "actor.avg_level=constant"),
    ("ppo", "actor.select.not_mode=true", "actor.regularize_on=all", "actor.kl.coef=0.1", "actor.kl.estimator=k3"),
    ("ppo", "actor.select.on_policy=true", "rollout.max_staleness=1", "actor.regularize_on=all", "actor.kl.coef=0.1"),
    ("ppo", "actor.objective=sapo", "actor.objective_args.tau_neg=2"),
    ("spo",),
    ("spo", "actor.path.detach_target=true", "actor.select.not_mode=true", "actor.average_over=kept"),
    ("spo", "actor.objective=rank_jsd", "actor.objective_args.rank_cap=100"),
    ("spo_0p5", "actor.path.region=below_half", "actor.tis_coef=2"),
]


@pytest.mark.parametrize("settings", GOOD, ids=" ".join)
def test_settings_that_work_pass(settings: tuple[str, ...]) -> None:
    refuse_unused_settings(config(*settings))


CONSTANT = """
from RL2.objectives.objective import needs

@needs("logp")
def constant(stats, batch, *, scale: float = 1.0):
    return -scale * stats.logp.detach(), {}
"""

BAD = [
    (("ppo", "actor.objective=CONSTANT"), "actor.objective=CONSTANT scale=1.0 trains nothing: its gradient is exactly"),
    (("ppo", "actor.objective_args.clip_hihg=1"), "actor.objective_args.clip_hihg has no effect: actor.objective=ppo"),
    (("ppo", "actor.objective_args.clip_high=x"), "actor.objective_args.clip_high='x'; expected a number"),
    (("ppo", "actor.path.detach_target=true"), "actor.path.detach_target has no effect: actor.objective=ppo"),
    (("spo", "actor.clip=0.2"), "actor.clip has no effect: actor.objective=spo"),
    (("spo", "adv.estimator=reinforce", "adv.norm_var=true"), "adv.norm_var=true has no effect: actor.objective=spo"),
    (("spo", "adv.overlong_buffer=4"), "adv.overlong_buffer=4 has no effect: actor.objective=spo reads no advantages"),
    (("spo", "adv.estimator=gae"), "adv.estimator=gae has no effect: actor.objective=spo reads no advantages"),
    (
        ("spo", "actor.kl.coef=1", "actor.kl.type=reward", "actor.kl.estimator=k1"),
        "actor.kl.type=reward has no effect: actor.objective=spo reads no advantages",
    ),
    # where the sampled token is the mode, spo has neither loss nor gradient, and all tokens count either way
    (("spo", "actor.select.not_mode=true"), "actor.select.not_mode=true has no effect: the gradient is the same"),
    (("ppo", "actor.objective=NOTHING"), "actor.objective=NOTHING: .*nothing.py: there is no such file"),
]


@pytest.mark.parametrize(("settings", "message"), BAD, ids=[" ".join(settings) for settings, _ in BAD])
def test_a_setting_without_effect_is_refused(settings: tuple[str, ...], message: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(CONSTANT)
    names = {"CONSTANT": f"{tmp_path}/mine.py:constant", "NOTHING": f"{tmp_path}/nothing.py:f"}
    for word, name in names.items():
        settings = tuple(setting.replace(word, name) for setting in settings)
        message = message.replace(word, name)
    with pytest.raises(ConfigError, match=message):
        refuse_unused_settings(config(*settings))


@pytest.mark.parametrize("objective", ["sft", "spo", "spo_0p5", "binary_jsd", "rank_jsd", "rank_kl"])
def test_what_reads_no_advantages_can_fine_tune(objective: str) -> None:
    refuse_advantage_objectives(load("sft", [*SFT, f"actor.objective={objective}"]))


@pytest.mark.parametrize("objective", ["reinforce", "ppo", "gspo", "cispo", "sapo"])
def test_what_reads_advantages_cannot(objective: str) -> None:
    with pytest.raises(ConfigError, match=f"actor.objective={objective} reads advantages, and rows of data have none"):
        refuse_advantage_objectives(load("sft", [*SFT, f"actor.objective={objective}"]))


def test_the_probe_has_something_of_everything() -> None:
    _, batch = synthetic_batch(64)
    assert batch.off_mode_T is not None and 0 < int(batch.off_mode_T.sum()) < len(batch.off_mode_T)
    assert {float(r) for r in batch.reward_T.unique()} == {0.0, 1.0}
    assert int(batch.lengths_B.min()) == 1


def test_only_tokens_of_the_present_weights() -> None:
    sequence = Sequence([0] * 5, [False, True, True, True, True], [0.0] * 5, [0.0] * 5, [-1, 3, 3, 4, 5])
    batch = pack([Trajectory(0, 0, 0, [sequence])], version=5)
    assert batch.age_T is not None
    assert batch.age_T.tolist() == [2, 2, 1, 0]
    assert kept(batch, train_on="all", on_policy=True).tolist() == [False, False, False, True]
    fresh = pack([Trajectory(0, 0, 0, [replace(sequence, versions=[-1, 5, 5, 5, 5])])], version=5)
    assert fresh.age_T is None
    assert kept(fresh, train_on="all", on_policy=True).all()


@pytest.mark.parametrize("level", ["token", "sequence", "constant"])
def test_truncated_trajectories_are_masked_in_the_loss_alone(level: Any) -> None:
    """They keep their place in baselines and in what is divided by, as in DAPO and TRL."""
    sequence = Sequence([0] * 3, [False, True, True], [0.0] * 3, [0.0, 0.0, 1.0])
    batch = pack([Trajectory(0, 0, n, [sequence], truncated=n == 1) for n in range(3)])
    knobs: dict[str, Any] = {"train_on": "all", "level": level, "length": 4}
    all_T = loss_weights(batch, average_over="all", **knobs)
    masked_T = loss_weights(batch, average_over="all", not_truncated=True, **knobs)
    assert torch.equal(masked_T, all_T * torch.tensor([1, 1, 0, 0, 1, 1]))
    rest = batch.sequences([0, 2])
    kept_T = loss_weights(batch, average_over="kept", not_truncated=True, **knobs)
    assert kept_T[[0, 1, 4, 5]].tolist() == loss_weights(rest, average_over="all", **knobs).tolist()
    whole = pack([Trajectory(0, 0, n, [sequence]) for n in range(2)])
    assert whole.truncated_B is None
    assert kept(whole, train_on="all", not_truncated=True).all()


def test_truncated_trajectories_are_either_masked_or_left_out() -> None:
    assert config("ppo", "actor.select.not_truncated=true", "actor.average_over=kept").actor.select.is_on
    with pytest.raises(ConfigError, match=r"not_truncated=true has no effect with rollout\.overlong_filtering=true"):
        config("ppo", "actor.select.not_truncated=true", "rollout.overlong_filtering=true")
