"""Terms that are added around every objective: KL to the reference, importance weight, entropy, length penalty."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from RL2.batch.packing import loss_weights
from RL2.batch.selection import covariance_rank
from RL2.config.model import Actor
from RL2.objectives.closed_forms import bounded
from RL2.objectives.masks import masks
from RL2.objectives.objective import Loss
from RL2.objectives.ratios import sequence_mean, sequence_sum
from RL2.objectives.registry import BoundObjective, find
from RL2.types import StatsRequest, TokenBatch, TokenStats

Estimator = Literal["k1", "k2", "k3", "exact"]
"""Values of `actor.kl.estimator`; `exact` is a statistic and no function of log-probabilities."""


def wanted_stats(config: Actor, objective: BoundObjective) -> StatsRequest:
    """Return the statistics of an update: the objective's, what is reported, and an exact KL to the reference."""
    request = objective.request(config.temperature)
    fields = (*request.fields, *(("kl_student_teacher",) if config.kl.is_exact else ()))
    return replace(request, fields=tuple(dict.fromkeys(fields)), budget_mib=config.logits_budget_mib)


def kl_estimate(logp_T: Tensor, ref_logp_T: Tensor, estimator: Estimator) -> Tensor:
    """Return an estimate of KL(policy || reference) at each sampled token (Schulman, "Approximating KL divergence").

    With d = log p_ref - log p: k1 = -d (unbiased), k2 = d^2 / 2 (biased), k3 = e^d - 1 - d (unbiased and never
    negative). In the loss, the expected gradient over p is 0 for k1, the gradient of KL(policy || reference) for k2,
    and that of KL(reference || policy) for k3. As a constant in a reward or advantage, k1 gives the gradient of
    KL(policy || reference); k2 and k3 give one of second order in d.
    """
    assert estimator != "exact"
    d_T = ref_logp_T - logp_T
    if estimator == "k1":
        return -d_T
    if estimator == "k2":
        return d_T.square() / 2
    return torch.expm1(bounded(d_T)) - d_T


def kl_in_the_loss(
    logp_T: Tensor,
    sampled_logp_T: Tensor,
    ref_logp_T: Tensor,
    estimator: Estimator,
    *,
    weighted: bool,
) -> Tensor:
    """Return the KL term of each token: `kl_estimate`, multiplied by r = p / p_old if `weighted`.

    `sampled_logp_T` is log p_old, under the policy that sampled the token. With the weight, k2 (r constant) and k3 (r
    not constant, as in TRL's `use_bias_correction_kl`) have the gradient r (log p - log p_ref) dlog p. Its mean over
    p_old is the gradient of KL(policy || reference).
    """
    kl_T = kl_estimate(logp_T, ref_logp_T, estimator)
    if not weighted:
        return kl_T
    ratio_T = bounded(logp_T - sampled_logp_T).exp()
    return kl_T * (ratio_T if estimator == "k3" else ratio_T.detach())


def importance_weight(
    logp_T: Tensor,
    batch: TokenBatch,
    *,
    cap: float,
    level: Literal["token", "sequence", "geometric"],
    mode: Literal["truncate", "mask"],
    low: float = 0.0,
) -> Tensor:
    """Return p / p_engine, without gradient: it corrects for the small difference between trainer and engine.

    `logp_T` is the trainer's log-probability under the old policy. `level=sequence` takes the ratio of the whole
    sequence, the product over its actions, at each of them, and `geometric` its geometric mean. A ratio outside
    [low, cap] becomes the bound (`truncate`, truncated importance sampling, Ionides 2008) or 0 (`mask`; on tokens, from
    both sides, this is IcePop, arXiv 2510.18855).
    """
    assert batch.engine_logp_T is not None
    log_ratio_T = logp_T.detach() - batch.engine_logp_T
    if level != "token":
        log_ratio_T = (sequence_sum if level == "sequence" else sequence_mean)(log_ratio_T, batch)
    ratio_T = log_ratio_T.exp()  # may be inf for a long sequence; multiplied by 0 that would be NaN
    if mode == "truncate":
        return ratio_T.clamp(min=low, max=cap)
    return ratio_T.masked_fill((ratio_T > cap) | (ratio_T < low), 0.0)


def overlong_penalty(batch: TokenBatch, *, max_new_tokens: int, buffer: int, penalty: float) -> Tensor:
    """Return the penalty of each response for its length, at the last action of its sequence, [T].

    DAPO's soft overlong punishment (arXiv 2503.14476, equation 13): 0 up to `max_new_tokens - buffer` tokens, then
    rising linearly to `penalty` at `max_new_tokens`.
    """
    sequence_T, action_T = batch.sequence_T, batch.action_T
    tokens_B = torch.zeros_like(batch.lengths_B).index_add_(0, sequence_T, action_T.long())
    cost_B = penalty * ((tokens_B - (max_new_tokens - buffer)) / buffer).clamp(0, 1)
    number_T = action_T.long().cumsum(0)
    last_B = torch.zeros_like(tokens_B).scatter_reduce_(0, sequence_T, number_T, "amax")
    return cost_B[sequence_T] * (action_T & (number_T == last_B[sequence_T]))


