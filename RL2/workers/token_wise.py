"""Finding out whether a loss is token-wise, so that its gradient can be taken in the forward pass (ops/one_pass.py)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from RL2.models.policy import Policy
from RL2.ops.one_pass import Expected, TileLoss, unmet
from RL2.ops.teacher_stats import reference_teacher_stats
from RL2.types import StatsRequest, TokenBatch, TokenStats
from RL2.workers.metrics import LossFunction, Metric

WORTH = 2**28
"""Multiplications of hidden states and head (tokens times vocabulary times hidden size) from which it saves time."""


class TokenWise:
    """Knowledge of one loss: whether its slopes at a token depend on the statistics of that token alone.

    It is found out on the first microbatch that is large enough, with made-up statistics, so that a run that is resumed
    computes in the same way from its first step on. If a quarter of the tokens of a microbatch have other slopes than
    expected, the loss no longer counts as token-wise. Gradients are the same in either case, up to rounding.
    """

    def __init__(self, model: Policy, worth: int = WORTH) -> None:
        """Start without knowledge of the loss of `model`. `worth` is the smallest size, as `WORTH`."""
        sizes = model.lm.config
        self.size_of_token, self.worth = sizes.vocab_size * sizes.hidden_size, worth
        self.holds: bool | None = None
        """None: not known yet."""

    def expected(self, loss: LossFunction, actions: TokenBatch, request: StatsRequest) -> Expected | None:
        """Return the loss to expect of a microbatch of `actions`; None if the backward pass has to find it out."""
        if not self._is_worth_it(actions):
            return None
        part = of_part(loss, actions)
        if self.holds is None and len(actions.labels_T) > 1:
            self.holds = is_token_wise(part, made_up(actions, request))
        return Expected(part) if self.holds else None

    def learn(self, expected: Expected | None, actions: TokenBatch) -> None:
        """Take note of a microbatch after its backward pass; processes of a tensor-parallel group learn the same."""
        if expected is not None:
            self.holds = 4 * expected.missed <= len(actions.labels_T)

    def _is_worth_it(self, actions: TokenBatch) -> bool:
        # on a GPU, where tiles may be larger, it has not been measured
        is_cpu = actions.labels_T.device.type == "cpu"
        return is_cpu and len(actions.labels_T) * self.size_of_token >= self.worth


def weighted_loss(loss: LossFunction, stats: TokenStats, actions: TokenBatch) -> tuple[Tensor, Mapping[str, Metric]]:
    """Return the sum of the weighted losses of all actions, imitation included, and the metrics of the loss."""
    assert actions.weight_T is not None
    loss_T, metrics = loss(stats, actions)
    total = (loss_T * actions.weight_T).sum()
    if actions.imitation_weight_T is not None:
        total = total - (stats.logp * actions.imitation_weight_T).sum()
    return total, metrics


def of_part(loss: LossFunction, actions: TokenBatch) -> TileLoss:
    """Return the weighted loss of some of the actions, as if there were no others."""

    def part(stats: TokenStats, index_C: Tensor) -> Tensor:
        keep_A = torch.zeros_like(actions.labels_T, dtype=torch.bool).index_fill_(0, index_C, True)
        return weighted_loss(loss, stats, actions.positions(keep_A))[0]

    return part


def made_up(actions: TokenBatch, request: StatsRequest) -> TokenStats:
    """Return statistics of random distributions in which the tokens are about as likely as when they were sampled."""
    number, vocabulary = len(actions.labels_T), max(64, 2 * request.top_k)
    generator = torch.Generator().manual_seed(0)
    z_AV, teacher_z_AV = (2 * torch.randn(number, vocabulary, generator=generator) for _ in range(2))
    labels_A = actions.labels_T.cpu() % vocabulary
    known_A = actions.engine_logp_T if actions.old_logp_T is None else actions.old_logp_T
    if known_A is not None:
        near_A = known_A.cpu() + 0.01 * torch.randn(number, generator=generator)
        p_A = near_A.exp().clamp(1e-4, 1 - 1e-4)
        rest_A = z_AV.scatter(1, labels_A[:, None], -torch.inf).logsumexp(-1)
        z_AV = z_AV.scatter(1, labels_A[:, None], (rest_A + p_A.log() - torch.log1p(-p_A))[:, None])
    made = reference_teacher_stats(z_AV, teacher_z_AV, labels_A, request.fields, request.top_k, request.beta)
    return made.map(lambda x: x.to(actions.labels_T.device))


def is_token_wise(loss: TileLoss, stats: TokenStats) -> bool:
    """Return whether the slopes are the same if every other token is missing, for these statistics."""
    index_A = torch.arange(len(next(iter(vars(stats).values()))))
    expected, found = Expected(loss), []
    try:
        whole = expected.slopes(vars(stats), index_A)
        for index_C in (index_A[::2], index_A[1::2]):
            part = expected.slopes({name: x[index_C] for name, x in vars(stats).items()}, index_C)
            found.append(unmet({name: x[index_C] for name, x in whole.items()}, part))
    except Exception:  # a loss that needs whole sequences
        return False
    return not any(bool((x != 0).any()) for rest in found for x in rest.values())
