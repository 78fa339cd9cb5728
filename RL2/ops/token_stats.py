"""Token statistics: the only training code that sees logits.

ops/tally.py holds the mathematics and ops/token_tiles.py the tiles. Shapes: T tokens, V vocabulary, D hidden size, K of
the most likely tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

from RL2.ops.one_pass import Expected
from RL2.ops.tiles import VocabularyShard, gathered_head, product
from RL2.ops.token_tiles import Chunked, Job
from RL2.types import MENU, TEACHER_MENU, TokenStats

Implementation = Literal["auto", "reference", "chunked", "triton"]


@dataclass(frozen=True)
class LogitTransform:
    """Change of the logits after the head: c tanh(s z / c) with scale s and soft cap c; s z without a cap."""

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, z: Tensor) -> Tensor:
        """Return the changed logits."""
        z = z * self.scale
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)


UNCHANGED = LogitTransform()
"""The transform of models whose logits are the result of the head."""


def token_stats(
    hidden_TD: Tensor,
    head_VD: Tensor,
    labels_T: Tensor,
    *,
    temperature: float = 1.0,
    transform: LogitTransform = UNCHANGED,
    fields: Sequence[str],
    top_k: int = 0,
    tp: VocabularyShard | None = None,
    implementation: Implementation = "auto",
    budget_mib: float | None = None,
    expected: Expected | None = None,
) -> TokenStats:
    """Return statistics of softmax(transform(hidden @ head.T) / temperature) at each token.

    They are differentiable in `hidden` and `head`. `fields` names the statistics, out of `types.MENU`; `top_k` is the
    K of `top_logp` and `top_id`. Results are float32 [T] (float64 for float64 inputs), or [T, K]. Half-precision inputs
    are multiplied with float32 accumulation.

    `reference` builds dense logits for autograd. `chunked` holds `budget_mib` of logits at a time and recomputes them
    in the backward pass, whose gradient is in closed form. `triton` does the same with two GPU kernels. `auto` is
    `triton` on a GPU and `chunked` elsewhere. With the `expected` loss of each token, the gradient is taken in the
    forward pass, from the same logits; the backward pass corrects it where the loss turns out to be another one.

    Raise ValueError for an unknown field, for `top_k` that does not match the fields, and for a label outside the
    vocabulary, such as -100: exclude tokens by `weight_T` instead.
    """
    check_fields(fields, top_k)
    check_labels(labels_T, len(head_VD) if tp is None else tp.total)
    if implementation == "reference":
        whole_VD = head_VD if tp is None else gathered_head(head_VD, tp.group)
        logits_TV = transform(product(hidden_TD, whole_VD.T)) / temperature
        return reference_stats(logits_TV, labels_T, fields, top_k)
    if implementation == "auto":
        implementation = "triton" if hidden_TD.is_cuda and find_spec("triton") else "chunked"
    names = tuple(name for name in MENU if name in fields)
    cap = transform.softcap and transform.softcap / temperature
    job = Job(names, top_k, transform.scale / temperature, cap, tp, implementation == "triton", budget_mib)
    return TokenStats(**dict(zip(names, Chunked.apply(hidden_TD, head_VD, labels_T, job, expected), strict=True)))


def check_fields(fields: Sequence[str], top_k: int) -> None:
    """Raise ValueError for a field that is not on the menu, or `top_k` that does not match the fields."""
    if taught := [name for name in fields if name in TEACHER_MENU]:
        raise ValueError(f"no teacher is given, and {', '.join(taught)} need one: call RL2.ops.teacher_stats")
    if unknown := set(fields) - set(MENU):
        raise ValueError(f"no such token statistic: {', '.join(sorted(unknown))}; the menu is {', '.join(MENU)}")
    wants_top = bool({"top_logp", "top_id"} & set(fields))
    if wants_top != (top_k > 0):
        raise ValueError(f"top_k={top_k} and the fields {', '.join(fields)}: top_logp and top_id need top_k above 0")


def check_labels(labels_T: Tensor, vocabulary: int) -> None:
    """Raise ValueError unless all labels are tokens. It synchronises with the device once per call, not per tile."""
    if not len(labels_T):
        return
    smallest, largest = torch.stack(torch.aminmax(labels_T)).tolist()
    if smallest < 0 or largest >= vocabulary:
        wrong = smallest if smallest < 0 else largest
        place = int((labels_T == wrong).nonzero()[0, 0])
        raise ValueError(f"labels_T[{place}]={wrong} is not one of the {vocabulary} tokens of the vocabulary")


def reference_stats(logits_TV: Tensor, labels_T: Tensor, fields: Sequence[str], top_k: int = 0) -> TokenStats:
    """Return statistics by their dense definition, in the dtype of the logits (float64 for tests)."""
    logp_TV = logits_TV.log_softmax(-1)
    order_TV = logits_TV.sort(dim=-1, descending=True, stable=True).indices  # equal logits by id
    top_id_TK = order_TV[:, :top_k]

    def log_of_the_others(label_T: Tensor) -> Tensor:
        others_TV = logits_TV.scatter(1, label_T[:, None], -torch.inf)
        return others_TV.logsumexp(-1) - logits_TV.logsumexp(-1)

    menu = {
        "logp": lambda: logp_TV.gather(1, labels_T[:, None])[:, 0],
        "log1mp": lambda: log_of_the_others(labels_T),
        "max_logp": lambda: logp_TV.gather(1, order_TV[:, :1])[:, 0],
        "max_log1mp": lambda: log_of_the_others(order_TV[:, 0]),
        "entropy": lambda: -(logp_TV.exp() * logp_TV).sum(-1),
        "rank": lambda: (order_TV == labels_T[:, None]).to(logp_TV.dtype).argmax(-1).to(logp_TV.dtype) + 1,
        "top_logp": lambda: logp_TV.gather(1, top_id_TK),
        "top_id": lambda: top_id_TK,
        "sum_p2": lambda: logp_TV.exp().square().sum(-1),
    }
    return TokenStats(**{name: menu[name]() for name in fields})