def with_weights(batch: TokenBatch, config: Actor) -> TokenBatch:
    """Return the global minibatch of one optimizer step with its weights.

    With `regularize_on=all` every action has the weight of an average over all actions. `objective_factor_T` is then
    the factor from this weight to that of the objective; it is 0 at tokens that do not train. Ranks of covariances are
    added for an objective that reads them.
    """
    weight_T = loss_weights(
        batch,
        train_on=config.train_on,
        level=config.avg_level,
        average_over=config.average_over,
        length=config.avg_length,
        entropy_quantile=config.select.entropy_quantile,
        not_mode=config.select.not_mode,
        on_policy=config.select.on_policy,
        not_truncated=config.select.not_truncated,
        second_moment=config.select.second_moment,
        covariance_share=config.select.covariance_share,
        covariance_low=config.select.covariance_low,
        covariance_high=config.select.covariance_high,
    )
    if find(config.objective).covariance:
        batch = batch.with_(covariance_rank_T=covariance_rank(batch, weight_T > 0))
    if config.regularize_on == "kept":
        return batch.with_(weight_T=weight_T)
    all_T = loss_weights(batch, train_on="all", level=config.avg_level, average_over="all", length=config.avg_length)
    return batch.with_(weight_T=all_T, objective_factor_T=torch.where(all_T > 0, weight_T / all_T, 0.0))


def total_loss(stats: TokenStats, batch: TokenBatch, config: Actor, objective: BoundObjective) -> Loss:
    """Return the loss of each token, [T], with importance weight, KL to the reference and entropy; and the metrics."""
    logp_T, entropy_T = stats.logp, stats.entropy
    loss_T, metrics = objective.loss(stats, batch)
    # log-probability under the old policy
    arrived_T = logp_T.detach() if batch.old_logp_T is None else batch.old_logp_T
    if config.tis_coef > 0:
        weight_T = importance_weight(
            arrived_T, batch, cap=config.tis_coef, level=config.tis_level, mode=config.tis_mode, low=config.tis_low
        )
        loss_T, metrics = loss_T * weight_T, metrics | {"importance_weight": weight_T}
    for name, mask_T in masks(logp_T, arrived_T, batch, config.masks):
        loss_T, metrics = loss_T * mask_T, metrics | {f"masked_{name}": 1 - mask_T}
    if batch.objective_factor_T is not None:
        loss_T = loss_T * batch.objective_factor_T
    if batch.ref_logp_T is not None:
        kl = config.kl
        metrics = metrics | {"kl": kl_estimate(logp_T, batch.ref_logp_T, kl.used_estimator)}
        if kl.type == "loss":
            sampled_T = arrived_T
            if batch.age_T is not None:  # older weights sampled it; only the engine has their log-probability
                assert batch.engine_logp_T is not None
                sampled_T = torch.where(batch.age_T > 0, batch.engine_logp_T, arrived_T)
            loss_T = loss_T + kl.coef * kl_in_the_loss(
                logp_T, sampled_T, batch.ref_logp_T, kl.used_estimator, weighted=kl.importance_weight
            )
    if config.kl.is_exact:
        metrics = metrics | {"kl": stats.kl_student_teacher}
        loss_T = loss_T + config.kl.coef * stats.kl_student_teacher
    if config.entropy.coef != 0:
        loss_T = loss_T - config.entropy.coef * entropy_T
    if "max_logp" in vars(stats):
        metrics = metrics | {"p_max": stats.max_logp.detach().exp()}
    return loss_T, metrics | {"entropy": entropy_T}


def by_token(stats: TokenStats, actions: TokenBatch, config: Actor, objective: BoundObjective) -> tuple[Tensor, Tensor]:
    """Return loss_T, and how the loss of the step changes with the log-probability of each action; both [T], detached.

    `actions` is a batch of actions with `weight_T`. The second tensor is the derivative of -(loss_T * weight_T).sum()
    with respect to logp: how much the loss falls as the log-probability of the sampled token rises. log(1 - p) changes
    with it, and the other statistics are held constant.
    """
    assert actions.weight_T is not None
    logp_T = stats.logp.detach().clone().requires_grad_()
    leaves = vars(stats) | {"logp": logp_T}
    if "log1mp" in leaves:
        # the given value, with the slope of log(1 - exp(logp))
        slope_T = -bounded(logp_T.detach() - stats.log1mp).exp()
        leaves["log1mp"] = stats.log1mp + slope_T * (logp_T - logp_T.detach())
    loss_T, _ = total_loss(TokenStats(**leaves), actions, config, objective)
    loss = (loss_T * actions.weight_T).sum()
    if not loss.requires_grad:
        return loss_T, torch.zeros_like(loss_T)
    (gradient_T,) = torch.autograd.grad(loss, logp_T, allow_unused=True, materialize_grads=True)
    return loss_T.detach(), -gradient_T
