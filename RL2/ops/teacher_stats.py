"""Token statistics with a teacher: a second distribution at each token, from a second head.

Shapes: T tokens, V vocabulary, D hidden size of the student, E of the teacher, K of the most likely tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from RL2.ops.divergence import Side
from RL2.ops.one_pass import Expected
from RL2.ops.teacher_tiles import TILED, Tiled, TiledJob
from RL2.ops.tiles import VocabularyShard, accumulation_dtype, gathered_head, product
from RL2.ops.token_stats import (
    UNCHANGED,
    Implementation,
    LogitTransform,
    check_labels,
    reference_stats,
    token_stats,
)
from RL2.types import MENU, TEACHER_MENU, TOP, TokenStats

PARTS = {
    "cross_entropy": ("kl_teacher_student", "teacher_entropy"),
    "student_top_logp": ("teacher_top_id",),
    "student_tail_logp": ("teacher_top_id",),
    "teacher_tail_logp": ("teacher_top_id",),
    "top_kl_teacher_student": ("teacher_top_logp", "student_top_logp", "teacher_tail_logp", "student_tail_logp"),
    "top_kl_student_teacher": ("teacher_top_logp", "student_top_logp", "teacher_tail_logp", "student_tail_logp"),
    "overlap_k": ("top_id", "teacher_top_id"),
}
"""Statistics that a statistic is computed from."""

LABELLED = {"logp", "rank"}
"""Statistics of the teacher that read the label."""


@dataclass(frozen=True)
class Teacher:
    """Hidden states and head of another model at the same tokens.

    Its tokens have the same ids as the student's. If one head has more rows, as with padding to a rounder size, those
    beyond the other's are left out: fields of the teacher, and fields that compare both, are statistics of each
    softmax over the tokens that both have. `logp` and the other fields of the student alone keep all its tokens.
    """

    hidden_TE: Tensor
    head_VE: Tensor
    temperature: float = 1.0
    """Divides the teacher's logits."""
    transform: LogitTransform = UNCHANGED
    """Change of the teacher's logits after its head."""
    total: int | None = None
    """Size of its vocabulary; None is the number of rows of `head_VE`. A shard has the rows of the student's tokens."""
    trains: bool = False
    """Gradients also flow into `hidden_TE` and `head_VE`."""


def teacher_stats(
    hidden_TD: Tensor,
    head_VD: Tensor,
    labels_T: Tensor,
    teacher: Teacher,
    *,
    temperature: float = 1.0,
    transform: LogitTransform = UNCHANGED,
    fields: Sequence[str],
    top_k: int = 0,
    beta: float = 0.5,
    tp: VocabularyShard | None = None,
    implementation: Implementation = "auto",
    budget_mib: float | None = None,
    expected: Expected | None = None,
) -> TokenStats:
    """Return `token_stats` with a teacher: `fields` may also name statistics of `types.TEACHER_MENU`.

    `temperature`, `transform` and `tp` are the student's; `top_k` is the K of all fields in `types.TOP`, and `beta`
    that of `jsd`. They are differentiable in the student's hidden states and head; in the teacher's if it `trains`.
    Fields of one distribution are computed by `token_stats`. Those that compare both have a gradient in closed form and
    are computed in tiles by torch operations on every device: `triton` concerns only the others. With the `expected`
    loss of each token, the gradient of those that compare both is taken in the forward pass, as by `token_stats`.

    Raise ValueError as `token_stats` does, for `beta` that is not between 0 and 1, for a teacher's shard that lacks
    tokens, and for a label that the teacher does not have if a field reads it.
    """
    _check(fields, top_k, beta)
    student = _Model(hidden_TD, head_VD, temperature, transform)
    other = _Model(teacher.hidden_TE, teacher.head_VE, teacher.temperature, teacher.transform)
    if not teacher.trains:
        other = replace(other, hidden_TD=other.hidden_TD.detach(), head_VD=other.head_VD.detach())
    total, here = _shared(len(head_VD), teacher, tp)
    wanted = _with_parts(fields)
    ours = tuple(name for name in MENU if name in wanted)
    theirs = tuple(name for name in MENU if f"teacher_{name}" in wanted)
    tiled = tuple(name for name in TILED if name in wanted)
    _check_shared(total, labels_T, theirs, tiled, top_k)
    if implementation == "reference":
        logits_TV, teacher_TV = student.logits(tp), other.logits(tp)
        return reference_teacher_stats(logits_TV, teacher_TV, labels_T, fields, top_k, beta)
    how: dict[str, Any] = {"top_k": top_k, "tp": tp, "implementation": implementation, "budget_mib": budget_mib}
    found = student.alone(labels_T, ours, **how) if ours else {}
    student, other = student.first(here), other.first(here)
    if theirs:
        label_T = labels_T if LABELLED & set(theirs) else torch.zeros_like(labels_T)
        found |= {f"teacher_{name}": x for name, x in other.alone(label_T, theirs, **how).items()}
    dtype = accumulation_dtype(hidden_TD)
    if tiled:
        alone = {name: x.detach() for name, x in found.items()}

        def complete(tiled_C: Mapping[str, Tensor], index_C: Tensor) -> dict[str, Tensor]:
            here = {name: x[index_C] for name, x in alone.items()} | dict(tiled_C)
            return {name: here[name] if name in here else _made(name, here, dtype) for name in fields}

        job = TiledJob(tiled, beta, _scales(student, other), tp, budget_mib)
        heads = student.hidden_TD, student.head_VD, other.hidden_TD, other.head_VD
        found |= dict(
            zip(tiled, Tiled.apply(*heads, found.get("teacher_top_id"), job, expected, complete), strict=True)
        )
    return TokenStats(**{name: found[name] if name in found else _made(name, found, dtype) for name in fields})


