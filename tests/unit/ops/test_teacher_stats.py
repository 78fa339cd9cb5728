"""Statistics with a teacher against the dense definition in float64. T tokens, V vocabulary, D and E hidden sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from RL2.ops.teacher_stats import Teacher, teacher_stats
from RL2.ops.token_stats import LogitTransform, token_stats
from RL2.types import MENU, TEACHER_MENU, TOP, TokenStats

T, V, D, E, K = 24, 37, 16, 10, 5
NOT_DIFFERENTIABLE = ("teacher_rank", "teacher_top_id", "overlap_k")
SMOOTH = tuple(name for name in TEACHER_MENU if name not in NOT_DIFFERENTIABLE)
BUDGETS = {"whole": 64.0, "several tiles": 6 * 4 * 7 * V / 2**20}
"""MiB: all at once, and tiles of few tokens and few columns, which divide neither T nor V."""


def random_inputs(scale: float, rows: tuple[int, int] = (V, V)) -> tuple[Tensor, ...]:
    """Hidden states and head of student and teacher, and labels; some tokens have the same logits on both sides."""
    g = torch.Generator().manual_seed(0)
    hidden_TD, hidden_TE = (torch.randn(T, size, generator=g) * scale / size**0.5 for size in (D, E))
    head_VD, head_VE = (torch.randn(n, size, generator=g) for n, size in zip(rows, (D, E), strict=True))
    head_VD[:, 0], head_VE[:, 0] = 1.0, 1.0
    hidden_TD[:2, 1:], hidden_TE[:2, 1:] = 0.0, 0.0  # uniform on both sides
    return hidden_TD, head_VD, hidden_TE, head_VE, torch.randint(0, min(rows), (T,), generator=g)


def adversarial_inputs() -> tuple[Tensor, ...]:
    """Logits as they are: certain of the same token, of different ones, of an impossible one, ties, and equal sides."""
    g = torch.Generator().manual_seed(1)
    z_TV, w_TV = torch.randn(T, V, generator=g), torch.randn(T, V, generator=g)
    rows, gap_T = torch.arange(T), torch.linspace(0, 80, T)
    z_TV[rows, rows] += gap_T
    w_TV[rows, (rows + rows % 2) % V] += gap_T
    z_TV[20:22] = z_TV[20:22].round()
    w_TV[22:] = z_TV[22:]
    return z_TV, torch.eye(V), w_TV, torch.eye(V), torch.randint(0, V, (T,), generator=g)


INPUTS = {
    "scale 1": lambda: random_inputs(1.0),
    "scale 10": lambda: random_inputs(10.0),
    "adversarial": adversarial_inputs,
    "smaller teacher": lambda: random_inputs(3.0, (V, V - 4)),
    "smaller student": lambda: random_inputs(3.0, (V, V + 9)),
}


def computed(
    inputs: Sequence[Tensor],
    fields: Sequence[str],
    trains: bool = False,
    teacher: dict[str, Any] | None = None,
    **how: Any,
) -> tuple[TokenStats, list[Tensor]]:
    """Return the statistics, and the leaves that they are differentiable in."""
    hidden_TD, head_VD, hidden_TE, head_VE = (x.clone().requires_grad_() for x in inputs[:4])
    other = Teacher(hidden_TE, head_VE, trains=trains, **(teacher or {}))
    how = {"top_k": K if set(TOP) & set(fields) else 0, "beta": 0.3} | how
    stats = teacher_stats(hidden_TD, head_VD, inputs[4], other, fields=fields, **how)
    return stats, [hidden_TD, head_VD, hidden_TE, head_VE]


def doubles(inputs: Sequence[Tensor]) -> list[Tensor]:
    return [x.double() if x.is_floating_point() else x for x in inputs]


def weighted(value: Tensor) -> Tensor:
    return (value.double() * torch.linspace(-1, 1.5, value.numel(), dtype=torch.float64).view(value.shape)).sum()


def assert_alike(
    ours: tuple[TokenStats, list[Tensor]],
    exact: tuple[TokenStats, list[Tensor]],
    fields: Sequence[str],
    tolerances: tuple[float, float],
) -> None:
    """Compare values absolutely and relatively, and gradients by their norm."""
    for name in fields:
        value, right = getattr(ours[0], name), getattr(exact[0], name)
        assert value.isfinite().all(), name
        torch.testing.assert_close(value.double(), right.double(), rtol=tolerances[0], atol=tolerances[0], msg=name)
        if name in NOT_DIFFERENTIABLE or not right.requires_grad:
            assert value.requires_grad == (right.requires_grad and name not in NOT_DIFFERENTIABLE), name
            continue
        grads, rights = (
            torch.autograd.grad(weighted(x), leaves, retain_graph=True, allow_unused=True, materialize_grads=True)
            for x, leaves in ((value, ours[1]), (right, exact[1]))
        )
        for grad, right_grad in zip(grads, rights, strict=True):
            error = (grad.double() - right_grad).norm()
            assert error <= tolerances[1] * right_grad.norm() + 1e-12, (name, error, right_grad.norm())


@pytest.mark.parametrize("budget_mib", BUDGETS.values(), ids=BUDGETS)
@pytest.mark.parametrize("case", INPUTS)
@pytest.mark.parametrize(("dtype", "tolerances"), [(torch.float64, (1e-9, 1e-9)), (torch.float32, (1e-5, 1e-4))])
def test_tiles_are_the_dense_definition(
    dtype: torch.dtype, tolerances: tuple[float, float], case: str, budget_mib: float
) -> None:
    inputs = INPUTS[case]()
    how: dict[str, Any] = {"temperature": 0.7, "teacher": {"temperature": 1.3}, "trains": True}
    ours = computed(
        [x.to(dtype) if x.is_floating_point() else x for x in inputs], TEACHER_MENU, budget_mib=budget_mib, **how
    )
    exact = computed(doubles(inputs), TEACHER_MENU, implementation="reference", **how)
    assert_alike(ours, exact, TEACHER_MENU, tolerances)


def test_the_reference_is_the_textbook() -> None:
    inputs = doubles(random_inputs(3.0, (V, V - 4)))
    stats, _ = computed(inputs, TEACHER_MENU, implementation="reference")
    p_TV, q_TV = (torch.softmax((h @ w.T)[:, : V - 4], -1) for h, w in (inputs[:2], inputs[2:4]))
    for t in range(T):
        p, q, a = p_TV[t], q_TV[t], int(inputs[4][t])
        m = 0.3 * q + 0.7 * p
        order = sorted(range(V - 4), key=lambda i: (-q[i].item(), i))
        best = order[:K]
        others = [i for i in range(V - 4) if i not in best]
        qs, ps = (torch.cat([x[best], x[others].sum()[None]]) for x in (q, p))
        right = {
            "teacher_logp": q[a].log(),
            "teacher_max_logp": q.max().log(),
            "teacher_entropy": -(q * q.log()).sum(),
            "kl_teacher_student": (q * (q / p).log()).sum(),
            "kl_student_teacher": (p * (p / q).log()).sum(),
            "jsd": 0.3 * (q * (q / m).log()).sum() + 0.7 * (p * (p / m).log()).sum(),
            "cross_entropy": -(q * p.log()).sum(),
            "teacher_top_logp": q[best].log(),
            "teacher_tail_logp": q[others].sum().log(),
            "student_top_logp": p[best].log(),
            "student_tail_logp": p[others].sum().log(),
            "top_kl_teacher_student": (qs * (qs / ps).log()).sum(),
            "top_kl_student_teacher": (ps * (ps / qs).log()).sum(),
        }
        for name, value in right.items():
            torch.testing.assert_close(getattr(stats, name)[t], value, msg=name)
        assert stats.teacher_rank[t] == 1 + order.index(a)
        assert stats.teacher_top_id[t].tolist() == best
        logits_V = inputs[0][t] @ inputs[1].T  # the student keeps all its tokens
        assert round(float(stats.overlap_k[t]) * K) == len(
            set(best) & set(logits_V.argsort(descending=True, stable=True)[:K].tolist())
        )


@pytest.mark.parametrize("budget_mib", BUDGETS.values(), ids=BUDGETS)
def test_all_gradients_together_are_the_sum(budget_mib: float) -> None:
    """Student's and teacher's fields in one loss, with the student's own fields."""
    inputs = doubles(random_inputs(5.0))
    fields = ("logp", "entropy", *SMOOTH)

    def grads(**how: Any) -> tuple[Tensor, ...]:
        stats, leaves = computed(inputs, fields, trains=True, **how)
        return torch.autograd.grad(sum(weighted(getattr(stats, name)) for name in fields), leaves)  # type: ignore[arg-type]

    for ours, exact in zip(grads(budget_mib=budget_mib), grads(implementation="reference"), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-11)


