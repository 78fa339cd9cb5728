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
from RL2.ops.teacher_stats import Teacher, teacher_stats
from RL2.ops.token_stats import LogitTransform, token_stats
from RL2.types import MENU, TEACHER_MENU, TokenStats

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


TAUGHT = ("logp", "entropy", *(name for name in TEACHER_MENU if name != "teacher_logp"))


def taught(
    loss: Losses, expected: Expected | None, dtype: torch.dtype = torch.float64, **how: Any
) -> tuple[list[Tensor], TokenStats]:
    """Gradients of hidden states and heads of a student and a teacher that trains, and the statistics."""
    g = torch.Generator().manual_seed(1)
    hidden_TD, head_VD, labels_T = random_inputs(5.0)
    hidden_TE, head_VE = torch.randn(T, 10, generator=g), torch.randn(V, 10, generator=g)
    leaves = [x.to(dtype).requires_grad_() for x in (hidden_TD, head_VD, hidden_TE, head_VE)]
    teacher = Teacher(leaves[2], leaves[3], temperature=1.3, transform=LogitTransform(softcap=5.0), trains=True)
    stats = teacher_stats(
        leaves[0], leaves[1], labels_T, teacher, fields=TAUGHT, top_k=K, beta=0.3, expected=expected, **how
    )
    loss(stats, torch.arange(T)).backward()
    return [x.grad for x in leaves if x.grad is not None], stats


def distilled(stats: TokenStats, index_C: Tensor) -> Tensor:
    """A loss of each token that reads every divergence, and statistics of both sides."""
    loss_C = stats.kl_student_teacher * stats.logp.exp() + stats.kl_teacher_student.square() + stats.jsd
    loss_C = loss_C + stats.cross_entropy * stats.teacher_entropy.detach() - 0.1 * stats.entropy * stats.jsd
    loss_C = loss_C + stats.top_kl_teacher_student * stats.overlap_k - stats.student_top_logp[:, 0]
    return (loss_C * WEIGHT_T[index_C].to(loss_C.dtype) * (index_C % 3 > 0)).sum()


def coupled(stats: TokenStats, index_C: Tensor) -> Tensor:
    """A loss that reads the divergences of all tokens."""
    return stats.jsd.sum() * stats.kl_student_teacher.sum()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize(
    ("loss", "expectation", "missed"),
    [
        (distilled, distilled, 0),
        (coupled, coupled, T),
        (distilled, lambda stats, index_C: distilled(stats, index_C) + stats.jsd[index_C == 11].sum(), 1),
    ],
    ids=["right", "cut", "wrong at one token"],
)
def test_gradients_of_two_heads(
    loss: Losses, expectation: Losses, missed: int, dtype: torch.dtype, tolerance: float
) -> None:
    expected = Expected(expectation)
    ours, stats = taught(loss, expected, dtype, budget_mib=6 * 4 * 7 * V / 2**20)
    exact, reference = taught(loss, None, implementation="reference")
    assert expected.missed == missed
    for name in TAUGHT:
        torch.testing.assert_close(
            getattr(stats, name).double(), getattr(reference, name).double(), rtol=tolerance / 10, atol=tolerance / 10
        )
    for grad, right in zip(ours, exact, strict=True):
        assert (grad.double() - right).norm() < tolerance * right.norm()


def test_four_products_instead_of_six() -> None:
    def flops(expected: Expected | None) -> float:
        student, teacher = random_inputs(1.0), random_inputs(2.0)
        leaves = [x.requires_grad_() for x in student[:2]]
        with FlopCounterMode(display=False) as counter:
            told = Teacher(teacher[0], teacher[1])
            stats = teacher_stats(leaves[0], leaves[1], student[2], told, fields=("jsd",), expected=expected)
            stats.jsd.sum().backward()
        return counter.get_total_flops() / (2 * T * V * D)

    assert flops(None) == 6
    assert flops(Expected(lambda stats, _: stats.jsd.sum())) == 4


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
