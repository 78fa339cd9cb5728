"""Tokens of a minibatch that are left out because of what all its tokens look like together.

Everything is under the old policy, over the tokens `kept_T` of the global minibatch of one optimizer step, so that it
depends neither on microbatches nor on processes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from RL2.types import TokenBatch


def within_second_moment(batch: TokenBatch, kept_T: Tensor, limit: float) -> Tensor:
    """Return `kept_T` without the largest squared log-ratios, so that the mean of the others is at most `limit`.

    M2PO (arXiv 2510.01161): the log-ratio is log(p / p_engine), and 0.04 is the paper's limit. As few tokens as
    possible are left out; if even the smallest square is above the limit, all are.
    """
    assert batch.old_logp_T is not None and batch.engine_logp_T is not None
    place = kept_T.nonzero()[:, 0]
    square, order = (batch.old_logp_T - batch.engine_logp_T)[place].double().square().sort(stable=True)
    mean = square.cumsum(0) / torch.arange(1, len(square) + 1, device=square.device)
    return torch.zeros_like(kept_T).index_fill_(0, place[order[: int((mean <= limit).sum())]], True)


def covariance(batch: TokenBatch, kept_T: Tensor) -> Tensor:
    """Return (A - mean of A) (log p - mean of log p) of each token in `kept_T`, and 0 elsewhere, float64 [T].

    Its mean is the covariance that drives the entropy (arXiv 2505.22617): raising likely tokens lowers it.
    """
    assert batch.old_logp_T is not None and batch.advantage_T is not None
    number = kept_T.sum().clamp(min=1)
    advantage_T, logp_T = (x.double() * kept_T for x in (batch.advantage_T, batch.old_logp_T))
    return (advantage_T - advantage_T.sum() / number) * (logp_T - logp_T.sum() / number) * kept_T


def covariance_rank(batch: TokenBatch, kept_T: Tensor) -> Tensor:
    """Return the share of the tokens in `kept_T` that have a higher `covariance`, float32 [T]; 1 at other tokens."""
    covariance_T, place = covariance(batch, kept_T), kept_T.nonzero()[:, 0]
    order = covariance_T[place].argsort(descending=True, stable=True)
    rank = torch.arange(len(place), device=place.device) / max(1, len(place))
    return torch.ones_like(covariance_T, dtype=torch.float32).index_copy(0, place[order], rank)


def without_covariance(batch: TokenBatch, kept_T: Tensor, share: float, low: float, high: float) -> Tensor:
    """Return `kept_T` without this share of its tokens, drawn among those whose `covariance` is in (low, high).

    Clip-Cov (arXiv 2505.22617), with a share of 2e-4 between 1 and 5 in verl. At least one token is
    drawn, if there is one. The draw depends on the tokens alone, so it is the same in every process and after a resume.
    """
    covariance_T = covariance(batch, kept_T)
    candidates = (kept_T & (covariance_T > low) & (covariance_T < high)).nonzero()[:, 0]
    seed = int((batch.labels_T * kept_T).sum())
    order = torch.randperm(len(candidates), generator=torch.Generator().manual_seed(seed)).to(candidates.device)
    drawn = candidates[order[: max(1, int(share * int(kept_T.sum())))]]
    return kept_T.index_fill(0, drawn, False)
