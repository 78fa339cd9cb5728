"""GDPO (arXiv 2601.05242): advantages normalised part by part of the reward, against the formula written out."""

from __future__ import annotations

import math
from statistics import mean, stdev

import pytest
import torch
from rl_settings import rl_config

from RL2.batch.advantages import decoupled, gdpo, reinforce
from RL2.batch.packing import pack, part_rewards
from RL2.config.programs import RLConfig
from RL2.errors import ConfigError
from RL2.objectives.loss import by_token, with_weights
from RL2.objectives.registry import configured
from RL2.rollout.filters import filter_metrics, trainable, with_signal
from RL2.trainer.annotate import annotate
from RL2.trainer.estimator_rules import check_estimator
from RL2.trainer.unused_settings import refuse_unused_settings
from RL2.types import Sequence, TokenBatch, TokenStats, Trajectory

Parts = dict[str, float]
EPS = 1e-6


def trajectory(group: int, parts: Parts, weights: Parts | None = None, tokens: int = 2) -> Trajectory:
    """An episode of two given and some sampled tokens, as it is played."""
    total = math.fsum((weights or {}).get(name, 1.0) * value for name, value in parts.items())
    mask = [False] * 2 + [True] * tokens
    sequence = Sequence([5] * len(mask), mask, [-1.0 * sampled for sampled in mask], [0.0] * (tokens + 1) + [total])
    return Trajectory(group, group, 0, [sequence], parts=parts, weighted=total)


def written_out(trajectories: list[Trajectory], weights: Parts) -> list[float]:
    """Equations 4 to 7, in float64, trajectory by trajectory."""
    sums = []
    for one in trajectories:
        group = [other for other in trajectories if other.group == one.group]
        total = 0.0
        for name in {name for other in group for name in other.parts}:
            values = [other.parts.get(name, 0.0) for other in group]
            deviation = stdev(values) if len(values) > 1 else 0.0
            if deviation > 0:
                total += weights.get(name, 1.0) * (one.parts.get(name, 0.0) - mean(values)) / deviation
        sums.append(total)
    return [(value - mean(sums)) / (stdev(sums) + EPS) for value in sums]


def found(trajectories: list[Trajectory], weights: Parts) -> list[float]:
    """The one advantage that all actions of a trajectory have; other positions have 0."""
    batch = pack(trajectories)
    part_NP, weight_P = part_rewards(trajectories, weights)
    advantage_T = gdpo(batch, part_NP=part_NP, weight_P=weight_P, group_size=4)
    assert not advantage_T[~batch.action_T].any()
    values = [advantage_T[batch.action_T & (batch.sequence_T == b)].unique() for b in range(batch.num_sequences)]
    assert all(len(each) == 1 for each in values)
    return [float(each) for each in values]


def drawn(seed: int) -> list[Trajectory]:
    """Groups of unlike sizes, whose parts have unlike scales; some groups have parts of their own."""
    g = torch.Generator().manual_seed(seed)

    def number() -> float:
        return float(torch.randint(0, 4, (), generator=g))

    trajectories = []
    for group in (7, 2, 9, 4):
        for _ in range(2 + group % 3 + seed % 2):
            parts = {"a": number(), "b": 1000 * number(), "c": number() / 7}
            parts |= {"d": number()} if group == 9 else {}
            trajectories.append(trajectory(group, {k: v for k, v in parts.items() if number() or k == "a"}))
    return trajectories


@pytest.mark.parametrize("weights", [{}, {"a": 2.0, "b": 0.5, "c": -1.0}, {"a": 0.0, "d": 3.0}])
@pytest.mark.parametrize("seed", range(6))
def test_advantages_are_those_of_the_paper(seed: int, weights: Parts) -> None:
    trajectories = drawn(seed)
    assert found(trajectories, weights) == pytest.approx(written_out(trajectories, weights), rel=1e-5, abs=1e-9)


def test_the_example_of_the_paper() -> None:
    """Two rollouts and two binary rewards: one earns one of them, or both. GRPO cannot tell these cases apart."""
    one = [trajectory(0, {"a": 0, "b": 1}), trajectory(0, {"a": 0, "b": 0})]
    both = [trajectory(0, {"a": 1, "b": 1}), trajectory(0, {"a": 0, "b": 0})]
    group_N = torch.zeros(2, dtype=torch.long)
    assert decoupled(*part_rewards(one, {}), group_N).tolist() == pytest.approx([0.7071, -0.7071], rel=1e-4)
    assert decoupled(*part_rewards(both, {}), group_N).tolist() == pytest.approx([1.4142, -1.4142], rel=1e-4)
    for group in (one, both):
        advantage_T = reinforce(pack(group), global_norm=False, norm_var=True)
        assert advantage_T.unique().tolist() == pytest.approx([-0.7071, 0, 0.7071], rel=1e-4)


def test_with_one_part_it_is_grpo_but_for_the_scale_of_the_rollout() -> None:
    trajectories = [trajectory(g, {"a": float(r)}) for g, r in ((0, 1), (0, 0), (0, 0), (1, 5), (1, 2), (1, 1))]
    grpo_T = reinforce(pack(trajectories), global_norm=False, norm_var=True)
    numbers = [Trajectory(t.row, t.group, 0, t.sequences) for t in trajectories]
    for each in (trajectories, numbers):  # a reward that is a number is one part
        part_NP, weight_P = part_rewards(each, {})
        gdpo_T = gdpo(pack(each), part_NP=part_NP, weight_P=weight_P)
        ratio = gdpo_T[grpo_T != 0] / grpo_T[grpo_T != 0]
        assert ratio.max() - ratio.min() < 1e-5  # GRPO adds 1e-6 to its deviations