@dataclass(frozen=True)
class _Model:
    """Hidden states and head of one side, with the change of its logits."""

    hidden_TD: Tensor
    head_VD: Tensor
    temperature: float
    transform: LogitTransform

    def logits(self, tp: VocabularyShard | None) -> Tensor:
        """Return the logits as a whole, for the reference."""
        whole_VD = self.head_VD if tp is None else gathered_head(self.head_VD, tp.group)
        return self.transform(product(self.hidden_TD, whole_VD.T)) / self.temperature

    def first(self, rows: int) -> _Model:
        """Return the model with only the first `rows` of its head; the same one if it has no others."""
        return self if rows == len(self.head_VD) else replace(self, head_VD=self.head_VD[:rows])

    def alone(self, labels_T: Tensor, fields: tuple[str, ...], top_k: int, **how: Any) -> dict[str, Tensor]:
        """Return statistics of this side alone."""
        how |= {"temperature": self.temperature, "transform": self.transform, "fields": fields}
        top_k = top_k if set(TOP) & set(fields) else 0
        return vars(token_stats(self.hidden_TD, self.head_VD, labels_T, top_k=top_k, **how))


def _scales(student: _Model, teacher: _Model) -> dict[Side, tuple[float, float | None]]:
    """Return for each side the factor of hidden @ head.T and the soft cap, both over the temperature."""
    sides: dict[Side, _Model] = {"student": student, "teacher": teacher}
    return {
        name: (one.transform.scale / one.temperature, one.transform.softcap and one.transform.softcap / one.temperature)
        for name, one in sides.items()
    }


def _check(fields: Sequence[str], top_k: int, beta: float) -> None:
    """Raise ValueError for a field that is not on the menu, and for `top_k` or `beta` that do not fit."""
    menu = (*MENU, *TEACHER_MENU)
    if unknown := set(fields) - set(menu):
        raise ValueError(f"no such token statistic: {', '.join(sorted(unknown))}; the menu is {', '.join(menu)}")
    if bool(set(TOP) & set(fields)) != (top_k > 0):
        raise ValueError(f"top_k={top_k} and the fields {', '.join(fields)}: {', '.join(TOP)} need top_k above 0")
    if not 0 < beta < 1:
        raise ValueError(
            f"beta={beta} must be between 0 and 1, where jsd would be 0; read kl_teacher_student or kl_student_teacher"
        )


def _shared(rows: int, teacher: Teacher, tp: VocabularyShard | None) -> tuple[int, int]:
    """Return how many tokens both models have, in all and in this shard, where the student has `rows`."""
    teacher_total = len(teacher.head_VE) if teacher.total is None else teacher.total
    if tp is None:
        total = here = min(rows, teacher_total)
    else:
        total = min(tp.total, teacher_total)
        here = min(rows, total - tp.start)
    if not 0 < here <= len(teacher.head_VE):
        start = 0 if tp is None else tp.start
        raise ValueError(
            f"the teacher's head has {len(teacher.head_VE)} rows here and {teacher_total} in all (Teacher.total); it "
            f"must have those of the student's {rows} tokens from {start} on, as far as it has them, and at least one"
        )
    return total, here


