"""Advantages from rewards: pure functions of the whole rollout, which every rank calls with the same arguments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from RL2.batch.estimator import reads
from RL2.config.values import Share
from RL2.types import ROUNDING, TokenBatch

StdOver = Literal["rollout", "tokens"]


@reads("rewards", "groups", baseline=True)
def reinforce(
    batch: TokenBatch,
    *,
    global_norm: bool = False,
    norm_var: bool = False,
    std_over: StdOver | None = None,
    group_size: int | None = None,
) -> Tensor:
    """Return the total reward of the trajectory minus the mean of its group, on each of its action tokens, [T].

    This is the advantage of Dr. GRPO (arXiv 2503.20783). `global_norm` takes the mean over the whole rollout, as do
    groups of one member. Trajectories of different roles are never compared: each role has groups, and a rollout, of
    its own. `group_size` is the number of members that a group was sampled with; None counts the members
    in the batch.

    `norm_var` divides by a standard deviation plus 1e-6, with n - 1 in its denominator. By default the deviation is
    over the same trajectories as the mean: GRPO (2402.03300), or with `global_norm` RL2. `std_over=rollout` takes it
    over the rewards of the whole rollout (TRL's `scale_rewards="batch"`). `std_over=tokens` whitens the advantages over
    all action tokens, as in REINFORCE++ (2501.03262, equation 10).

    Statistics are float64, so equal rewards have an advantage of exactly 0.
    """
    reward_N, group_N, number_B = by_trajectory(batch)
    size_N = sizes(batch, number_B)
    role_N = roles(batch, number_B)
    compared_N = compared(group_N, group_size, role_N, whole=global_norm)
    advantage_N = less_the_mean(reward_N, size_N, compared_N)
    if not norm_var:
        return on_actions(batch, advantage_N[number_B])
    if std_over == "tokens":
        return whitened(batch, on_actions(batch, advantage_N[number_B]), global_norm=True, norm_var=True)
    deviation_N = advantage_N
    if std_over == "rollout":
        compared_N = role_N
        deviation_N = less_the_mean(reward_N, size_N, compared_N)
    return on_actions(batch, (advantage_N / (deviation(deviation_N, compared_N) + 1e-6))[number_B])


@reads("groups", "parts", baseline=True)
def gdpo(batch: TokenBatch, *, part_NP: Tensor, weight_P: Tensor, group_size: int | None = None) -> Tensor:
    """Return the advantage of each trajectory, normalised part by part of its reward, on each of its action tokens.

    GDPO, group reward-decoupled normalization (arXiv 2601.05242): the sums of `decoupled`, divided by their deviation
    over the whole rollout plus 1e-6 (equation 6, n - 1 in the denominator). Equation 6 also subtracts their mean, which
    is 0 in every group.

    `part_NP` has the parts of each trajectory in float64, in the order of `trajectory_B`. `group_size` is as in
    `reinforce`.
    """
    _, group_N, number_B = by_trajectory(batch)
    assert len(part_NP) == len(group_N), "every trajectory has a sequence"
    sum_N = decoupled(part_NP, weight_P, compared(group_N, group_size, torch.zeros_like(group_N)))
    return on_actions(batch, (sum_N / (deviation(sum_N, torch.zeros_like(group_N)) + 1e-6))[number_B])


def decoupled(part_NP: Tensor, weight_P: Tensor, group_N: Tensor) -> Tensor:
    """Return the weighted sum of the parts, each minus the mean of its group and divided by its deviation there, [N].

    Equations 4, 5 and 7 of GDPO (arXiv 2601.05242), in float64. `group_N` numbers the groups from 0. Deviations have
    n - 1 in the denominator. The scale of a part has no effect. The sum is exactly 0 where the parts are equal in a
    group or cancel.
    """
    sum_N, size_N = part_NP.new_zeros(len(group_N)), part_NP.new_zeros(len(group_N))
    for value_N, weight in zip(part_NP.unbind(1), weight_P, strict=True):
        advantage_N = less_the_mean(value_N, value_N.abs(), group_N)
        std_N = deviation(advantage_N, group_N)
        term_N = weight * torch.where(std_N > 0, advantage_N / std_N, 0.0)
        sum_N, size_N = sum_N + term_N, size_N + term_N.abs()
    return sum_N.masked_fill(sum_N.abs() <= ROUNDING * size_N, 0.0)


@reads("rewards", "groups", baseline=True)
def rloo(batch: TokenBatch, *, group_size: int | None = None) -> Tensor:
    """Return the total reward of the trajectory minus the mean of its group's others, on each of its action tokens.

    REINFORCE leave-one-out (arXiv 2402.14740). With groups of one member the others are the rest of the rollout, of
    the same role.
    `group_size` is as in `reinforce`.
    """
    reward_N, group_N, number_B = by_trajectory(batch)
    group_N = compared(group_N, group_size, roles(batch, number_B))
    count_N = torch.bincount(group_N)[group_N]
    # R - (sum - R) / (n - 1) = n / (n - 1) (R - mean)
    advantage_N = less_the_mean(reward_N, sizes(batch, number_B), group_N) * count_N / (count_N - 1).clamp(min=1)
    return on_actions(batch, advantage_N[number_B])


@reads("rewards", "means")
def rae(batch: TokenBatch, *, mean_N: Tensor) -> Tensor:
    """Return the total reward of the trajectory minus the running mean of its role, on each of its action tokens, [T].

    Role-conditioned advantage estimation of SPIRAL (arXiv 2506.24119). `mean_N` is the mean from before
    this rollout (`batch/role_means.py`), in float64 and in the order of `trajectory_B`. So no trajectory is in its own
    baseline, and the order of trajectories has no effect; SPIRAL subtracts the mean with the trajectory in it.
    """
    reward_N, _, number_B = by_trajectory(batch)
    assert len(mean_N) == len(reward_N), "every trajectory has a sequence"
    return on_actions(batch, (reward_N - mean_N)[number_B])


@reads("rewards", "greedy")
def remax(batch: TokenBatch, *, greedy_N: Tensor) -> Tensor:
    """Return the total reward of the trajectory minus that of a greedy response, on each of its action tokens, [T].

    ReMax (arXiv 2310.10505, algorithm 1). `greedy_N` is the reward of the greedy response of the same weights to the
    prompt of each trajectory, in float64 and in the order of `trajectory_B`. It does not depend on the sampled tokens,
    so the expected gradient is that of REINFORCE, also with one response for each prompt.
    """
    reward_N, _, number_B = by_trajectory(batch)
    assert len(greedy_N) == len(reward_N), "every trajectory has a sequence"
    return on_actions(batch, (reward_N - greedy_N)[number_B])


@reads("rewards", "values")
def gae(batch: TokenBatch, *, gamma: Share = 1.0, lamda: Share = 1.0) -> Tensor:
    """Return generalised advantage estimates (arXiv 1506.02438) with the critic's `value_T`, at each action token, [T].

    A_t = d_t + gamma lamda A_(t+1), d_t = r_t + gamma V_(t+1) - V_t. Step t + 1 is the next action token of the
    trajectory: tokens of the environment are no steps, and the sequences of a trajectory follow each other. V and A
    are 0 after the last action. A reward at a token that is no action belongs to the last action before it. The target
    of the critic is A_t + V_t.
    """
    assert batch.value_T is not None
    steps = by_step(batch)
    # with 0 after the end: there deltas, and so advantages, are 0
    value_SN = steps.of(batch.value_T)
    advantage_SN = steps.reward_SN - value_SN
    advantage_SN[:-1] += gamma * value_SN[1:]
    for step in range(len(advantage_SN) - 2, -1, -1):
        advantage_SN[step] += gamma * lamda * advantage_SN[step + 1]
    return steps.on_actions(advantage_SN)


@reads("branches", baseline=True)
def branch(batch: TokenBatch) -> Tensor:
    """Return the estimated value of the next place minus that of the last one, at each action token, [T].

    The values are means over continuations of the response that begin at these places (credit/branches.py), as in
    VinePPO (arXiv 2410.01679, equation 5) and SPO (2505.23564).
    """
    assert batch.before_T is not None and batch.after_T is not None
    return (batch.after_T - batch.before_T) * batch.action_T


@dataclass(frozen=True)
class Steps:
    """The actions of a rollout by trajectory and step: row s of a tensor [S, N] has action s of each trajectory.

    There is one row more than the longest trajectory has actions; values after the end of a trajectory are 0.
    """

    action_A: Tensor
    """Position of each action."""
    place_A: Tensor
    """Its number within its trajectory."""
    number_A: Tensor
    """Number of its trajectory."""
    reward_SN: Tensor
    """Rewards; one at a token that is no action belongs to the last action before it."""
    num_positions: int

    def of(self, x_T: Tensor) -> Tensor:
        """Return the values of the actions, [S, N]."""
        x_SN = x_T.new_zeros(self.reward_SN.shape)
        x_SN[self.place_A, self.number_A] = x_T[self.action_A]
        return x_SN

    def on_actions(self, x_SN: Tensor) -> Tensor:
        """Return the values at the positions of the actions and 0 elsewhere, [T]."""
        values_A = x_SN[self.place_A, self.number_A]
        return x_SN.new_zeros(self.num_positions).index_copy_(0, self.action_A, values_A)


def by_step(batch: TokenBatch) -> Steps:
    """Return the actions of each trajectory in order; its sequences follow each other."""
    number_B = batch.trajectory_B.unique(return_inverse=True)[1]
    number_T, position_T = number_B[batch.sequence_T].sort(stable=True)
    is_action_T = batch.action_T[position_T]
    length_N = torch.zeros(int(number_B.max()) + 1, dtype=torch.long, device=number_B.device)
    length_N.index_add_(0, number_T, is_action_T.long())
    # index of the last action up to each token, within its trajectory; -1 before the first
    place_T = is_action_T.cumsum(0) - 1 - (length_N.cumsum(0) - length_N)[number_T]
    reward_SN = batch.reward_T.new_zeros(int(length_N.max()) + 1, len(length_N))
    begun_T = place_T >= 0
    earned = batch.reward_T[position_T][begun_T]
    reward_SN.index_put_((place_T[begun_T], number_T[begun_T]), earned, accumulate=True)
    action_A, place_A, number_A = (x[is_action_T] for x in (position_T, place_T, number_T))
    return Steps(action_A, place_A, number_A, reward_SN, len(batch.labels_T))


def whitened(batch: TokenBatch, advantage_T: Tensor, *, global_norm: bool, norm_var: bool) -> Tensor:
    """Return normalised advantages, [T], computed in float64.

    `global_norm` subtracts their mean over the action tokens of the whole rollout. `norm_var` divides by their standard
    deviation there, with n - 1 in its denominator.
    """
    if not batch.action_T.any():
        return advantage_T
    values_T = advantage_T.double()
    actions = values_T[batch.action_T]
    mean = actions.mean()
    variance = (actions - mean).square().sum() / max(1, len(actions) - 1)
    if global_norm:
        values_T = values_T - mean
    if norm_var:
        values_T = values_T / (variance + 1e-8).sqrt()
    return (values_T * batch.action_T).to(advantage_T.dtype)


@reads("rewards")
def spo(batch: TokenBatch) -> Tensor:
    """Return the total reward of the trajectory on each of its action tokens: no baseline, no normalisation, [T]."""
    reward_N, _, number_B = by_trajectory(batch)
    return on_actions(batch, reward_N[number_B])


def reward_of_sequences(batch: TokenBatch) -> Tensor:
    """Return the total reward of the trajectory that each sequence belongs to, float64 [B].

    It is exactly 0 where the rewards cancel up to rounding, as in `Trajectory.reward`. Above 0, the trajectory is
    correct.
    """
    reward_N, _, number_B = by_trajectory(batch)
    return torch.where(reward_N.abs() > ROUNDING * sizes(batch, number_B), reward_N, 0.0)[number_B]


def by_trajectory(batch: TokenBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Return reward, float64 [N], and group [N] of each trajectory, and the trajectory of each sequence, [B].

    N counts the trajectories of `batch`, in the order of `trajectory_B`.
    """
    ids, number_B = batch.trajectory_B.unique(return_inverse=True)
    reward_T = batch.reward_T.double()
    reward_N = reward_T.new_zeros(len(ids)).index_add_(0, number_B[batch.sequence_T], reward_T)
    group_N = torch.zeros_like(ids).index_copy_(0, number_B, batch.group_B)
    return reward_N, group_N, number_B


def sizes(batch: TokenBatch, number_B: Tensor) -> Tensor:
    """Return the sum of the absolute rewards of each trajectory, float64 [N]."""
    size_T = batch.reward_T.double().abs()
    return size_T.new_zeros(int(number_B.max()) + 1).index_add_(0, number_B[batch.sequence_T], size_T)


def compared(group_N: Tensor, group_size: int | None, role_N: Tensor, whole: bool = False) -> Tensor:
    """Return which trajectories are compared, numbered from 0.

    They are those of a group, or those of a role if groups have one member.
    """
    names, number_N = group_N.unique(return_inverse=True)
    are_single = len(names) == len(number_N) if group_size is None else group_size == 1
    return role_N if whole or are_single else number_N


def roles(batch: TokenBatch, number_B: Tensor) -> Tensor:
    """Return the role of each trajectory, numbered from 0, [N]."""
    role_N = number_B.new_zeros(int(number_B.max()) + 1)
    if batch.role_B is not None:
        role_N = role_N.index_copy_(0, number_B, batch.role_B).unique(return_inverse=True)[1]
    return role_N


def less_the_mean(reward_N: Tensor, size_N: Tensor, group_N: Tensor) -> Tensor:
    """Return the reward minus the mean of its group, exactly 0 where they differ only by rounding, [N]."""
    largest = size_N.new_zeros(int(group_N.max()) + 1).scatter_reduce_(0, group_N, size_N, "amax")
    advantage_N = reward_N - group_mean(reward_N, group_N)
    return advantage_N.masked_fill(advantage_N.abs() <= ROUNDING * largest[group_N], 0.0)


def deviation(deviation_N: Tensor, group_N: Tensor) -> Tensor:
    """Return the standard deviation of each trajectory's group, given the deviations from its mean, [N]."""
    count_N = torch.bincount(group_N)[group_N]
    variance_N = group_mean(deviation_N.square(), group_N) * count_N / (count_N - 1).clamp(min=1)
    return variance_N.sqrt()


def group_mean(x_N: Tensor, group_N: Tensor) -> Tensor:
    """Return the mean of each trajectory's group, [N]."""
    size = int(group_N.max()) + 1
    sums = x_N.new_zeros(size).index_add_(0, group_N, x_N)
    return (sums / torch.bincount(group_N, minlength=size))[group_N]


def on_actions(batch: TokenBatch, advantage_B: Tensor) -> Tensor:
    """Return the advantage of each sequence at its actions and 0 elsewhere, in the dtype of the rewards, [T]."""
    return (advantage_B[batch.sequence_T] * batch.action_T).to(batch.reward_T.dtype)
