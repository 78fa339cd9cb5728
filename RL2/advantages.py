"""From rewards to advantages: pure functions over the whole rollout, run alike on every rank."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from RL2.types import ROUNDING, TokenBatch


def reinforce(batch: TokenBatch, *, global_norm: bool, norm_var: bool) -> Tensor:
    """Total reward of the trajectory minus the mean of its group, on each of its action tokens.

    Dr. GRPO (arXiv 2503.20783); with `norm_var` divided by the group's standard deviation, n - 1 in its denominator
    (GRPO, 2402.03300). With `global_norm`, or where groups have one member and so no mean to compare with, mean and
    deviation are those of the whole rollout: with both knobs this is REINFORCE++ (2501.03262, equation 10), but for a
    KL cost in the reward, of which the whole sum counts at each token, as in RL2, and not only what lies ahead.
    """
    reward_N, group_N, number_B = _trajectories(batch)
    group_N = _compared(group_N, whole=global_norm)
    mean_N = _group_mean(reward_N, group_N)
    advantage_N = reward_N - mean_N
    if norm_var:
        size_N = torch.bincount(group_N)[group_N]
        variance_N = _group_mean(advantage_N.square(), group_N) * size_N / (size_N - 1).clamp(min=1)
        advantage_N = advantage_N / (variance_N.sqrt() + 1e-6)
    return _on_actions(batch, advantage_N[number_B])


def rloo(batch: TokenBatch) -> Tensor:
    """Total reward of the trajectory minus the mean of the others in its group, on each of its action tokens.

    REINFORCE leave-one-out (arXiv 2402.14740). Where groups have one member, the others are the rest of the rollout.
    """
    reward_N, group_N, number_B = _trajectories(batch)
    group_N = _compared(group_N)
    size_N = torch.bincount(group_N)[group_N]
    # R - (sum - R) / (n - 1) = n / (n - 1) (R - mean)
    advantage_N = (reward_N - _group_mean(reward_N, group_N)) * size_N / (size_N - 1).clamp(min=1)
    return _on_actions(batch, advantage_N[number_B])


def gae(batch: TokenBatch, *, gamma: float, lamda: float) -> Tensor:
    """Generalised advantage estimation (arXiv 1506.02438) with the critic's `value_T`, at each action token.

    A_t = d_t + gamma lamda A_(t+1), d_t = r_t + gamma V_(t+1) - V_t, where t + 1 is the next action token of the
    trajectory: what the environment says in between takes no step, and sequences of one trajectory follow each other.
    After its last action there is nothing. A reward that stands at a token that is no action belongs to the last action
    before it. The target of the critic is A_t + V_t.
    """
    assert batch.value_T is not None
    number_B = batch.trajectory_B.unique(return_inverse=True)[1]
    number_T, position_T = number_B[batch.sequence_T].sort(stable=True)
    is_action_T = batch.action_T[position_T]
    length_N = torch.zeros(len(number_B), dtype=torch.long, device=number_B.device)
    length_N.index_add_(0, number_T, is_action_T.long())
    # the number of the last action up to a token within its trajectory; -1 before the first
    place_T = is_action_T.cumsum(0) - 1 - (length_N.cumsum(0) - length_N)[number_T]
    action_A, place_A, number_A = (x[is_action_T] for x in (position_T, place_T, number_T))
    # [step, trajectory], with 0 after the end: there deltas, and so advantages, are 0
    shape = (int(length_N.max()) + 1, len(length_N))
    value_SN, reward_SN = (x.new_zeros(shape) for x in (batch.value_T, batch.reward_T))
    value_SN[place_A, number_A] = batch.value_T[action_A]
    begun_T = place_T >= 0
    earned = batch.reward_T[position_T][begun_T]
    reward_SN.index_put_((place_T[begun_T], number_T[begun_T]), earned, accumulate=True)
    advantage_SN = reward_SN - value_SN
    advantage_SN[:-1] += gamma * value_SN[1:]
    for step in range(shape[0] - 2, -1, -1):
        advantage_SN[step] += gamma * lamda * advantage_SN[step + 1]
    return torch.zeros_like(batch.value_T).index_copy_(0, action_A, advantage_SN[place_A, number_A])


def whitened(batch: TokenBatch, advantage_T: Tensor, *, global_norm: bool, norm_var: bool) -> Tensor:
    """Advantages over the action tokens of the whole rollout: minus their mean (`global_norm`), divided by their
    standard deviation, n - 1 in its denominator (`norm_var`)."""
    if not batch.action_T.any():
        return advantage_T
    mean = advantage_T[batch.action_T].mean()
    variance = (advantage_T[batch.action_T] - mean).square().sum() / max(1, int(batch.action_T.sum()) - 1)
    if global_norm:
        advantage_T = advantage_T - mean
    if norm_var:
        advantage_T = advantage_T / (variance + 1e-8).sqrt()
    return advantage_T * batch.action_T


def spo(batch: TokenBatch) -> Tensor:
    """The total reward of the trajectory on each of its action tokens: no baseline, no normalisation."""
    reward_N, _, number_B = _trajectories(batch)
    return _on_actions(batch, reward_N[number_B])


ADVANTAGES: dict[str, Callable[..., Tensor]] = {"reinforce": reinforce, "rloo": rloo, "spo": spo}


def reward_of_sequences(batch: TokenBatch) -> Tensor:
    """Return the total reward of the trajectory that each sequence belongs to, float64 [B].

    It is exactly 0 where the rewards cancel but for rounding, as in `Trajectory.reward`. Above 0: it is correct.
    """
    number_B = batch.trajectory_B.unique(return_inverse=True)[1]
    number_T, reward_T = number_B[batch.sequence_T], batch.reward_T.double()
    total_N = reward_T.new_zeros(int(number_B.max()) + 1).index_add_(0, number_T, reward_T)
    size_N = torch.zeros_like(total_N).index_add_(0, number_T, reward_T.abs())
    return torch.where(total_N.abs() > ROUNDING * size_N, total_N, 0.0)[number_B]


def _trajectories(batch: TokenBatch) -> tuple[Tensor, Tensor, Tensor]:
    """reward [N] and group [N] of each trajectory, and which of them a sequence belongs to [B]."""
    ids, number_B = batch.trajectory_B.unique(return_inverse=True)
    reward_N = batch.reward_T.new_zeros(len(ids)).index_add_(0, number_B[batch.sequence_T], batch.reward_T)
    group_N = torch.zeros_like(ids).index_copy_(0, number_B, batch.group_B)
    return reward_N, group_N, number_B


def _compared(group_N: Tensor, whole: bool = False) -> Tensor:
    """Which trajectories are compared, numbered from 0: those of a group, or all if groups have one member each."""
    names, number_N = group_N.unique(return_inverse=True)
    return torch.zeros_like(number_N) if whole or len(names) == len(number_N) else number_N


def _group_mean(x_N: Tensor, group_N: Tensor) -> Tensor:
    size = int(group_N.max()) + 1
    sums = x_N.new_zeros(size).index_add_(0, group_N, x_N)
    return (sums / torch.bincount(group_N, minlength=size))[group_N]


def _on_actions(batch: TokenBatch, advantage_B: Tensor) -> Tensor:
    return advantage_B[batch.sequence_T] * batch.action_T