def test_no_gradient_reaches_the_teacher_by_default() -> None:
    stats, leaves = computed(random_inputs(1.0), TEACHER_MENU)
    assert not stats.teacher_logp.requires_grad
    stats.jsd.sum().backward()
    assert [x.grad is not None for x in leaves] == [True, True, False, False]


def test_a_gradient_of_the_teacher_alone() -> None:
    """The student may be constant."""
    hidden_TD, head_VD, hidden_TE, head_VE, labels_T = doubles(random_inputs(2.0))
    grads = []
    for how in ({}, {"implementation": "reference"}):
        leaf_TE = hidden_TE.clone().requires_grad_()
        other = Teacher(leaf_TE, head_VE, trains=True)
        stats = teacher_stats(hidden_TD, head_VD, labels_T, other, fields=("kl_student_teacher",), **how)  # type: ignore[arg-type]
        grads += torch.autograd.grad(stats.kl_student_teacher.sum(), leaf_TE)
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-11)


SIDES = {
    "scale": (LogitTransform(scale=0.25), LogitTransform(scale=3.0)),
    "soft cap of the student": (LogitTransform(softcap=5.0), LogitTransform()),
    "soft caps of both": (LogitTransform(scale=2.0, softcap=30.0), LogitTransform(softcap=4.0)),
}


