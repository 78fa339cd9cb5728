"""From rewards to advantages: pure functions over the whole rollout, run alike on every rank."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from RL2.types import TokenBatch


def reinforce(batch: TokenBatch, *, global_norm: bool, norm_var: bool) -> Tensor:
    """Total reward of the trajectory minus the mean of its group, on each of its action tokens.

    Dr. GRPO (arXiv 2503.20783); with `norm_var` divided by the group's standard deviation, n - 1 in its denominator
    (GRPO, 2402.03300). With `global_norm`, or where groups have one member and so no mean to compare with, mean and
    deviation are those of the whole rollout (REINFORCE++, 2501.03262).
    """
    reward_N, group_N, number_B = _trajectories(batch)
    group_N = group_N.unique(return_inverse=True)[1]
    if global_norm or len(group_N.unique()) == len(group_N):
        group_N = torch.zeros_like(group_N)
    mean_N = _group_mean(reward_N, group_N)
    advantage_N = reward_N - mean_N
    if norm_var:
        size_N = torch.bincount(group_N)[group_N]
        variance_N = _group_mean(advantage_N.square(), group_N) * size_N / (size_N - 1).clamp(min=1)
        advantage_N = advantage_N / (variance_N.sqrt() + 1e-6)
    return _on_actions(batch, advantage_N[number_B])


def spo(batch: TokenBatch) -> Tensor:
    """The total reward of the trajectory on each of its action tokens: no baseline, no normalisation."""
    reward_N, _, number_B = _trajectories(batch)
    return _on_actions(batch, reward_N[number_B])


ADVANTAGES: dict[str, Callable[..., Tensor]] = {"reinforce": reinforce, "spo": spo}


def reward_of_sequences(batch: TokenBatch) -> Tensor:
    """[B]: total reward of the trajectory that each sequence belongs to."""
    reward_N, _, number_B = _trajectories(batch)
    return reward_N[number_B]


def _trajectories(batch: TokenBatch) -> tuple[Tensor, Tensor, Tensor]:
    """reward [N] and group [N] of each trajectory, and which of them a sequence belongs to [B]."""
    ids, number_B = batch.trajectory_B.unique(return_inverse=True)
    reward_N = batch.reward_T.new_zeros(len(ids)).index_add_(0, number_B[batch.sequence_T], batch.reward_T)
    group_N = torch.zeros_like(ids).index_copy_(0, number_B, batch.group_B)
    return reward_N, group_N, number_B


def _group_mean(x_N: Tensor, group_N: Tensor) -> Tensor:
    size = int(group_N.max()) + 1
    sums = x_N.new_zeros(size).index_add_(0, group_N, x_N)
    return (sums / torch.bincount(group_N, minlength=size))[group_N]


def _on_actions(batch: TokenBatch, advantage_B: Tensor) -> Tensor:
    return advantage_B[batch.sequence_T] * batch.action_T
