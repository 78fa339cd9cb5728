"""Objectives as their sources write them, sequence by sequence in float64: references for RL2/objectives.

Every function takes the whole distribution of each token, p_TV, and the batch, and returns the loss of each token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from RL2.types import TokenBatch

Dense = Callable[[Tensor, TokenBatch], Tensor]


def sampled(p_TV: Tensor, batch: TokenBatch) -> Tensor:
    """Return p_a, [T]."""
    return p_TV[torch.arange(len(p_TV)), batch.labels_T]


def sequences(batch: TokenBatch, *values_T: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield the values of each sequence."""
    lengths = batch.lengths_B.tolist()
    yield from zip(*(x.split(lengths) for x in values_T), strict=True)


def given(batch: TokenBatch) -> tuple[Tensor, Tensor]:
    """Return p_a_old and A, [T]."""
    assert batch.old_logp_T is not None and batch.advantage_T is not None
    return batch.old_logp_T.exp(), batch.advantage_T


def importance_sampling(p_TV: Tensor, batch: TokenBatch) -> Tensor:
    """Return the off-policy policy gradient's surrogate."""
    old_T, advantage_T = given(batch)
    return -sampled(p_TV, batch) / old_T * advantage_T


def dppo(p_TV: Tensor, batch: TokenBatch, *, kl: bool, low: float, high: float, cap: float) -> Tensor:
    """Return DPPO's loss: verl's dppo_tv and dppo_kl, token by token."""
    losses = []
    rest_T = p_TV.detach().scatter(1, batch.labels_T[:, None], 0.0).sum(-1)  # 1 - p as the sum of the others
    for p, rest, old, advantage in zip(sampled(p_TV, batch), rest_T.tolist(), *given(batch), strict=True):
        x, y, rises = p.item(), min(1.0, old.item()), advantage.item() > 0
        divergence = abs(x - y)
        if kl:
            divergence = y * math.log(y / x) + ((1 - y) * math.log((1 - y) / rest) if y < 1 else 0.0)
        outside = divergence > (high if rises else low) and (x > y if rises else x < y)
        losses.append(-(0.0 if outside else min(x / old.item(), cap)) * advantage * p.log())
    return torch.stack(losses)


def dro(p_TV: Tensor, batch: TokenBatch, *, beta: float) -> Tensor:
    """Return the negative of log p A - beta (log p / q)^2 / 2."""
    old_T, advantage_T = given(batch)
    p_T = sampled(p_TV, batch)
    return -(p_T.log() * advantage_T - 0.5 * beta * (p_T.log() - old_T.log()) ** 2)


def gmpo(p_TV: Tensor, batch: TokenBatch, *, low: float, high: float) -> Tensor:
    """Return the geometric mean of ratios, each clipped on the side of its advantage, times the advantage."""
    parts = []
    for p, old, advantage in sequences(batch, sampled(p_TV, batch), *given(batch)):
        up, down = (p / old).clamp(max=math.exp(high)), (p / old).clamp(min=math.exp(-low))
        parts.append(-(torch.where(advantage > 0, up, down).prod() ** (1 / len(p))) * advantage)
    return torch.cat(parts)


def luspo(p_TV: Tensor, batch: TokenBatch, *, low: float, high: float) -> Tensor:
    """Return GSPO's clipped gain of each sequence times its length."""
    parts = []
    for p, old, advantage in sequences(batch, sampled(p_TV, batch), *given(batch)):
        s = (p / old).prod() ** (1 / len(p))
        gains = [torch.min(s * a, s.clamp(1 - low, 1 + high) * a) for a in advantage]
        parts.append(-len(p) * torch.stack(gains))
    return torch.cat(parts)