@pytest.mark.parametrize("transforms", SIDES.values(), ids=SIDES)
def test_each_side_has_its_own_change_of_the_logits(transforms: tuple[LogitTransform, LogitTransform]) -> None:
    inputs = doubles(random_inputs(4.0))
    how: dict[str, Any] = {"temperature": 0.7, "transform": transforms[0], "trains": True}
    how["teacher"] = {"temperature": 2.0, "transform": transforms[1]}
    ours = computed(inputs, SMOOTH, budget_mib=BUDGETS["several tiles"], **how)
    assert_alike(ours, computed(inputs, SMOOTH, implementation="reference", **how), SMOOTH, (1e-9, 1e-9))


def test_a_bias_is_a_column_of_the_head() -> None:
    hidden_TD, head_VD, hidden_TE, head_VE, labels_T = doubles(random_inputs(2.0))
    bias_V = torch.linspace(-1, 1, V, dtype=torch.float64)
    with_one_TE, with_bias_VE = (
        torch.cat([x, y[:, None]], 1) for x, y in ((hidden_TE, torch.ones(T)), (head_VE, bias_V))
    )
    ours, _ = computed([hidden_TD, head_VD, with_one_TE, with_bias_VE, labels_T], ("kl_teacher_student",))
    logq_TV = (hidden_TE @ head_VE.T + bias_V).log_softmax(-1)
    right_T = (logq_TV.exp() * (logq_TV - (hidden_TD @ head_VD.T).log_softmax(-1))).sum(-1)
    torch.testing.assert_close(ours.kl_teacher_student, right_T)


def test_bfloat16_is_computed_in_float32() -> None:
    half = [x.bfloat16() if x.is_floating_point() else x for x in random_inputs(5.0)]
    ours = computed(half, SMOOTH, trains=True, budget_mib=BUDGETS["several tiles"])
    exact = computed(doubles(half), SMOOTH, trains=True, implementation="reference")
    # values as in float32; gradients are rounded once, at the end, to the 8 bits of their tensors
    assert_alike(ours, exact, SMOOTH, (1e-5, 4e-3))


def test_the_sides_may_have_different_dtypes() -> None:
    inputs = random_inputs(2.0)
    mixed = [inputs[0].double(), inputs[1].double(), inputs[2].bfloat16(), inputs[3].bfloat16(), inputs[4]]
    stats, leaves = computed(mixed, ("jsd",), trains=True)
    grads = torch.autograd.grad(stats.jsd.sum(), leaves)
    assert [x.dtype for x in (stats.jsd, *grads)] == [torch.float64] * 3 + [torch.bfloat16] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_teacher_equal_to_the_student_has_no_divergence(dtype: torch.dtype) -> None:
    hidden_TD, head_VD, *_, labels_T = random_inputs(10.0)
    fields = ("kl_teacher_student", "kl_student_teacher", "jsd")
    inputs = [x.to(dtype) for x in (hidden_TD, head_VD, hidden_TD, head_VD)]
    stats, leaves = computed([*inputs, labels_T], fields)
    for name in fields:
        assert not getattr(stats, name).any(), name
        for grad in torch.autograd.grad(getattr(stats, name).sum(), leaves[:2], retain_graph=True):
            assert not grad.any(), name


