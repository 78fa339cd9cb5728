"""Everything that an update reads beside the sampled tokens: log-probabilities, values, advantages."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any

import torch
from torch import Tensor

from RL2.batch.advantages import by_trajectory, whitened
from RL2.batch.packing import part_rewards
from RL2.batch.registry import configured as estimator_of
from RL2.batch.role_means import RoleMeans
from RL2.config.programs import RLConfig
from RL2.credit.branches import with_branches
from RL2.io.progress import Progress
from RL2.objectives.loss import kl_estimate, overlong_penalty
from RL2.objectives.registry import reads_old_policy
from RL2.rollout.hints import ChosenTeachers, Hints
from RL2.types import TokenBatch, Trajectory
from RL2.workers.actor import Actor, Reference
from RL2.workers.critic import Critic


def annotate(
    batch: TokenBatch,
    trajectories: Seq[Trajectory],
    *,
    config: RLConfig,
    actor: Actor,
    reference: Reference | None,
    critic: Critic | None = None,
    role_means: RoleMeans | None = None,
    progress: Progress | None = None,
    hints: Hints | None = None,
    chosen: ChosenTeachers | None = None,
) -> TokenBatch:
    """Return `batch` with what an update reads: old and reference log-probabilities, values, returns, advantages.

    `trajectories` are those that were packed into `batch`; estimators that read parts of rewards or means of roles,
    hints for a teacher, and the choice of one need them. The rewards are added to `role_means`.
    """
    if estimator_of(config.adv).needs_branches:
        batch = with_branches(batch, trajectories)
    progress, number = progress or Progress(speaks=False), batch.num_sequences
    if hints is not None:
        batch = batch.with_(told=hints.told(trajectories))
    if chosen is not None:
        teacher_B = chosen.numbers(trajectories)[batch.trajectory_B]
        batch = batch.with_(teacher_B=teacher_B, told=batch.told and batch.told.with_(teacher_B=teacher_B))
    kl, adv = config.actor.kl, config.adv
    kl_in_advantage = reference is not None and kl.type != "loss"
    estimator = estimator_of(adv)
    reads_old = reads_old_policy(config.actor) or estimator.needs_old_policy
    if config.actor.update_per_rollout > 1 or kl_in_advantage or reads_old:
        with progress.phase("log-probabilities before the update", number, "sequences") as phase:
            batch = actor.add_old_logprobs(batch, phase.update, sum_p2=estimator.needs_old_policy)
    if reference is not None:
        with progress.phase("log-probabilities of the reference", number, "sequences") as phase:
            batch = batch.with_(ref_logp_T=reference.logp(batch, phase.update))

    # costs act on the advantages only: which sequences are correct is what the environment says
    reward_T, cost_T = batch.reward_T, torch.zeros_like(batch.reward_T)
    if kl_in_advantage:
        assert batch.old_logp_T is not None and batch.ref_logp_T is not None
        cost_T = kl.coef * kl_estimate(batch.old_logp_T, batch.ref_logp_T, kl.used_estimator) * batch.action_T
    if kl.type == "reward":
        reward_T, cost_T = reward_T - cost_T, torch.zeros_like(cost_T)
    inputs: dict[str, Any] = {"group_size": config.train_data.responses_per_prompt}
    if "parts" in estimator.estimator.reads:
        inputs |= parts_of_rewards(batch, trajectories, config)
    if adv.overlong_buffer:
        reward_T = reward_T - overlong(batch, config, adv.overlong_penalty)
    if "means" in estimator.estimator.reads:
        assert role_means is not None
        reward_N = by_trajectory(batch.with_(reward_T=reward_T))[0]
        inputs["mean_N"] = role_means.baseline([trajectory.role for trajectory in trajectories], reward_N)
    if estimator.needs_greedy:
        greedy = [trajectory.greedy_reward for trajectory in trajectories]
        inputs["greedy_N"] = torch.tensor(greedy, dtype=torch.float64, device=reward_T.device)
    if estimator.needs_critic:
        assert critic is not None
        with progress.phase("values of the critic", number, "sequences") as phase:
            batch = batch.with_(value_T=critic.values(batch, phase.update))
    advantage_T = estimator.advantages(batch.with_(reward_T=reward_T), inputs)
    if batch.value_T is not None:
        batch = batch.with_(return_T=advantage_T + batch.value_T)
        advantage_T = whitened(batch, advantage_T, global_norm=adv.global_norm, norm_var=adv.norm_var)
    return batch.with_(advantage_T=advantage_T - cost_T)


def parts_of_rewards(batch: TokenBatch, trajectories: Seq[Trajectory], config: RLConfig) -> dict[str, Tensor]:
    """Return the parts of the rewards and their weights; a penalty for length is one more part."""
    part_NP, weight_P = part_rewards(trajectories, config.reward.weights)
    if config.adv.overlong_buffer:
        cost_T = overlong(batch, config, penalty=1.0).double()
        cost_N = part_NP.new_zeros(len(trajectories)).index_add_(0, batch.trajectory_B[batch.sequence_T], cost_T)
        part_NP = torch.cat([part_NP, cost_N[:, None]], 1)
        weight_P = torch.cat([weight_P, weight_P.new_tensor([-config.adv.overlong_penalty])])
    return {"part_NP": part_NP, "weight_P": weight_P}


def overlong(batch: TokenBatch, config: RLConfig, penalty: float) -> Tensor:
    """Return the penalty of each response for its length, at its last token, [T]."""
    limit = config.rollout.train_sampling_params.max_new_tokens
    return overlong_penalty(batch, max_new_tokens=limit, buffer=config.adv.overlong_buffer, penalty=penalty)
