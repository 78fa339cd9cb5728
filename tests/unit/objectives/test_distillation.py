"""Objectives of distillation through the statistics seam, against formulas over the vocabulary in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from RL2.objectives.distillation import forward_kl_gradient, opd_gradient
from RL2.objectives.registry import TEACHER_OBJECTIVES, BoundObjective
from RL2.ops.teacher_stats import Teacher, teacher_stats
from RL2.tools.check_objective.subject import synthetic_batch

V = 16


def exact(
    name: str, p_TV: Tensor, q_TV: Tensor, labels_T: Tensor, old_logp_T: Tensor, beta: float, lengths: list[int]
) -> Tensor:
    """Return the loss from both distributions."""
    if name == "opd":
        return (p_TV * (p_TV / q_TV).log()).sum(-1)
    if name == "forward_kl":
        return (q_TV * (q_TV / p_TV).log()).sum(-1)
    if name == "gkd":
        m_TV = beta * q_TV + (1 - beta) * p_TV
        return beta * (q_TV * (q_TV / m_TV).log()).sum(-1) + (1 - beta) * (p_TV * (p_TV / m_TV).log()).sum(-1)
    p_T, q_T = (x.gather(1, labels_T[:, None])[:, 0] for x in (p_TV, q_TV))
    if name == "iw_opd":
        parts = []
        for r_T, a_T in zip(
            (p_T / old_logp_T.exp()).split(lengths), (q_T.log() - old_logp_T).split(lengths), strict=True
        ):
            size_T = a_T.abs()
            before_T = torch.tensor([float(size_T[:t].sum()) for t in range(len(size_T))], dtype=torch.float64)
            parts.append(-r_T * ((1 + 0.5 * (1 - before_T / size_T.sum())) * a_T).detach())
        return torch.cat(parts)
    return p_T / old_logp_T.exp() * (p_T / q_T).log().detach()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("beta", [0.5, 0.2])
@pytest.mark.parametrize("name", TEACHER_OBJECTIVES)
def test_loss_and_gradient_are_those_of_the_formula(
    name: str, beta: float, dtype: torch.dtype, tolerance: float
) -> None:
    on, knobs = synthetic_batch(V), {"beta": beta} if name == "gkd" else {}
    objective = BoundObjective(name, TEACHER_OBJECTIVES[name], knobs)
    assert on.batch.old_logp_T is not None
    exact_TV = on.logits_TV.requires_grad_()
    p_TV, q_TV = exact_TV.softmax(-1), on.teacher_TV.softmax(-1)
    right_T = exact(name, p_TV, q_TV, on.batch.labels_T, on.batch.old_logp_T, beta, on.batch.lengths_B.tolist())
    (right_TV,) = torch.autograd.grad(right_T.sum(), exact_TV)

    leaf_TV, teacher_TV, eye_VV = exact_TV.detach().to(dtype).requires_grad_(), on.teacher_TV.to(dtype), torch.eye(V)
    request = objective.request()
    how: dict[str, Any] = {"fields": request.fields, "top_k": request.top_k, "beta": request.beta}
    teacher = Teacher(teacher_TV, eye_VV.to(dtype))
    batch = on.batch.with_(old_logp_T=on.batch.old_logp_T.to(dtype))
    loss_T, _ = objective.loss(teacher_stats(leaf_TV, eye_VV.to(dtype), batch.labels_T, teacher, **how), batch)
    (grad_TV,) = torch.autograd.grad(loss_T.sum(), leaf_TV)
    assert (loss_T.double() - right_T).norm() <= tolerance * right_T.norm()
    assert (grad_TV.double() - right_TV).norm() <= 10 * tolerance * right_TV.norm()


def entropy_change(grad_TV: Tensor, logits_TV: Tensor) -> Tensor:
    """Return the first-order change of the entropy by a step against the gradient, [T]."""
    leaf_TV = logits_TV.clone().requires_grad_()
    logp_TV = leaf_TV.log_softmax(-1)
    (entropy_TV,) = torch.autograd.grad(-(logp_TV.exp() * logp_TV).sum(), leaf_TV)
    return -(grad_TV * entropy_TV).sum(-1)


def test_the_entropy_changes_as_the_cards_say() -> None:
    """docs/objectives.md: with a uniform teacher, and with one that is certain of the mode."""
    g = torch.Generator().manual_seed(0)
    logits_TV = 6 * torch.randn(2000, V, generator=g).double() * torch.rand(2000, 1, generator=g).double()
    batch, p_TV = synthetic_batch(V).batch, logits_TV.softmax(-1)
    uniform_TV, certain_TV = torch.full_like(p_TV, 1 / V), torch.eye(V).double()[logits_TV.argmax(-1)]
    for gradient in (opd_gradient, forward_kl_gradient):
        assert (entropy_change(gradient(p_TV, uniform_TV, batch), logits_TV) >= -1e-13).all()
    assert (entropy_change(forward_kl_gradient(p_TV, certain_TV, batch), logits_TV) <= 1e-13).all()
