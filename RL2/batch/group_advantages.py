"""Further baselines and weights of groups: advantages from the rewards of the responses to one prompt.

N counts the trajectories of the rollout. Statistics are float64. With groups of one member the group is the rollout.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from RL2.batch.advantages import (
    by_step,
    by_trajectory,
    compared,
    group_mean,
    less_the_mean,
    on_actions,
    roles,
    sizes,
)
from RL2.batch.estimator import reads
from RL2.config.values import Count, PositiveFloat
from RL2.types import ROUNDING, TokenBatch


@reads("rewards", "groups", baseline=True)
def maxrl(batch: TokenBatch, *, group_size: int | None = None) -> Tensor:
    """Return (R - mean) / mean over the group of the trajectory, on each of its action tokens, [T].

    Maximum likelihood reinforcement learning (arXiv 2602.02710, algorithm 1). With rewards of 0 and 1 it averages over
    the successful responses, which weighs a prompt by the inverse of its success rate. A group whose mean is not above
    0 has no advantage. `group_size` is as in `reinforce`.
    """
    reward_N, group_N, number_B = by_trajectory(batch)
    group_N, size_N = compared(group_N, group_size, roles(batch, number_B)), sizes(batch, number_B)
    mean_N, advantage_N = group_mean(reward_N, group_N), less_the_mean(reward_N, size_N, group_N)
    has_signal_N = mean_N > ROUNDING * group_mean(size_N, group_N)
    return on_actions(batch, torch.where(has_signal_N, advantage_N / mean_N.abs().clamp(min=1e-300), 0.0)[number_B])


@reads("rewards", "groups", baseline=True)
def opo(batch: TokenBatch, *, group_size: int | None = None) -> Tensor:
    """Return the total reward minus the mean of the group weighted by length, on each action token, [T].

    On-policy optimisation with the optimal reward baseline (arXiv 2505.23585): the weight of a response is its number
    of actions, which stands for the squared norm of its gradient. `group_size` is as in `reinforce`.
    """
    reward_N, group_N, number_B = by_trajectory(batch)
    group_N = compared(group_N, group_size, roles(batch, number_B))
    length_N = torch.zeros_like(reward_N).index_add_(0, number_B[batch.sequence_T], batch.action_T.to(reward_N.dtype))
    baseline_N = group_mean(length_N * reward_N, group_N) / group_mean(length_N, group_N).clamp(min=1e-300)
    return on_actions(batch, _unless_rounding(reward_N - baseline_N, batch, number_B, group_N)[number_B])


@reads("rewards", "groups", baseline=True)
def gpg(batch: TokenBatch, *, group_size: int | None = None) -> Tensor:
    """Return (R - mean of the group) N / (N - M), where M trajectories are in groups of equal rewards, [T].

    Group policy gradient (arXiv 2504.02546, equation 7): the factor makes up for responses without a gradient in the
    average. GPG is this estimator with `actor.objective=reinforce`. `group_size` is as in `reinforce`.
    """
    reward_N, group_N, number_B = by_trajectory(batch)
    group_N = compared(group_N, group_size, roles(batch, number_B))
    advantage_N = less_the_mean(reward_N, sizes(batch, number_B), group_N)
    informs_N = group_mean(advantage_N.abs(), group_N) > 0
    return on_actions(batch, (advantage_N * len(reward_N) / informs_N.sum().clamp(min=1))[number_B])


@reads("rewards", "groups", baseline=True)
def pass_at_k(batch: TokenBatch, *, k: Count = 4, group_size: int | None = None) -> Tensor:
    """Return the mean advantage of the k-subsets of the group that the trajectory is in, on each action token, [T].

    Pass@k training (arXiv 2508.10751, section 2.4): the reward of a subset is 1 if one of its members is correct, that
    is, has a total reward above 0, and its advantage is this minus the mean over all subsets, divided by their
    deviation. A group of fewer than k members has one subset. A group of which every or no subset is correct has no
    advantage. `group_size` is as in `reinforce`.
    """
    reward_N, group_N, number_B = by_trajectory(batch)
    group_N = compared(group_N, group_size, roles(batch, number_B))
    correct_N = reward_N > ROUNDING * sizes(batch, number_B)
    members, wrong = torch.bincount(group_N).tolist(), torch.bincount(group_N, weights=(~correct_N).double()).tolist()
    table_G2 = reward_N.new_tensor([_pass_at_k(n, int(m), min(k, n)) for n, m in zip(members, wrong, strict=True)])
    return on_actions(batch, table_G2[group_N, correct_N.long()][number_B])


def _pass_at_k(members: int, wrong: int, k: int) -> tuple[float, float]:
    """Return the advantages of a wrong and of a correct member, of which `wrong` of `members` are wrong."""
    mean = 1 - math.comb(wrong, k) / math.comb(members, k)
    if mean in (0, 1):
        return 0.0, 0.0
    deviation = math.sqrt(mean * (1 - mean))
    none_else = math.comb(wrong - 1, k - 1) / math.comb(members - 1, k - 1)
    return (1 - mean - none_else) / deviation, (1 - mean) / deviation


@reads("rewards", "groups", baseline=True)
def best_of_group(batch: TokenBatch, *, group_size: int | None = None) -> Tensor:
    """Return the lead of the best response of each group over the second, and 0 for the others, [T].

    The advantage of the expected maximum of the group (arXiv 2503.19595; verl's `grpo_passk` without deviation): pass@k
    with k the size of the group. A tie has no advantage. `group_size` is as in `reinforce`.
    """
    reward_N, group_N, number_B = by_trajectory(batch)
    group_N, lead_N = compared(group_N, group_size, roles(batch, number_B)), torch.zeros_like(reward_N)
    for group in range(int(group_N.max()) + 1):
        members = (group_N == group).nonzero()[:, 0]
        if len(members) > 1:
            best, place = reward_N[members].topk(2)
            lead_N[members[place[0]]] = best[0] - best[1]
    return on_actions(batch, _unless_rounding(lead_N, batch, number_B, group_N)[number_B])


@reads("rewards", "groups", baseline=True)
def soft_value(batch: TokenBatch, *, beta: PositiveFloat = 0.5, group_size: int | None = None) -> Tensor:
    """Return the total reward minus beta log(mean of exp(R / beta)) over the group, on each action token, [T].

    The subtracted number is the value of the prompt under the optimum of the reward with a KL divergence of weight beta
    (A*-PO, arXiv 2505.20686, with 0.5 in TRL; Kimi k1.5, 2501.12599). It goes to the mean of the group for a large
    beta and to its maximum for a small one. `group_size` is as in `reinforce`.
    """
    reward_N, group_N, number_B = by_trajectory(batch)
    group_N = compared(group_N, group_size, roles(batch, number_B))
    highest = reward_N.new_full((int(group_N.max()) + 1,), -math.inf).scatter_reduce_(0, group_N, reward_N, "amax")
    below_N = reward_N - highest[group_N]
    advantage_N = below_N - beta * group_mean((below_N / beta).exp(), group_N).log()
    return on_actions(batch, _unless_rounding(advantage_N, batch, number_B, group_N)[number_B])


@reads("rewards", "groups", "sum_p2", baseline=True)
def otb(batch: TokenBatch, *, group_size: int | None = None) -> Tensor:
    """Return the reward to come minus an optimal baseline for each token of a group, [T].

    The optimal token baseline (verl's `optimal_token_baseline`): at action t of a response the baseline is the mean of
    the rewards to come over the responses of the group with as many actions, weighted by W_t, the sum over actions up
    to t of 1 - 2 p_a + sum of p_i^2. This is the squared norm of the gradient of log p_a by the logits, so it stands
    for the energy of the gradient so far. Where all W_t are 0 the mean is not weighted. `group_size` is as in
    `reinforce`.
    """
    assert batch.old_logp_T is not None and batch.old_sum_p2_T is not None
    _, group_N, number_B = by_trajectory(batch)
    group_N, steps = compared(group_N, group_size, roles(batch, number_B)), by_step(batch)
    energy_T = 1 - 2 * batch.old_logp_T.double().exp() + batch.old_sum_p2_T.double()
    alive_SN = steps.of(torch.ones_like(energy_T))
    weight_SN = steps.of(energy_T.clamp(min=0)).cumsum(0) * alive_SN
    reward_SN = steps.reward_SN.double()
    to_come_SN = reward_SN.flip(0).cumsum(0).flip(0)

    def of_group(x_SN: Tensor) -> Tensor:
        """Return the sum over the group of each trajectory at each step."""
        sums = x_SN.new_zeros(len(x_SN), int(group_N.max()) + 1).index_add_(1, group_N, x_SN)
        return sums[:, group_N]

    weight_SN = torch.where(of_group(weight_SN) > 0, weight_SN, alive_SN)
    baseline_SN = of_group(weight_SN * to_come_SN) / of_group(weight_SN).clamp(min=1e-300)
    size_N = reward_SN.abs().sum(0)
    largest = size_N.new_zeros(int(group_N.max()) + 1).scatter_reduce_(0, group_N, size_N, "amax")
    advantage_SN = to_come_SN - baseline_SN
    advantage_SN = advantage_SN.masked_fill(advantage_SN.abs() <= ROUNDING * largest[group_N], 0.0)
    return steps.on_actions(advantage_SN).to(batch.reward_T.dtype)


def _unless_rounding(advantage_N: Tensor, batch: TokenBatch, number_B: Tensor, group_N: Tensor) -> Tensor:
    """Return the advantages, exactly 0 where they are the rounding error of the rewards of their group."""
    size_N = sizes(batch, number_B)
    largest = size_N.new_zeros(int(group_N.max()) + 1).scatter_reduce_(0, group_N, size_N, "amax")
    return advantage_N.masked_fill(advantage_N.abs() <= ROUNDING * largest[group_N], 0.0)
