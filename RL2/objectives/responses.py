"""Responses of a batch as units: what losses of preferences share. Shape letters: T tokens, B sequences, V vocabulary.

A loss of whole responses is at every token of its response, and `packing.sequence_weights` gives its weight to the last
one, so that each counts once. The metrics are also those of whole responses. Notation: h is the sum over a response of
log p - log p_ref, or of log p without a reference, and s(x) = 1 / (1 + exp(-x)).
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from RL2.objectives.closed_forms import bounded, dlogp
from RL2.objectives.objective import Loss
from RL2.types import TokenBatch

Divergence = Literal["reverse_kl", "forward_kl", "jsd", "alpha"]
"""Divergence between policy and reference that a loss of preferences corresponds to."""


def log_ratios(logp_T: Tensor, batch: TokenBatch) -> Tensor:
    """Return log(p / p_ref) of each action, [T]; log p where the batch has no reference."""
    return logp_T if batch.ref_logp_T is None else logp_T - batch.ref_logp_T


class Responses:
    """The sequences of a batch of actions, each a response that is good (its reward is above 0) or bad."""

    def __init__(self, batch: TokenBatch) -> None:
        self.batch = batch
        self.place_T = batch.sequence_T
        self.good_B = self.sum(batch.reward_T) > 0

    def sum(self, x_T: Tensor) -> Tensor:
        """Sum over the actions of each response, [B]."""
        return x_T.new_zeros(self.batch.num_sequences).index_add(0, self.place_T, x_T)

    def mean(self, x_T: Tensor) -> Tensor:
        """Return the mean over the actions of each response, [B]; 0 for one without actions."""
        return self.sum(x_T) / self.batch.lengths_B.clamp(min=1)

    def at_tokens(self, loss_B: Tensor, **metrics_B: Tensor) -> Loss:
        """Return loss and metrics of each response at each of its tokens, [T]."""
        return loss_B[self.place_T], {name: x_B.detach()[self.place_T] for name, x_B in metrics_B.items()}

    @property
    def baseline_B(self) -> Tensor | float:
        """The baseline of the batch at each response; 0 if it has none."""
        baseline_T = self.batch.baseline_T
        return 0.0 if baseline_T is None else self.mean(baseline_T)

    def pull(self, p_TV: Tensor, slope_T: Tensor) -> Tensor:
        """Return the gradient with respect to the logits, [T, V], of a loss whose derivative by log p_a is slope_T."""
        return slope_T[:, None] * dlogp(p_TV, self.batch.labels_T)

    def closed_form(self, p_TV: Tensor, by_h_B: Tensor) -> Tensor:
        """Return the gradient of the sum of loss_T, [T, V], from the derivative of each loss by h of its response."""
        return self.pull(p_TV, (by_h_B * self.batch.lengths_B)[self.place_T])


class Pairs(Responses):
    """Responses of which two, the good (chosen) and the bad (rejected) one, are in the same group."""

    def __init__(self, batch: TokenBatch) -> None:
        super().__init__(batch)
        groups, self.pair_B = batch.group_B.unique(return_inverse=True)
        self.number = len(groups)

    def of_pair(self, x_B: Tensor) -> Tensor:
        """Sum over both responses of the pair of each response, [B]."""
        return x_B.new_zeros(self.number).index_add(0, self.pair_B, x_B)[self.pair_B]

    def chosen(self, x_B: Tensor) -> Tensor:
        """Return x of the chosen response of each pair, [B]."""
        return self.of_pair(torch.where(self.good_B, x_B, torch.zeros_like(x_B)))

    def rejected(self, x_B: Tensor) -> Tensor:
        """Return x of the rejected response of each pair, [B]."""
        return self.of_pair(torch.where(self.good_B, torch.zeros_like(x_B), x_B))

    def margin(self, x_B: Tensor) -> Tensor:
        """Return x of the chosen minus x of the rejected response, [B]."""
        return self.of_pair(torch.where(self.good_B, x_B, -x_B))

    def nll(self, logp_T: Tensor) -> Tensor:
        """Return the negative log-likelihood of the chosen response at both, [B].

        Its mean over pairs is a mean over all tokens of the chosen responses of the optimizer step; where the batch has
        no `nll_factor_T`, it is that over the tokens of each response, then over responses.
        """
        return self.of_pair(-self.sum(self._nll_factor(logp_T) * logp_T))

    def _nll_factor(self, like_T: Tensor) -> Tensor:
        if self.batch.nll_factor_T is not None:
            return self.batch.nll_factor_T
        return (self.good_B / self.batch.lengths_B.clamp(min=1)).to(like_T)[self.place_T]

    def shared_weight(self, ld_alpha: float, like_T: Tensor) -> Tensor:
        """Return 1 at the tokens up to the length of the shorter response of a pair and `ld_alpha` beyond, [T]."""
        length_B = self.batch.lengths_B
        shorter = length_B.new_full((self.number,), 1 << 62).scatter_reduce(0, self.pair_B, length_B, "amin")
        number_T = torch.arange(len(self.place_T), device=self.place_T.device)
        within_T = number_T - self.batch.cu_seqlens[self.place_T] < shorter[self.pair_B][self.place_T]
        return torch.where(within_T, 1.0, ld_alpha).to(like_T)

    def parting_weight(self, like_T: Tensor) -> Tensor:
        """Return 1 at the first token of each response that the other one of its pair does not have there, 0 elsewhere.

        All are 0 in equal responses.
        """
        own_B = torch.arange(self.batch.num_sequences, device=self.place_T.device)
        partner_T = (self.of_pair(own_B) - own_B)[self.place_T].clamp(min=0)
        number_T = torch.arange(len(self.place_T), device=self.place_T.device) - self.batch.cu_seqlens[self.place_T]
        there_T = (self.batch.cu_seqlens[partner_T] + number_T).clamp(max=max(0, len(number_T) - 1))
        is_alike_T = (number_T < self.batch.lengths_B[partner_T]) & (
            self.batch.labels_T[there_T] == self.batch.labels_T
        )
        after = torch.full_like(own_B, len(number_T))
        first_B = after.scatter_reduce(0, self.place_T[~is_alike_T], number_T[~is_alike_T], "amin")
        return (number_T == first_B[self.place_T]).to(like_T)

    def pair_loss(self, loss_B: Tensor, reward_B: Tensor, **metrics_B: Tensor) -> Loss:
        """Return the loss of each pair at its tokens, with the metrics of its implicit rewards."""
        margin_B = self.margin(reward_B)
        return self.at_tokens(
            loss_B,
            margin=margin_B,
            accuracy=(margin_B > 0).float(),
            reward_chosen=self.chosen(reward_B),
            reward_rejected=self.rejected(reward_B),
            **metrics_B,
        )

    def pair_form(
        self,
        p_TV: Tensor,
        by_chosen_B: Tensor,
        by_rejected_B: Tensor,
        per_token_T: Tensor | float = 1.0,
        nll_coef: float = 0.0,
    ) -> Tensor:
        """Return the gradient of the sum of loss_T, [T, V].

        It follows from the derivatives of a pair's loss by the scores of its responses and from that of a score by each
        log p_a, `per_token_T`; `nll_coef` times the negative log-likelihood is added.
        """
        slope_T = torch.where(self.good_B, by_chosen_B, by_rejected_B)[self.place_T] * per_token_T
        if nll_coef:
            slope_T = slope_T - nll_coef * self._nll_factor(slope_T)
        return self.pull(p_TV, slope_T * self.of_pair(self.batch.lengths_B)[self.place_T])

    @property
    def share_T(self) -> Tensor:
        """1 / (number of actions of its response), the derivative of a mean by each of its terms, float64 [T]."""
        return 1 / self.batch.lengths_B[self.place_T].double()


def score(h_B: Tensor, divergence: Divergence, alpha: float) -> Tensor:
    """Return f'(t) with log t = h, without its constant where there is one: h for reverse KL.

    f-DPO (arXiv 2309.16240, table 1): the implicit reward is beta f'(p / p_ref). forward_kl: 1 - 1 / t. jsd: log of
    2 t / (t + 1). alpha: (t^(alpha - 1) - 1) / (alpha - 1), which is forward_kl at 0 and reverse_kl at 1.
    """
    if divergence == "jsd":
        return F.logsigmoid(h_B) + torch.log(torch.tensor(2.0, dtype=h_B.dtype))
    power = {"reverse_kl": 0.0, "forward_kl": -1.0, "alpha": alpha - 1}[divergence]
    return h_B if power == 0 else torch.expm1(bounded(power * h_B)) / power


def score_slope(h_B: Tensor, divergence: Divergence, alpha: float) -> Tensor:
    """Return the derivative of `score` by h."""
    if divergence == "jsd":
        return torch.sigmoid(-h_B)
    power = {"reverse_kl": 0.0, "forward_kl": -1.0, "alpha": alpha - 1}[divergence]
    return torch.exp(power * h_B)
