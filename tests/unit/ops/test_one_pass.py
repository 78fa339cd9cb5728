"""Gradients that the forward pass takes from an expected loss are those of the actual one, whatever was expected."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_token_stats import NOT_DIFFERENTIABLE, TOKENS, D, K, T, V, random_inputs
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from RL2.ops.one_pass import Expected, unmet
from RL2.ops.token_stats import LogitTransform, token_stats
from RL2.types import MENU, TokenStats

WEIGHT_T = torch.linspace(-1, 1.5, T, dtype=torch.float64)
SEQUENCE_T = torch.arange(T) // 7

Losses = Callable[[TokenStats, Tensor], Tensor]


def token_wise(stats: TokenStats, index_C: Tensor) -> Tensor:
    """The sum of a loss of each token that reads every statistic; some tokens have none."""
    weight_C = WEIGHT_T[index_C].to(stats.logp.dtype) * (index_C % 3 > 0)
    loss_C = torch.expm1(stats.logp) * stats.rank + stats.max_log1mp * stats.log1mp.exp()
    loss_C = loss_C - 0.1 * stats.entropy * stats.max_logp + stats.sum_p2.square() + stats.top_logp[:, 1:].sum(-1)
    return (loss_C * weight_C).sum()


def by_sequence(stats: TokenStats, index_C: Tensor) -> Tensor:
    """A loss of sequences of 7 tokens, which tiles cut."""
    sums_B = torch.zeros(T, dtype=stats.logp.dtype).index_add(0, SEQUENCE_T[index_C], stats.logp)
    return (sums_B / 10).exp().sum()


def gradients(
    loss: Losses, expected: Expected | None, dtype: torch.dtype, needed: tuple[bool, bool] = (True, True), **how: Any
) -> tuple[list[Tensor], TokenStats]:
    """Gradients of hidden states and head that are needed, and the statistics."""
    hidden_TD, head_VD, labels_T = random_inputs(5.0)
    leaves = [x.to(dtype).requires_grad_(n) for x, n in zip((hidden_TD, head_VD), needed, strict=True)]
    stats = token_stats(*leaves, labels_T, fields=MENU, top_k=K, expected=expected, **how)  # type: ignore[arg-type]
    loss(stats, torch.arange(T)).backward()
    return [x.grad for x in leaves if x.grad is not None], stats


@pytest.mark.parametrize("transform", [LogitTransform(), LogitTransform(scale=0.5, softcap=5.0)])
@pytest.mark.parametrize(
    ("dtype", "tolerances"),
    [(torch.float64, (1e-9, 1e-9)), (torch.float32, (1e-5, 1e-4)), (torch.bfloat16, (1e-5, 4e-3))],
)
@pytest.mark.parametrize(
    ("loss", "expectation", "missed"),
    [
        (token_wise, token_wise, 0),
        (by_sequence, by_sequence, T),
        (by_sequence, token_wise, T),
        (token_wise, by_sequence, T),
        (token_wise, lambda stats, index_C: token_wise(stats, index_C) + stats.logp[index_C == 11].sum(), 1),
        (token_wise, lambda stats, index_C: torch.zeros(()), 2 * T // 3),
    ],
    ids=["right", "cut", "another", "a sum", "wrong at one token", "none"],
)
def test_gradients_do_not_depend_on_the_expectation(
    loss: Losses,
    expectation: Losses,
    missed: int,
    dtype: torch.dtype,
    tolerances: tuple[float, float],
    transform: LogitTransform,
) -> None:
    """Compare with the dense definition in float64, for tiles of 5 tokens."""
    expected = Expected(expectation)
    how: dict[str, Any] = {"transform": transform, "temperature": 0.7}
    ours, stats = gradients(loss, expected, dtype, budget_mib=TOKENS, **how)
    half = torch.bfloat16 if dtype == torch.bfloat16 else torch.float64
    hidden_TD, head_VD, labels_T = random_inputs(5.0)
    exact = [x.to(half).double().requires_grad_() for x in (hidden_TD, head_VD)]
    reference = token_stats(*exact, labels_T, fields=MENU, top_k=K, implementation="reference", **how)  # type: ignore[arg-type]
    loss(reference, torch.arange(T)).backward()
    assert expected.missed == missed
    for name in MENU:
        close = tolerances[0] if name not in NOT_DIFFERENTIABLE else 0.0
        torch.testing.assert_close(
            getattr(stats, name).double(), getattr(reference, name).double(), rtol=close, atol=close
        )
    for grad, leaf in zip(ours, exact, strict=True):
        assert leaf.grad is not None
        assert (grad.double() - leaf.grad).norm() < tolerances[1] * leaf.grad.norm()


@pytest.mark.parametrize("needed", [(True, False), (False, True)])
@pytest.mark.parametrize("expectation", [token_wise, by_sequence])
def test_only_what_trains_has_a_gradient(needed: tuple[bool, bool], expectation: Losses) -> None:
    both, _ = gradients(token_wise, None, torch.float64)
    (one,), _ = gradients(token_wise, Expected(expectation), torch.float64, needed, budget_mib=TOKENS)
    torch.testing.assert_close(one, both[0 if needed[0] else 1], rtol=1e-9, atol=1e-12)


def test_without_gradients_nothing_is_expected() -> None:
    def refuse(stats: TokenStats, index_C: Tensor) -> Tensor:
        raise AssertionError("no gradient is needed")

    with torch.no_grad():
        stats = token_stats(*random_inputs(1.0), fields=("logp",), expected=Expected(refuse))
    assert stats.logp.shape == (T,)


def products(loss: Losses, expected: Expected | None) -> float:
    """Number of products of all hidden states with the head, in forward and backward pass."""
    with FlopCounterMode(display=False) as counter:
        gradients(loss, expected, torch.float32, budget_mib=TOKENS)
    return counter.get_total_flops() / (2 * T * V * D) - 1  # that of random_inputs


def test_three_products_instead_of_four() -> None:
    def only_some(stats: TokenStats, index_C: Tensor) -> Tensor:
        return stats.logp[index_C % 4 == 0].sum()

    assert products(lambda stats, _: stats.logp.sum(), None) == 4
    assert products(lambda stats, _: stats.logp.sum(), Expected(lambda stats, _: stats.logp.sum())) == 3
    assert products(only_some, None) == 1 + 3 / 4, "tokens without a slope need no logits again"
    assert products(only_some, Expected(lambda stats, _: torch.zeros(()))) == 3 + 3 / 4


def test_an_empty_batch() -> None:
    head_VD = torch.randn(V, D, requires_grad=True)
    stats = token_stats(
        torch.zeros(0, D),
        head_VD,
        torch.zeros(0, dtype=torch.long),
        fields=MENU,
        top_k=K,
        expected=Expected(token_wise),
    )
    token_wise(stats, torch.arange(0)).backward()
    assert head_VD.grad is not None and not head_VD.grad.any()


def test_rounding_is_no_difference_and_nan_is_one() -> None:
    one = torch.tensor([1.0, 2.0, -3.0, torch.nan])
    assert unmet({"logp": one[:3]}, {"logp": one[:3] + 1e-7})["logp"].tolist() == [0, 0, 0]
    assert unmet({"logp": one[:3]}, {"logp": torch.tensor([1.0, 2.5, -3.0])})["logp"].tolist() == [0, -0.5, 0]
    assert unmet({"logp": one}, {"logp": one})["logp"].isnan()[3]
    found = unmet({"logp": one[:2]}, {"entropy": one[:2]})
    assert found["logp"].tolist() == [1, 2] and found["entropy"].tolist() == [-1, -2]