def _check_shared(total: int, labels_T: Tensor, theirs: Sequence[str], tiled: Sequence[str], top_k: int) -> None:
    """Raise ValueError if the `total` tokens that both models have are too few for the fields."""
    if LABELLED & set(theirs):
        check_labels(labels_T, total)
    if top_k > total or (top_k == total and {"student_tail_logp", "teacher_tail_logp"} & set(tiled)):
        raise ValueError(f"top_k={top_k} must be below the {total} tokens that student and teacher share")


def _with_parts(fields: Iterable[str]) -> set[str]:
    """Return `fields` and all statistics that they are computed from."""
    wanted: set[str] = set()
    while fields:
        wanted |= set(fields)
        fields = {part for name in fields for part in PARTS.get(name, ())} - wanted
    return wanted


def _made(name: str, found: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    """Return a statistic that is computed from others."""
    if name == "cross_entropy":
        return found["kl_teacher_student"] + found["teacher_entropy"]
    if name == "overlap_k":  # an id that both have is there twice
        both = torch.cat([found["top_id"], found["teacher_top_id"]], -1).sort(-1).values
        return (both[:, 1:] == both[:, :-1]).sum(-1).to(dtype) / found["top_id"].shape[1]
    q, p = (
        torch.cat([found[f"{side}_top_logp"], found[f"{side}_tail_logp"][:, None]], -1)
        for side in ("teacher", "student")
    )
    first, second = (q, p) if name == "top_kl_teacher_student" else (p, q)
    return (first.exp() * (first - second)).sum(-1)


def reference_teacher_stats(
    logits_TV: Tensor,
    teacher_logits_TV: Tensor,
    labels_T: Tensor,
    fields: Sequence[str],
    top_k: int = 0,
    beta: float = 0.5,
) -> TokenStats:
    """Return statistics by their dense definition, in the dtype of the logits (float64 for tests)."""
    shared = min(logits_TV.shape[1], teacher_logits_TV.shape[1])
    logits_q_TV = teacher_logits_TV[:, :shared]
    logp_TV, logq_TV = (x.log_softmax(-1) for x in (logits_TV[:, :shared], logits_q_TV))
    logm_TV = torch.logaddexp(logq_TV + math.log(beta), logp_TV + math.log1p(-beta))
    top_id_TK = logits_q_TV.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]

    def kl(a_TV: Tensor, b_TV: Tensor) -> Tensor:
        return (a_TV.exp() * (a_TV - b_TV)).sum(-1)

    def tail(log_TV: Tensor) -> Tensor:
        return log_TV.scatter(1, top_id_TK, -torch.inf).logsumexp(-1)

    def buckets(log_TV: Tensor) -> Tensor:
        return torch.cat([log_TV.gather(1, top_id_TK), tail(log_TV)[:, None]], -1)

    def overlap() -> Tensor:
        own_TK = logits_TV.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
        return (own_TK[:, :, None] == top_id_TK[:, None]).any(-1).to(logp_TV.dtype).mean(-1)

    menu = {
        "kl_teacher_student": lambda: kl(logq_TV, logp_TV),
        "kl_student_teacher": lambda: kl(logp_TV, logq_TV),
        "jsd": lambda: beta * kl(logq_TV, logm_TV) + (1 - beta) * kl(logp_TV, logm_TV),
        "cross_entropy": lambda: -(logq_TV.exp() * logp_TV).sum(-1),
        "teacher_tail_logp": lambda: tail(logq_TV),
        "student_top_logp": lambda: logp_TV.gather(1, top_id_TK),
        "student_tail_logp": lambda: tail(logp_TV),
        "top_kl_teacher_student": lambda: kl(buckets(logq_TV), buckets(logp_TV)),
        "top_kl_student_teacher": lambda: kl(buckets(logp_TV), buckets(logq_TV)),
        "overlap_k": overlap,
    }
    ours = tuple(name for name in fields if name in MENU)
    theirs = tuple(name.removeprefix("teacher_") for name in fields if name not in (*MENU, *menu))
    found = vars(reference_stats(logits_TV, labels_T, ours, top_k))
    found |= {f"teacher_{n}": x for n, x in vars(reference_stats(logits_q_TV, labels_T, theirs, top_k)).items()}
    return TokenStats(**{name: found[name] if name in found else menu[name]() for name in fields})