def vespo(p_TV: Tensor, batch: TokenBatch, *, positive: tuple[float, float], negative: tuple[float, float]) -> Tensor:
    """Return -f(W) A log p with f(W) = W^c1 exp(c2 (1 - W)), a constant."""
    parts = []
    for p, old, advantage in sequences(batch, sampled(p_TV, batch), *given(batch)):
        weight = math.prod((p / old).tolist())
        up, down = (weight**c1 * math.exp(c2 * (1 - weight)) for c1, c2 in (positive, negative))
        one = torch.ones_like(advantage)
        kernel = torch.where(advantage >= 0, up * one, down * one)
        parts.append(-kernel * advantage * p.log())
    return torch.cat(parts)


def a2po(p_TV: Tensor, batch: TokenBatch, *, beta: float) -> Tensor:
    """Return the squared error of beta times the log-ratio of the sequence, at each of its tokens."""
    assert batch.ref_logp_T is not None
    _, advantage_T = given(batch)
    parts = []
    for p, reference, advantage in sequences(batch, sampled(p_TV, batch), batch.ref_logp_T, advantage_T):
        error = beta * (p.log().sum() - reference.sum()) - advantage.mean()
        parts.append((error**2).expand(len(p)))
    return torch.cat(parts)


def kl_cov(p_TV: Tensor, batch: TokenBatch, *, share: float, coef: float) -> Tensor:
    """Return -r A, and the distance of the logarithms on the first tokens by covariance."""
    assert batch.covariance_rank_T is not None
    old_T, advantage_T = given(batch)
    p_T = sampled(p_TV, batch)
    number = sum(rank < share for rank in batch.covariance_rank_T.tolist())
    first = batch.covariance_rank_T.argsort()[:number]
    distance_T = torch.zeros_like(p_T).index_put((first,), (p_T.log() - old_T.log()).abs()[first])
    return -p_T / old_T * advantage_T + coef * distance_T


def dft(p_TV: Tensor, batch: TokenBatch) -> Tensor:
    """Return -sg(p) log p."""
    p_T = sampled(p_TV, batch)
    return -p_T.detach() * p_T.log()


PUBLISHED: dict[str, tuple[str, dict[str, Any], Dense]] = {
    "importance sampling": ("importance_sampling", {}, importance_sampling),
    "dppo tv": ("dppo", {}, lambda p, b: dppo(p, b, kl=False, low=0.15, high=0.15, cap=math.inf)),
    "dppo tv narrow": (
        "dppo",
        {"delta": 0.02, "delta_high": 0.05, "ratio_max": 1.1},
        lambda p, b: dppo(p, b, kl=False, low=0.02, high=0.05, cap=1.1),
    ),
    "dppo kl": (
        "dppo",
        {"divergence": "kl", "delta": 0.05, "delta_high": 0.01},
        lambda p, b: dppo(p, b, kl=True, low=0.05, high=0.01, cap=math.inf),
    ),
    "dro": ("dro", {"beta": 0.3}, lambda p, b: dro(p, b, beta=0.3)),
    "gmpo": ("gmpo", {}, lambda p, b: gmpo(p, b, low=0.4, high=0.4)),
    "gmpo narrow": ("gmpo", {"clip": 0.1, "clip_high": 0.3}, lambda p, b: gmpo(p, b, low=0.1, high=0.3)),
    "luspo": ("luspo", {"clip": 0.05, "clip_high": 0.02}, lambda p, b: luspo(p, b, low=0.05, high=0.02)),
    "vespo": ("vespo", {}, lambda p, b: vespo(p, b, positive=(2.0, 3.0), negative=(3.0, 2.0))),
    "vespo flat": (
        "vespo",
        {"power_pos": 0.5, "decay_pos": 0.2, "power_neg": 0.1, "decay_neg": 0.7},
        lambda p, b: vespo(p, b, positive=(0.5, 0.2), negative=(0.1, 0.7)),
    ),
    "a2po": ("a2po", {"beta": 0.2}, lambda p, b: a2po(p, b, beta=0.2)),
    "dft": ("dft", {}, dft),
    "kl_cov": ("kl_cov", {"share": 0.3, "kl_coef": 0.7}, lambda p, b: kl_cov(p, b, share=0.3, coef=0.7)),
}
"""Objectives with their knobs, and the reference with the same constants."""
