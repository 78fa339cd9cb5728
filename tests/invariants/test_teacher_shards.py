"""Statistics with a teacher and the vocabulary spread over two processes are those of one. Real processes, gloo."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pools import in_pool
from torch import Tensor

from RL2.ops.one_pass import Expected
from RL2.ops.teacher_stats import Teacher, teacher_stats
from RL2.ops.tiles import VocabularyShard
from RL2.ops.token_stats import Implementation, LogitTransform
from RL2.parallel.processes import Processes
from RL2.types import TEACHER_MENU, TokenStats

T, V, D, E, K = 12, 37, 16, 10, 20
"""20 of the best are more than a shard has."""

START = (0, 19, V)
FIELDS = ("logp", "entropy", "top_id", *TEACHER_MENU)
NOT_DIFFERENTIABLE = ("top_id", "teacher_rank", "teacher_top_id", "overlap_k")
CASES: dict[str, tuple[Implementation, int, int, float]] = {
    "whole tiles": ("chunked", T, V, 64.0),
    "small tiles": ("chunked", T, V, 6 * 4 * 5 * 19 / 2**20),
    "one pass": ("chunked", T, V, 6 * 4 * 5 * 19 / 2**20),
    "one pass, corrected": ("chunked", T, V, 6 * 4 * 5 * 19 / 2**20),
    "smaller teacher": ("chunked", T, V - 4, 64.0),
    "larger teacher": ("chunked", T, V + 3, 64.0),
    "one token": ("chunked", 1, V, 64.0),
    "no token": ("chunked", 0, V, 64.0),
    "reference": ("reference", T, V - 4, 64.0),
}
"""Implementation, tokens, vocabulary of the teacher, and MiB of logits."""


def inputs(num_tokens: int, vocabulary: int) -> tuple[Tensor, ...]:
    """Hidden states and head of both sides, and labels, in float64."""
    g = torch.Generator().manual_seed(0)
    how: dict[str, Any] = {"generator": g, "dtype": torch.float64}
    hidden_TD, hidden_TE = torch.randn(T, D, **how), torch.randn(T, E, **how)
    head_VD, head_VE = torch.randn(V, D, **how), torch.randn(V + 3, E, **how)
    labels_T = torch.randint(0, V - 4, (T,), generator=g)
    return hidden_TD[:num_tokens], head_VD, hidden_TE[:num_tokens], head_VE[:vocabulary], labels_T[:num_tokens]


def loss_of(stats: TokenStats, index_C: Tensor) -> Tensor:
    """Return a weighted sum of all fields of some tokens."""
    loss = torch.zeros((), dtype=torch.float64)
    for i, name in enumerate(name for name in FIELDS if name not in NOT_DIFFERENTIABLE):
        value = getattr(stats, name)
        shape = (T, *value.shape[1:])
        weight = torch.linspace(-1, 1.5, math.prod(shape), dtype=torch.float64).view(shape)
        loss = loss + (value * weight[index_C]).sum() / (i + 1)
    return loss


def expected_in(case: str) -> Expected | None:
    """Return what a case expects: the loss, or another one at some tokens."""
    if case == "one pass, corrected":
        return Expected(lambda stats, index_C: loss_of(stats, index_C) + stats.jsd[index_C % 4 == 0].sum())
    return Expected(loss_of) if case == "one pass" else None


def results(inputs: tuple[Tensor, ...], **how: Any) -> dict[str, Tensor]:
    """Return all fields, and the gradients of one loss on all of them."""
    leaves = [x.clone().requires_grad_() for x in inputs[:4]]
    teacher = Teacher(
        *leaves[2:], temperature=1.3, transform=LogitTransform(softcap=5.0), total=how.pop("total", None), trains=True
    )
    stats = teacher_stats(*leaves[:2], inputs[4], teacher, temperature=0.7, fields=FIELDS, top_k=K, beta=0.3, **how)  # type: ignore[call-arg]
    loss = loss_of(stats, torch.arange(len(inputs[4])))
    names = ("grad hidden", "grad head", "grad teacher hidden", "grad teacher head")
    grads = dict(zip(names, torch.autograd.grad(loss, leaves), strict=True))
    return {name: getattr(stats, name).detach() for name in FIELDS} | grads


def run_cases(folder: Path, processes: Processes) -> dict[Any, dict[str, Tensor]]:
    """Every case, with this process's rows of both heads."""
    start, end = START[processes.rank], START[processes.rank + 1]
    found = {}
    for case, (implementation, num_tokens, vocabulary, budget_mib) in CASES.items():
        hidden_TD, head_VD, hidden_TE, head_VE, labels_T = inputs(num_tokens, vocabulary)
        end_VE = end if end < V else vocabulary
        found[case] = results(
            (hidden_TD, head_VD[start:end], hidden_TE, head_VE[start:end_VE], labels_T),
            tp=VocabularyShard(dist.group.WORLD, start, V),
            total=vocabulary,
            implementation=implementation,
            budget_mib=budget_mib,
            expected=expected_in(case),
        )
    return found


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Results of each of two processes."""
    return in_pool(run_cases, tmp_path_factory.mktemp("shards"), 2)


@pytest.mark.parametrize("case", CASES)
def test_shards_are_one_vocabulary(case: str, pool: list[Any]) -> None:
    _, num_tokens, vocabulary, _ = CASES[case]
    exact = results(inputs(num_tokens, vocabulary), implementation="reference")
    found = [rank[case] for rank in pool]
    heads = {name: torch.cat([own[name] for own in found]) for name in ("grad head", "grad teacher head")}
    for own in found:
        for name, value in (own | heads).items():
            torch.testing.assert_close(value, exact[name], rtol=1e-9, atol=1e-10, msg=name)
