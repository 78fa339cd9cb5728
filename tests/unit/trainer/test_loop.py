"""The small parts of the loop: schedules, what may train, and what stands beside a rollout before the update."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from rl_settings import rl_config
from torch import Tensor

from RL2.batch.packing import pack
from RL2.config.programs import RLConfig
from RL2.errors import ConfigError
from RL2.rollout.filters import filter_metrics, trainable, with_signal
from RL2.rollout.metrics import NothingScored
from RL2.trainer.annotate import annotate
from RL2.types import Sequence, TokenBatch, Trajectory
from RL2.workers.optim import schedule


def rates(*overrides: str, total: int = 10) -> list[float]:
    actor = rl_config(*overrides).actor
    return [schedule(actor, step, total) for step in range(total)]


def test_schedules() -> None:
    assert rates("actor.scheduler=constant", "actor.warmup_ratio=0") == [1] * 10
    warm = rates("actor.scheduler=constant", "actor.warmup_ratio=0.3")
    assert warm == pytest.approx([0.25, 0.5, 0.75] + [1] * 7)
    linear = rates("actor.scheduler=linear", "actor.warmup_ratio=0")
    assert linear == pytest.approx([1 - i / 10 for i in range(10)])
    cosine = rates("actor.scheduler=cosine", "actor.warmup_ratio=0")
    assert cosine[0] == 1
    assert cosine[5] == pytest.approx(0.5)
    assert rates("actor.scheduler=constant") == [1] * 10  # as in transformers: no warm-up unless asked for
    for name in ("linear", "cosine", "wsd"):
        assert rates(f"actor.scheduler={name}") == rates(f"actor.scheduler={name}", "actor.warmup_ratio=0.1")
    wsd = rates("actor.scheduler=wsd", "actor.warmup_ratio=0.2", "actor.decay_ratio=0.4")
    assert wsd == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25])


@pytest.mark.parametrize("name", ["linear", "cosine", "wsd"])
def test_rates_decay_to_a_floor(name: str) -> None:
    """The rate, as a share of the peak, is the floor plus the rest times the decay to 0."""
    settings = (f"actor.scheduler={name}", "actor.warmup_ratio=0.2", "actor.lr=4e-6")
    to_zero, to_floor = rates(*settings, total=50), rates(*settings, "actor.min_lr=1e-6", total=50)
    assert to_floor[:10] == to_zero[:10]  # the warm-up begins at 0
    assert to_floor[10:] == pytest.approx([0.25 + 0.75 * rate for rate in to_zero[10:]])


def test_a_floor_that_has_no_effect_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"actor\.min_lr=1e-07 has no effect with actor\.scheduler=constant"):
        rl_config("actor.min_lr=1e-7")
    with pytest.raises(ConfigError, match=r"actor\.min_lr=0\.1 is above actor\.lr=1e-06"):
        rl_config("actor.scheduler=cosine", "actor.min_lr=0.1", "actor.lr=1e-6")


def trajectory(group: int, reward: float, unscored: str | None = None) -> Trajectory:
    sequence = Sequence([1, 2, 3, 4], [False, False, True, True], [0, 0, -1.0, -1.0], [0, 0, 0, reward])
    return Trajectory(row=0, group=group, sample=0, sequences=[sequence], unscored=unscored)


def trained(trajectories: list[Trajectory], config: RLConfig) -> list[Trajectory]:
    return trainable(trajectories, with_signal(trajectories, config), config)


def test_what_may_train() -> None:
    equal, mixed = [trajectory(0, 1.0), trajectory(0, 1.0)], [trajectory(1, 0.0), trajectory(1, 1.0)]
    failed = trajectory(1, 0.0, unscored="time-out")
    everything = [*equal, *mixed, failed]
    assert trained(everything, rl_config()) == [*equal, *mixed]
    filtering = rl_config("rollout.dynamic_filtering=true")
    assert (kept := trained(everything, filtering)) == mixed
    assert trained(equal, filtering) == equal  # rather a step without signal than none
    assert filter_metrics(everything, kept, filtering) == {"train/filtered": 0.5}
    assert filter_metrics(everything, everything, rl_config()) == {}


def test_truncated_trajectories_are_left_out_on_request() -> None:
    whole, cut = trajectory(0, 1.0), replace(trajectory(0, 0.0), truncated=True)
    assert trained([whole, cut], rl_config()) == [whole, cut]
    filtering = rl_config("rollout.overlong_filtering=true")
    assert trained([whole, cut], filtering) == [whole]
    with pytest.raises(NothingScored, match="overlong_filtering=true leaves none to train on"):
        trained([cut], filtering)
    # a group whose rewards differ only in what was cut says nothing
    both = rl_config("rollout.overlong_filtering=true", "rollout.dynamic_filtering=true")
    assert trained([whole, whole, cut, (other := trajectory(1, 0.0)), (best := trajectory(1, 1.0))], both) == [
        other,
        best,
    ]


@dataclass
class Fixed:
    """A policy whose log-probabilities are known."""

    value: float

    def logp(self, batch: TokenBatch, progress: object = None) -> Tensor:
        return torch.full(batch.labels_T.shape, self.value) * batch.action_T

    def add_old_logprobs(self, batch: TokenBatch, progress: object = None, *, sum_p2: bool = False) -> TokenBatch:
        return batch.with_(old_logp_T=self.logp(batch))


@dataclass
class FixedCritic:
    """A critic that expects the same before each action."""

    value: float

    def values(self, batch: TokenBatch, progress: object = None) -> Tensor:
        return torch.full(batch.labels_T.shape, self.value) * batch.action_T


def test_gae_with_kl_in_the_rewards_and_the_returns_of_the_critic() -> None:
    """Each token pays 0.5 * 2 and is expected to earn 0.25."""
    batch = pack([trajectory(0, 1.0), trajectory(0, 0.0)])
    gae = rl_config("adv.estimator=gae", "actor.kl.coef=0.5", "actor.kl.estimator=k1", "actor.kl.type=reward")
    judged = annotate(batch, (), config=gae, actor=Fixed(-1.0), reference=Fixed(-3.0), critic=FixedCritic(0.25))  # type: ignore[arg-type]
    assert judged.return_T is not None
    assert judged.return_T[judged.action_T].tolist() == [-1, 0, -2, -1]
    assert judged.advantage_T is not None
    assert judged.advantage_T[judged.action_T].tolist() == [-1.25, -0.25, -2.25, -1.25]
    assert torch.equal(judged.reward_T, batch.reward_T)

    white = rl_config("adv.estimator=gae", "adv.global_norm=true", "adv.norm_var=true")
    judged = annotate(batch, (), config=white, actor=Fixed(-1.0), reference=None, critic=FixedCritic(0.25))  # type: ignore[arg-type]
    assert judged.return_T is not None
    assert judged.return_T[judged.action_T].tolist() == [1, 1, 0, 0]
    assert judged.advantage_T is not None
    half = 3**0.5 / 2  # deviations of a half, n - 1 = 3
    assert judged.advantage_T[judged.action_T].tolist() == pytest.approx([half, half, -half, -half])


def advantages(*overrides: str) -> tuple[Any, Tensor]:
    batch = pack([trajectory(0, 1.0), trajectory(0, 0.0)])
    with_kl = rl_config("actor.kl.coef=0.5", *overrides)
    judged = annotate(batch, (), config=with_kl, actor=Fixed(-1.0), reference=Fixed(-3.0))  # type: ignore[arg-type]
    assert judged.advantage_T is not None
    assert torch.equal(judged.reward_T, batch.reward_T)
    return judged, judged.advantage_T[judged.action_T]


def test_kl_in_the_rewards_moves_the_groups_mean() -> None:
    """Each trajectory pays 0.5 * 2 for each of its 2 tokens: rewards -1 and -2, which differ from their mean by 1/2."""
    _, advantage_A = advantages("actor.kl.type=reward")
    assert advantage_A.tolist() == [0.5, 0.5, -0.5, -0.5]


def test_kl_in_the_advantages_is_paid_by_each_token() -> None:
    _, advantage_A = advantages("actor.kl.type=advantage")
    assert advantage_A.tolist() == [-0.5, -0.5, -1.5, -1.5]


def test_overlong_responses_pay_off_their_advantage() -> None:
    """Two tokens of at most two, over a buffer of one: the whole penalty, at the last token of each."""
    batch = pack([trajectory(0, 1.0), trajectory(0, 0.0)])
    knobs = ("rollout.train_sampling_params.max_new_tokens=2", "adv.overlong_buffer=1", "adv.overlong_penalty=0.5")
    spo = rl_config(*knobs, "adv.estimator=spo")
    judged = annotate(batch, (), config=spo, actor=Fixed(-1.0), reference=None)  # type: ignore[arg-type]
    assert judged.advantage_T is not None
    assert judged.advantage_T[judged.action_T].tolist() == [0.5, 0.5, -0.5, -0.5]
    assert torch.equal(judged.reward_T, batch.reward_T)


def test_kl_in_the_loss_leaves_advantages_alone() -> None:
    judged, advantage_A = advantages("actor.kl.type=loss")
    assert advantage_A.tolist() == [0.5, 0.5, -0.5, -0.5]
    assert judged.ref_logp_T is not None
    assert judged.old_logp_T is None


def test_old_log_probabilities_are_there_for_a_second_update() -> None:
    several = rl_config("actor.update_per_rollout=2")
    batch = pack([trajectory(0, 1.0), trajectory(0, 0.0)])
    judged = annotate(batch, (), config=replace(several), actor=Fixed(-1.0), reference=None)  # type: ignore[arg-type]
    assert judged.old_logp_T is not None
    assert judged.old_logp_T[judged.action_T].tolist() == [-1.0] * 4


def test_the_baseline_follows_the_configuration_and_not_what_filters_left() -> None:
    """Of each pair one is left, which has nothing to be compared with; of single responses all are compared."""
    batch = pack([trajectory(0, 1.0), trajectory(1, 0.0)])
    for responses, expected in ((2, [0.0] * 4), (1, [0.5, 0.5, -0.5, -0.5])):
        settings = rl_config(f"train_data.responses_per_prompt={responses}", "train_data.prompts_per_rollout=2")
        judged = annotate(batch, (), config=settings, actor=Fixed(-1.0), reference=None)  # type: ignore[arg-type]
        assert judged.advantage_T is not None
        assert judged.advantage_T[judged.action_T].tolist() == expected
