"""Losses on pairs of a chosen and a rejected response. A pair is a group; the chosen response has reward 1.

The loss of a pair is at every token of both sequences, and `packing.sequence_weights` gives half its weight to the last
token of each, so a pair counts once. The metrics are also those of the pair, so their mean is over pairs. A sequence
without its partner has a finite loss: an idle process runs on one, with weight 0.

Notation: m is the margin of a pair, s(m) = 1 / (1 + exp(-m)), d/dx_c and d/dx_r the derivatives of its loss with
respect to what the chosen and the rejected sequence contribute.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from RL2.objectives.objective import Loss, needs
from RL2.types import TokenBatch, TokenStats


class _Pairs:
    """The partner of every sequence of a batch."""

    def __init__(self, batch: TokenBatch) -> None:
        self.batch = batch
        self.chosen_B = self.sum(batch.reward_T) > 0
        groups, self.pair_B = batch.group_B.unique(return_inverse=True)
        self.number = len(groups)

    def sum(self, x_T: Tensor) -> Tensor:
        """Sum over the actions of each sequence, [B]."""
        return x_T.new_zeros(self.batch.num_sequences).index_add(0, self.batch.sequence_T, x_T)

    def of_pair(self, x_B: Tensor) -> Tensor:
        """Sum over both sequences of the pair of each sequence, [B]."""
        return x_B.new_zeros(self.number).index_add(0, self.pair_B, x_B)[self.pair_B]

    def margin(self, x_B: Tensor) -> Tensor:
        """Return x of the chosen minus x of the rejected response, [B]."""
        return self.of_pair(torch.where(self.chosen_B, x_B, -x_B))

    def at_tokens(self, loss_B: Tensor, **metrics_B: Tensor) -> Loss:
        """Return loss and metrics of each sequence at each of its tokens, [T]."""
        place_T = self.batch.sequence_T
        return loss_B[place_T], {name: x_B.detach()[place_T] for name, x_B in metrics_B.items()}


def bradley_terry(stats: TokenStats, batch: TokenBatch) -> Loss:
    """Return -log s(m), m = r_c - r_r, with r the value at the last token of a sequence.

    Bradley and Terry 1952; as a loss of reward models, Ouyang et al. 2022 (arXiv 2203.02155), equation 1. Gradient:
    d/dr_c = -s(-m), d/dr_r = s(-m). It has no minimum: m grows without bound. Every sequence has exactly one action.
    """
    pairs = _Pairs(batch)
    margin_B = pairs.margin(stats.value)
    return pairs.at_tokens(-F.logsigmoid(margin_B), margin=margin_B, accuracy=(margin_B > 0).float())


def _rewards(stats: TokenStats, batch: TokenBatch) -> Tensor:
    """Return log(p / p_ref) of each action token, [T]."""
    assert batch.ref_logp_T is not None
    return stats.logp - batch.ref_logp_T


def _reported(pairs: _Pairs, reward_B: Tensor) -> dict[str, Tensor]:
    margin_B = pairs.margin(reward_B)
    return {
        "margin": margin_B,
        "accuracy": (margin_B > 0).float(),
        "reward_chosen": pairs.of_pair(reward_B * pairs.chosen_B),
        "reward_rejected": pairs.of_pair(reward_B * ~pairs.chosen_B),
    }


@needs("logp")
def dpo(stats: TokenStats, batch: TokenBatch, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Loss:
    """Return -(1 - e) log s(m) - e log s(-m), m = beta (h_c - h_r), h the sum of log p - log p_ref over the response.

    DPO (arXiv 2305.18290, equation 7). e is the label smoothing: above 0 it is the conservative form of the authors'
    code, where a label is wrong with probability e. Gradient: d/dh_c = -beta (s(-m) - e), d/dh_r = beta (s(-m) - e).
    Zero at s(m) = 1 - e, so with e = 0 never. beta h is the implicit reward; without a reference, ref_logp_T is 0.
    """
    pairs = _Pairs(batch)
    reward_B = beta * pairs.sum(_rewards(stats, batch))
    margin_B = pairs.margin(reward_B)
    loss_B = -(1 - label_smoothing) * F.logsigmoid(margin_B) - label_smoothing * F.logsigmoid(-margin_B)
    return pairs.at_tokens(loss_B, **_reported(pairs, reward_B))


@needs("logp")
def ipo(stats: TokenStats, batch: TokenBatch, *, beta: float = 0.1) -> Loss:
    """Return (h_c - h_r - 1 / (2 beta))^2, h the mean over the response's tokens of log p - log p_ref.

    IPO (arXiv 2310.12036, equation 17, beta its tau). The paper writes h as a sum; according to its authors their
    results used the mean, which does not grow with the length. Gradient: d/dh_c = 2 (h_c - h_r - 1 / (2
    beta)), d/dh_r the negative. Zero at h_c - h_r = 1 / (2 beta). The metrics are those of `dpo`.
    """
    pairs = _Pairs(batch)
    reward_T = _rewards(stats, batch)
    h_B = pairs.sum(reward_T) / batch.lengths_B
    loss_B = (pairs.margin(h_B) - 1 / (2 * beta)).square()
    return pairs.at_tokens(loss_B, **_reported(pairs, beta * pairs.sum(reward_T)))