EQUAL = [{"a": 0.3, "b": 100.1}, {"a": 0.1 + 0.2, "b": 100.1}, {"a": 0.3, "b": 100.1}]


def test_equal_parts_have_no_advantage() -> None:
    """Exactly none, whatever the other groups have."""
    others = [trajectory(1, {"a": float(n), "b": n / 3}) for n in range(3)]
    advantages = found([trajectory(0, parts) for parts in EQUAL] + others, {"b": 0.7})
    assert advantages[:3] == [0, 0, 0]
    assert any(advantages[3:])
    cancel = [trajectory(0, {"a": 1, "b": 0}), trajectory(0, {"a": 0, "b": 1 / 3})]
    assert found(cancel + others, {})[:2] == [0, 0]


SHAPE = ("train_data.prompts_per_rollout=2", "train_data.responses_per_prompt=3")


def config(*overrides: str) -> RLConfig:
    return rl_config(*SHAPE, "adv.estimator=gdpo", *overrides)


def test_groups_with_a_signal_in_their_parts_are_kept() -> None:
    """Equal sums of unlike parts say something, and parts that cancel, or are only watched, say nothing."""
    weights = {"watched": 0.0}
    settings = config("rollout.dynamic_filtering=true", "reward.weights.watched=0")
    groups = {
        "equal sums": [{"a": 3, "b": 0}, {"b": 2, "c": 1}, {"b": 1, "c": 2}],
        "unlike": [{"a": 1}, {"a": 0}],
        "watched": [{"a": 1, "watched": 1}, {"a": 1, "watched": 5}],
        "cancelling": [{"a": 1, "b": 0}, {"a": 0, "b": 5}],
        "tilted": [{"a": 2, "b": 0, "c": 0}, {"a": 0, "b": 1, "c": 1}],
    }
    trajectories = [trajectory(n, parts, weights) for n, of in enumerate(groups.values()) for parts in of]
    signal = with_signal(trajectories, settings)
    kept = {list(groups)[t.group] for t in signal}
    advantages = dict(zip(map(id, trajectories), found(trajectories, weights), strict=True))
    assert (
        kept == {list(groups)[t.group] for t in trajectories if advantages[id(t)]} == {"equal sums", "unlike", "tilted"}
    )
    assert filter_metrics(trajectories, signal, settings) == {"train/filtered": pytest.approx(2 / 5)}
    summed = rl_config(*SHAPE, "rollout.dynamic_filtering=true", "reward.weights.watched=0")
    assert {list(groups)[t.group] for t in with_signal(trajectories, summed)} == {"unlike", "cancelling"}


def judged(trajectories: list[Trajectory], settings: RLConfig) -> TokenBatch:
    kept = trainable(trajectories, with_signal(trajectories, settings), settings)
    batch = annotate(pack(kept), kept, config=settings, actor=None, reference=None)  # type: ignore[arg-type]
    return with_weights(batch, settings.actor)


def test_a_step_raises_what_is_right_in_any_part() -> None:
    """Worked by hand: three responses, weights of 2 for `right` and 1 for `brief`.

    right 1, 0, 0 has the mean 1/3 and the deviation 0.577, so 1.155, -0.577, -0.577; brief 0, 1, 0 the same in another
    order. Twice the first plus the second: 1.732, 0, -1.732. Their deviation is 1.732: 1, 0, -1.
    """
    settings = config("reward.weights.right=2", "actor.tis_coef=0")
    parts = [{"right": 1.0, "brief": 0.0}, {"right": 0.0, "brief": 1.0}, {"right": 0.0, "brief": 0.0}]
    batch = judged([trajectory(0, each, {"right": 2.0}) for each in parts], settings)
    assert batch.advantage_T is not None
    assert batch.advantage_T[batch.action_T].tolist() == pytest.approx([1, 1, 0, 0, -1, -1], abs=1e-5)
    actions = batch.positions(batch.action_T)
    logp_N = torch.full((6,), -1.0)
    _, pull_N = by_token(TokenStats(logp=logp_N, entropy=logp_N), actions, settings.actor, configured(settings.actor))
    assert pull_N.sign().tolist() == [1, 1, 0, 0, -1, -1]


def test_a_penalty_for_length_is_one_more_part() -> None:
    settings = config("adv.overlong_buffer=2", "adv.overlong_penalty=0.25")
    lengths, right = (4, 3, 2), (1.0, 1.0, 0.0)
    trajectories = [trajectory(0, {"a": r}, tokens=n) for n, r in zip(lengths, right, strict=True)]
    batch = judged(trajectories, settings)
    assert batch.advantage_T is not None
    with_length = [trajectory(0, {"a": r, "long": (n - 2) / 2}) for n, r in zip(lengths, right, strict=True)]
    expected = written_out(with_length, {"long": -0.25})
    for b, value in enumerate(expected):
        mine_T = batch.action_T & (batch.sequence_T == b)
        assert batch.advantage_T[mine_T].tolist() == pytest.approx([value] * lengths[b], rel=1e-5)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("actor.kl.type=reward", "actor.kl.type=reward with adv.estimator=gdpo"),
        ("adv.norm_var=true", "adv.norm_var and adv.global_norm have no effect with adv.estimator=gdpo"),
    ],
)
def test_what_does_not_go_with_it_is_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_estimator(config(override, "actor.kl.coef=0.1"))


def test_an_objective_that_reads_no_advantages_refuses_it() -> None:
    with pytest.raises(ConfigError, match=r"adv\.estimator=gdpo has no effect: .*rank_jsd reads no advantages"):
        refuse_unused_settings(config("actor.objective=rank_jsd"))
