"""Objectives that coincide, as their papers say: for sequences of one token, at a ratio of 1, and at limits of knobs.

Gradients are with respect to the log-probability of the sampled token, of which those by the logits are multiples.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from RL2.batch.advantages import reinforce as group_mean
from RL2.batch.advantages import rloo
from RL2.batch.group_advantages import opo
from RL2.batch.packing import loss_weights, pack
from RL2.objectives.registry import OBJECTIVES
from RL2.types import Sequence, TokenBatch, TokenStats, Trajectory

LENGTHS = (5, 1, 8, 3)
WIDE = 1e6
Result = tuple[Tensor, Tensor]


def rollout(lengths: tuple[int, ...] = LENGTHS, spread: float = 0.5) -> tuple[Tensor, TokenBatch]:
    """Log-probabilities, and actions with one advantage a sequence; `spread` is that of log r."""
    g = torch.Generator().manual_seed(0)
    rows = [Sequence([0] * (n + 1), [False] + [True] * n, [0.0] * (n + 1), [0.0] * (n + 1)) for n in lengths]
    batch = pack([Trajectory(n, n, 0, [row]) for n, row in enumerate(rows)])
    number = sum(lengths)
    logp_T = -0.05 - 2 * torch.rand(number, generator=g, dtype=torch.float64)
    old_T = (logp_T - spread * torch.randn(number, generator=g, dtype=torch.float64)).clamp(max=-1e-3)
    advantage_B = torch.randn(len(lengths), generator=g, dtype=torch.float64)
    return logp_T, batch.with_(old_logp_T=old_T if spread else logp_T, advantage_T=advantage_B[batch.sequence_T])


def run(name: str, on: tuple[Tensor, TokenBatch], weight_T: Tensor | None = None, **knobs: Any) -> Result:
    """Return the loss of each token, and the gradient of its weighted sum by the log-probabilities."""
    logp_T, batch = on
    leaf_T = logp_T.clone().requires_grad_()
    loss_T, _ = OBJECTIVES[name](TokenStats(logp=leaf_T, log1mp=torch.log(-torch.expm1(leaf_T))), batch, **knobs)
    total = (loss_T if weight_T is None else loss_T * weight_T).sum()
    return loss_T.detach(), torch.autograd.grad(total, leaf_T)[0]


def assert_same(one: Result, other: Result, rtol: float = 1e-9) -> None:
    for x, y in zip(one, other, strict=True):
        torch.testing.assert_close(x, y, rtol=rtol, atol=rtol * float(y.abs().max()))


def assert_same_gradient(one: Result, other: Result, rtol: float = 1e-9) -> None:
    assert other[1].any()
    assert_same((one[1],), (other[1],), rtol)


ONE_TOKEN = (1,) * 40


def test_for_one_token_gspo_gmpo_and_ppo_are_one() -> None:
    on = rollout(ONE_TOKEN)
    ppo = run("ppo", on, clip=0.2, clip_high=0.28)
    assert 0 < (ppo[1] == 0).double().mean() < 1  # the bounds are put to the test
    assert_same(run("gspo", on, clip=0.2, clip_high=0.28), ppo)
    gmpo = run("gmpo", on, clip=-math.log(1 - 0.2), clip_high=math.log(1 + 0.28))
    assert_same(gmpo, ppo)
    assert_same(run("luspo", on, clip=0.2, clip_high=0.28), ppo)


def test_without_clipping_gspo_and_gmpo_are_one() -> None:
    on = rollout()
    assert_same(run("gmpo", on, clip=20.0), run("gspo", on, clip=WIDE))


def test_without_clipping_ppo_cispo_and_dppo_are_importance_sampling() -> None:
    on = rollout()
    expected = run("importance_sampling", on)
    assert_same(run("ppo", on, clip=WIDE), expected)
    assert_same(run("kl_cov", on), expected)  # without tokens that it holds
    assert_same_gradient(run("cispo", on, ratio_max=WIDE), expected)
    for divergence in ("tv", "kl"):
        assert_same_gradient(run("dppo", on, divergence=divergence, delta=WIDE), expected)


def test_sapo_without_temperature_is_importance_sampling() -> None:
    on = rollout()
    assert_same_gradient(run("sapo", on, tau_pos=1e-5, tau_neg=1e-5), run("importance_sampling", on), rtol=1e-8)


def test_the_total_variation_of_dppo_is_a_clip_range_of_its_own_for_each_token() -> None:
    """|p - p_old| <= delta is |r - 1| <= delta / p_old: wide for rare tokens."""
    logp_T, batch = rollout(ONE_TOKEN)
    assert batch.old_logp_T is not None
    found = run("dppo", (logp_T, batch), delta=0.1)
    assert 0 < (found[1] == 0).double().mean() < 1
    for b in range(len(ONE_TOKEN)):
        on = logp_T[b : b + 1], batch.sequences([b])
        expected = run("ppo", on, clip=0.1 / batch.old_logp_T[b].exp().item())
        torch.testing.assert_close(found[1][b : b + 1], expected[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "name", ["importance_sampling", "ppo", "gspo", "gmpo", "cispo", "sapo", "dppo", "dro", "vespo"]
)
def test_at_a_ratio_of_1_all_have_the_gradient_of_reinforce(name: str) -> None:
    on = rollout(spread=0.0)
    assert_same_gradient(run(name, on), run("reinforce", on))


def test_gspo_summed_over_tokens_is_luspo() -> None:
    """`actor.avg_level=constant` is length-unbiased already."""
    logp_T, batch = rollout()
    mean_T, sum_T = loss_weights(batch, level="sequence"), loss_weights(batch, level="constant", length=16)
    luspo = run("luspo", (logp_T, batch), mean_T.double(), clip=0.1, clip_high=0.2)
    gspo = run("gspo", (logp_T, batch), sum_T.double(), clip=0.1, clip_high=0.2)
    assert_same_gradient((luspo[0], luspo[1] / 16), gspo, rtol=1e-6)  # weights are float32


def test_limits_of_the_kernel_of_vespo() -> None:
    """W^c1 exp(c2 (1 - W)): 1 for c1 = c2 = 0, and W, importance sampling of sequences, for c1 = 1 and c2 = 0."""
    logp_T, batch = on = rollout()
    assert batch.old_logp_T is not None and batch.advantage_T is not None
    names = ("power_pos", "decay_pos", "power_neg", "decay_neg")
    flat = dict.fromkeys(names, 1e-12)
    assert_same(run("vespo", on, **flat), run("reinforce", on), rtol=1e-8)
    weights = [x.sum().exp() for x in (logp_T - batch.old_logp_T).split(LENGTHS)]
    sequence_T = torch.stack(weights)[batch.sequence_T]
    found = run("vespo", on, **flat | {"power_pos": 1.0, "power_neg": 1.0})
    torch.testing.assert_close(found[1], -sequence_T * batch.advantage_T, rtol=1e-8, atol=0)


def test_dro_without_penalty_is_reinforce_and_ends_where_the_ratio_is_that_of_the_optimum() -> None:
    logp_T, batch = on = rollout()
    assert batch.advantage_T is not None
    assert_same(run("dro", on, beta=1e-12), run("reinforce", on))
    optimum = batch.with_(old_logp_T=logp_T - batch.advantage_T / 0.7)
    assert run("dro", (logp_T, optimum), beta=0.7)[1].abs().max() < 1e-12


def test_a2po_ends_at_the_optimum_and_begins_like_reinforce() -> None:
    logp_T, batch = rollout()
    assert batch.advantage_T is not None
    length_T = batch.lengths_B[batch.sequence_T]
    optimum = batch.with_(ref_logp_T=logp_T - batch.advantage_T / 0.7 / length_T)
    assert run("a2po", (logp_T, optimum), beta=0.7)[1].abs().max() < 1e-12
    begin = logp_T, batch.with_(ref_logp_T=logp_T)
    found = run("a2po", begin, beta=0.01)
    assert_same_gradient((found[0], found[1] / length_T / (2 * 0.01)), run("reinforce", begin))


def test_dft_is_reinforce_with_the_probability_as_the_advantage() -> None:
    logp_T, batch = on = rollout()
    assert_same(run("dft", on), run("reinforce", (logp_T, batch.with_(advantage_T=logp_T.exp()))))
    leaf_T = logp_T.clone().requires_grad_()
    assert_same_gradient(run("dft", on), (logp_T, torch.autograd.grad(-leaf_T.exp().sum(), leaf_T)[0]))


def test_off_policy_the_mean_gradient_of_importance_sampling_is_the_policy_gradient() -> None:
    """By enumeration: tokens of the old policy with the ratio, against the gradient of the expected advantage."""
    g = torch.Generator().manual_seed(1)
    logits_V, old_V, advantage_V = torch.randn(3, 7, generator=g, dtype=torch.float64)
    logits_V.requires_grad_()
    logp_V, old_logp_V = logits_V.log_softmax(0), old_V.log_softmax(0)
    (exact,) = torch.autograd.grad(-(logp_V.exp() * advantage_V).sum(), logits_V, retain_graph=True)
    _, batch = rollout((7,))
    batch = batch.with_(old_logp_T=old_logp_V, advantage_T=advantage_V)
    loss_V, _ = OBJECTIVES["importance_sampling"](TokenStats(logp=logp_V), batch)
    (found,) = torch.autograd.grad((loss_V * old_logp_V.exp()).sum(), logits_V)
    torch.testing.assert_close(found, exact)


def rewarded(lengths: tuple[int, ...]) -> TokenBatch:
    """One group of responses with random rewards."""
    rewards = torch.randn(len(lengths), generator=torch.Generator().manual_seed(2)).tolist()
    rows = [
        Sequence([0] * (n + 1), [False] + [True] * n, [0.0] * (n + 1), [0.0] * n + [reward])
        for n, reward in zip(lengths, rewards, strict=True)
    ]
    return pack([Trajectory(0, 0, n, [row]) for n, row in enumerate(rows)])


def test_baselines_that_coincide() -> None:
    batch = rewarded((4, 4, 4, 4, 4))
    expected_T = group_mean(batch)
    assert expected_T.any()
    torch.testing.assert_close(opo(batch), expected_T)  # responses of one length
    torch.testing.assert_close(rloo(batch), expected_T * 5 / 4)
    other = rewarded(LENGTHS)
    assert not torch.allclose(opo(other), group_mean(other))
