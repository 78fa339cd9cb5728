"""The check of an objective with a teacher: the divergence that its expected gradient belongs to.

Shape letters: T tokens, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from RL2.ops.teacher_stats import reference_teacher_stats
from RL2.tools.check_objective.subject import Subject, SyntheticBatch, gradient, label_by_label, synthetic_batch
from RL2.tools.checking import Setting, Unsound

DIVERGENCES = ("kl_student_teacher", "kl_teacher_student", "jsd")
NEAR, FAR = 0.01, 5.0
"""Scale of the difference to the teacher's hidden states: log-ratios of some hundredths, and of tens."""


def expectation(subject: Subject) -> str:
    """Check the gradient that sampling gives on average: the sum over labels a of p_a times the gradient at a.

    A divergence of the menu whose gradient it is near the teacher must also be the one far from it.
    """
    whole = synthetic_batch(subject.vocabulary)
    g = torch.Generator().manual_seed(2)
    noise_TD = torch.randn(whole.hidden_TD.shape, generator=g, dtype=torch.float64)
    found = {}
    for setting in subject.settings:
        near, far = (whole.hidden_TD + scale * noise_TD for scale in (NEAR, FAR))
        near_TV, far_TV = (_expected(subject, setting, whole, teacher_TD) for teacher_TD in (near, far))
        changed = subject.named(setting)
        at = f"with {changed}: " if changed else ""
        if not _is_zero(_exact(subject, setting, whole, far, "kl_student_teacher")) and _is_zero(far_TV):
            raise Unsound(
                f"{at}its expected gradient is 0: a detached divergence as an advantage, such as that of the top K, is "
                "the same for every sampled token, and a constant times the gradient of logp is 0 on average. Return "
                "the divergence itself, or weigh logp with (logp - teacher_logp).detach()"
            )
        factors = {name: _factor(near_TV, _exact(subject, setting, whole, near, name)) for name in DIVERGENCES}
        name, factor = next(((name, factor) for name, factor in factors.items() if factor), ("", 0.0))
        if name and not _same(far_TV, factor * _exact(subject, setting, whole, far, name)):
            raise Unsound(
                f"{at}its expected gradient is that of {name} only where student and teacher are close: a clamped "
                "log-ratio. Beyond the clamp, where the two differ most, it is the gradient of no divergence. Remove "
                "the clamp on logp - teacher_logp"
            )
        found[changed] = name and (name if abs(factor - 1) < 1e-6 else f"{factor:.6g} times {name}")
    named = dict.fromkeys(found.values())
    if "" in named:
        return "its expected gradient is not that of a single divergence of the menu"
    return f"its expected gradient is that of {', '.join(named)}, and 0 where the student is the teacher"


def _expected(subject: Subject, setting: Setting, on: SyntheticBatch, teacher_TD: Tensor) -> Tensor:
    """Return the expected gradient with respect to the logits of each token, [T, V]."""
    every = label_by_label(on, teacher_TD)
    leaf_NV = every.logits_TV.requires_grad_()
    loss_N, _ = subject.dense(setting, leaf_NV, every)
    (grad_NV,) = gradient(loss_N, on.logits_TV.softmax(-1).flatten(), leaf_NV)
    return grad_NV.view(len(on.hidden_TD), -1, grad_NV.shape[1]).sum(1)


def _exact(subject: Subject, setting: Setting, on: SyntheticBatch, teacher_TD: Tensor, name: str) -> Tensor:
    """Return the gradient of a divergence with respect to the logits of each token, [T, V]."""
    leaf_TV = on.logits_TV.requires_grad_()
    teacher_TV = teacher_TD @ on.head_VD.T
    stats = reference_teacher_stats(leaf_TV, teacher_TV, on.batch.labels_T, (name,), beta=subject.beta(setting))
    value_T = getattr(stats, name)
    return gradient(value_T, torch.ones_like(value_T), leaf_TV)[0]


def _factor(x: Tensor, y: Tensor) -> float:
    """Return c if x = c y with c above 0, else 0."""
    factor = float((x * y).sum() / y.square().sum().clamp(min=1e-300))
    return factor if factor > 0 and _same(x, factor * y) else 0.0


def _is_zero(x: Tensor) -> bool:
    return bool(x.norm() <= 1e-9)


def _same(x: Tensor, y: Tensor) -> bool:
    return bool((x - y).norm() <= 1e-7 * y.norm())