def test_log_probabilities_of_the_tail_keep_their_digits() -> None:
    """All tokens but one share e^-60: 1 - q would be 0 in float32."""
    logits_TV = torch.zeros(1, V)
    logits_TV[0, 3] = 60.0
    stats, _ = computed(
        [logits_TV, torch.eye(V), logits_TV / 2, torch.eye(V), torch.tensor([3])], TEACHER_MENU, top_k=1
    )
    rest = torch.log(torch.tensor(V - 1.0))
    torch.testing.assert_close(stats.student_tail_logp, (rest - 60)[None], rtol=1e-6, atol=0)
    torch.testing.assert_close(stats.teacher_tail_logp, (rest - 30)[None], rtol=1e-6, atol=0)


@pytest.mark.parametrize("num_tokens", [0, 1])
def test_one_token_and_none(num_tokens: int) -> None:
    hidden_TD, head_VD, hidden_TE, head_VE, labels_T = doubles(random_inputs(2.0))
    at = slice(5, 5 + num_tokens)
    inputs = [hidden_TD[at], head_VD, hidden_TE[at], head_VE, labels_T[at]]
    ours = computed(inputs, TEACHER_MENU, trains=True)
    assert_alike(
        ours, computed(inputs, TEACHER_MENU, trains=True, implementation="reference"), TEACHER_MENU, (1e-9, 1e-9)
    )
    head_grad = torch.autograd.grad(ours[0].jsd.sum(), ours[1][1])[0]
    assert bool(head_grad.any()) == (num_tokens > 0)


def test_a_field_that_no_loss_reads_has_no_effect_on_the_gradient() -> None:
    inputs = doubles(random_inputs(2.0))
    alone, beside = (computed(inputs, fields) for fields in (("jsd",), TEACHER_MENU))
    grads = [torch.autograd.grad(weighted(stats.jsd), leaves[0])[0] for stats, leaves in (alone, beside)]
    assert torch.equal(*grads)


def test_what_cannot_be_computed_is_refused() -> None:
    inputs = random_inputs(1.0, (V, V - 4))
    hidden_TD, head_VD, *_, labels_T = inputs
    with pytest.raises(ValueError, match="no teacher is given, and jsd need"):
        token_stats(hidden_TD, head_VD, labels_T, fields=("logp", "jsd"))
    with pytest.raises(AttributeError, match=r"'jsd' was not requested; declare it with @needs\('jsd'\)"):
        _ = computed(inputs, ("kl_teacher_student",))[0].jsd
    with pytest.raises(ValueError, match="no such token statistic: js; the menu is logp"):
        computed(inputs, ("js",))
    with pytest.raises(ValueError, match="overlap_k need top_k above 0"):
        computed(inputs, ("overlap_k",), top_k=0)
    with pytest.raises(ValueError, match="top_k=33 must be below the 33 tokens that student and teacher share"):
        computed(inputs, ("top_kl_teacher_student",), top_k=33)
    for beta in (0.0, 1.0):
        with pytest.raises(ValueError, match=f"beta={beta} must be between 0 and 1"):
            computed(inputs, ("jsd",), beta=beta)
    beyond = [*inputs[:4], labels_T.index_fill(0, torch.tensor([3]), V - 1)]
    with pytest.raises(ValueError, match=rf"labels_T\[3\]={V - 1} is not one of the {V - 4} tokens"):
        computed(beyond, ("teacher_logp",))
    assert computed(beyond, ("logp", "teacher_entropy", "jsd"))[0].jsd.isfinite().all()


def test_the_student_alone_is_as_without_a_teacher() -> None:
    hidden_TD, head_VD, *_, labels_T = inputs = random_inputs(3.0, (V, V - 4))
    stats, _ = computed(inputs, (*MENU, "jsd"))
    alone = token_stats(hidden_TD, head_VD, labels_T, fields=MENU, top_k=K)
    for name in MENU:
        assert torch.equal(getattr(stats, name), getattr(alone, name)), name


def test_a_shard_of_the_teacher_must_have_the_tokens_of_the_student() -> None:
    hidden_TD, head_VD, hidden_TE, head_VE, labels_T = random_inputs(1.0)
    teacher = Teacher(hidden_TE, head_VE)
    with pytest.raises(ValueError, match=r"the teacher's head has 37 rows here and 40 in all \(Teacher.total\)"):
        teacher_stats(hidden_TD, torch.cat([head_VD, head_VD]), labels_T, replace(teacher, total=40), fields=("jsd",))
