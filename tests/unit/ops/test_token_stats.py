"""The statistics seam against the dense definition in float64. T tokens, V vocabulary, D hidden size, K best tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from RL2.ops.tally import merge, tally, top
from RL2.ops.tiles import VocabularyShard
from RL2.ops.token_stats import Implementation, token_stats
from RL2.types import MENU, TokenStats

T, V, D, K = 48, 37, 16, 5

ALL_AT_ONCE = 64.0
COLUMNS = 13 * 48 * 4 / 2**20
"""MiB of tiles of 48 tokens and 13 columns, which do not divide V."""
NARROW = 48 * 4 / 2**20
"""Tiles of a single column."""
TOKENS = 5 * 37 * 4 / 2**20
"""With `rank` a tile has all columns: 5 tokens, which do not divide T."""

WITHOUT_RANK = tuple(name for name in MENU if name != "rank")
TILINGS = {
    "whole": (MENU, ALL_AT_ONCE),
    "columns": (WITHOUT_RANK, COLUMNS),
    "narrow": (WITHOUT_RANK, NARROW),
    "tokens": (MENU, TOKENS),
}
NOT_DIFFERENTIABLE = ("rank", "top_id")


def random_inputs(scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, head and labels; in half of the tokens the label is the mode."""
    g = torch.Generator().manual_seed(0)
    hidden_TD = torch.randn(T, D, generator=g) * scale / D**0.5
    head_VD = torch.randn(V, D, generator=g)
    labels_T = torch.randint(0, V, (T,), generator=g)
    labels_T[::2] = (hidden_TD @ head_VD.T).argmax(-1)[::2]
    return hidden_TD, head_VD, labels_T


def adversarial_inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Logits as they are (the head is the identity): near certainty for and against the label, ties, and all equal."""
    g = torch.Generator().manual_seed(1)
    logits_TV = torch.randn(T, V, generator=g)
    labels_T = torch.randint(0, V, (T,), generator=g)
    rows = torch.arange(T)
    gap_T = torch.linspace(0, 80, T)  # p = 1 - 1e-12 at about 31
    sure_T = torch.where(rows % 2 == 0, labels_T, torch.randint(0, V, (T,), generator=g))
    logits_TV[rows, sure_T] += gap_T
    logits_TV[40:] = logits_TV[40:].round()  # many ties
    logits_TV[46:] = 0.0
    return logits_TV, torch.eye(V), labels_T


INPUTS = {
    "scale 1": lambda: random_inputs(1.0),
    "scale 10": lambda: random_inputs(10.0),
    "scale 40": lambda: random_inputs(40.0),
    "adversarial": adversarial_inputs,
}


def assert_agrees(
    ours: TokenStats,
    exact: TokenStats,
    leaves: tuple[list[Tensor], list[Tensor]],
    fields: tuple[str, ...],
    tolerances: tuple[float, float],
) -> None:
    """Values token by token, absolutely and relatively; gradients by their norm."""
    for name in fields:
        value, right = getattr(ours, name), getattr(exact, name)
        assert value.isfinite().all()
        if name in NOT_DIFFERENTIABLE:
            assert torch.equal(value.double(), right.double()), name
            continue
        torch.testing.assert_close(value.double(), right.double(), rtol=tolerances[0], atol=tolerances[0])
        weight = torch.linspace(-1, 1.5, value.numel(), dtype=torch.float64).view(value.shape)
        grads, rights = (
            torch.autograd.grad((x * weight.to(x.dtype)).sum(), leaf, retain_graph=True)
            for x, leaf in zip((value, right), leaves, strict=True)
        )
        for grad, right_grad in zip(grads, rights, strict=True):
            error = (grad.double() - right_grad).norm() / right_grad.norm()
            assert error < tolerances[1], (name, error)


@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize("tiling", TILINGS)
@pytest.mark.parametrize("case", INPUTS)
@pytest.mark.parametrize(("dtype", "tolerances"), [(torch.float64, (1e-9, 1e-9)), (torch.float32, (1e-5, 1e-4))])
def test_chunked_is_the_dense_definition(
    dtype: torch.dtype, tolerances: tuple[float, float], case: str, tiling: str, temperature: float
) -> None:
    hidden_TD, head_VD, labels_T = INPUTS[case]()
    fields, budget_mib = TILINGS[tiling]
    ours = [x.to(dtype).requires_grad_() for x in (hidden_TD, head_VD)]
    exact = [x.double().requires_grad_() for x in (hidden_TD, head_VD)]
    how = {"temperature": temperature, "fields": fields, "top_k": K}
    stats = token_stats(*ours, labels_T, **how, budget_mib=budget_mib)  # type: ignore[arg-type]
    reference = token_stats(*exact, labels_T, **how, implementation="reference")  # type: ignore[arg-type]
    assert_agrees(stats, reference, (ours, exact), fields, tolerances)


def test_the_reference_is_the_textbook() -> None:
    """The one thing everything else is compared with, against probabilities written out."""
    logits_TV, head_VD, labels_T = (x.double() if x.is_floating_point() else x for x in random_inputs(3.0))
    stats = token_stats(logits_TV, head_VD, labels_T, fields=MENU, top_k=K, implementation="reference")
    p_TV = (logits_TV @ head_VD.T).exp()
    p_TV = p_TV / p_TV.sum(-1, keepdim=True)
    for t in range(T):
        p, a = p_TV[t], int(labels_T[t])
        order = sorted(range(V), key=lambda i: (-p[i].item(), i))
        torch.testing.assert_close(stats.logp[t], p[a].log())
        torch.testing.assert_close(stats.log1mp[t], (1 - p[a]).log())
        torch.testing.assert_close(stats.max_logp[t], p.max().log())
        torch.testing.assert_close(stats.max_log1mp[t], (1 - p.max()).log())
        torch.testing.assert_close(stats.entropy[t], -(p * p.log()).sum())
        torch.testing.assert_close(stats.sum_p2[t], (p * p).sum())
        assert stats.rank[t] == 1 + order.index(a)
        assert stats.top_id[t].tolist() == order[:K]
        torch.testing.assert_close(stats.top_logp[t], p[order[:K]].log())


@pytest.mark.parametrize("budget_mib", [ALL_AT_ONCE, COLUMNS])
def test_all_gradients_together_are_the_sum(budget_mib: float) -> None:
    hidden_TD, head_VD, labels_T = random_inputs(5.0)
    leaf_TD = hidden_TD.double().requires_grad_()
    fields = tuple(name for name in WITHOUT_RANK if name != "top_id")

    def total(implementation: Implementation) -> Tensor:
        stats = token_stats(
            leaf_TD,
            head_VD.double(),
            labels_T,
            fields=fields,
            top_k=K,
            implementation=implementation,
            budget_mib=budget_mib,
        )
        return sum(((i + 1) * getattr(stats, name).sum() for i, name in enumerate(fields)), torch.zeros(()))

    (ours,) = torch.autograd.grad(total("chunked"), leaf_TD)
    (exact,) = torch.autograd.grad(total("reference"), leaf_TD)
    torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-11)


def test_log1mp_at_logit_scale_40() -> None:
    """`log(-expm1(logp))`, the obvious way, is a second thing to compare with: it must be seen to fail."""
    logits_TV, head_VD, _ = random_inputs(40.0)
    logits_TV = logits_TV @ head_VD.T
    labels_T = logits_TV.argmax(-1)
    fields = ("logp", "log1mp")
    ours = token_stats(logits_TV, torch.eye(V), labels_T, fields=fields)
    exact = token_stats(
        logits_TV.double(), torch.eye(V, dtype=torch.float64), labels_T, fields=fields, implementation="reference"
    )
    assert (ours.log1mp.double() - exact.log1mp).abs().max() < 1e-5
    naive = (-torch.expm1(logits_TV.log_softmax(-1).gather(1, labels_T[:, None])[:, 0])).log()
    assert not (naive.double() - exact.log1mp).abs().max() < 1e-2


@pytest.mark.parametrize("gap", [5.0, 28.0, 60.0, 500.0])
def test_near_certainty_keeps_its_precision(gap: float) -> None:
    """p_m = 1 - V exp(-gap): log(1 - p) stays exact where log(-expm1(logp)) in float32 is lost."""
    logits_TV = torch.zeros(2, V)
    logits_TV[:, 3] = gap
    labels_T = torch.tensor([3, 7])
    stats = token_stats(logits_TV, torch.eye(V), labels_T, fields=MENU, top_k=K)
    rest = torch.log(torch.tensor(V - 1.0, dtype=torch.float64))
    others_over_mode = rest - gap
    exact = others_over_mode - torch.log1p(torch.exp(others_over_mode))
    torch.testing.assert_close(stats.max_log1mp.double(), exact.expand(2), rtol=1e-6, atol=0)
    torch.testing.assert_close(stats.log1mp[0].double(), exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(stats.max_logp[0].double(), -torch.log1p(others_over_mode.exp()), rtol=1e-5, atol=1e-40)
    for name in MENU:
        assert getattr(stats, name).isfinite().all(), name


def test_ties_are_ranked_by_id() -> None:
    logits_TV = torch.zeros(V, V, dtype=torch.float64)
    stats = token_stats(
        logits_TV, torch.eye(V, dtype=torch.float64), torch.arange(V), fields=("rank", "top_id", "entropy"), top_k=K
    )
    assert stats.rank.tolist() == list(range(1, V + 1))
    assert stats.top_id.tolist() == [list(range(K))] * V
    torch.testing.assert_close(stats.entropy, torch.full((V,), float(V), dtype=torch.float64).log())


def test_the_best_are_exact_where_ties_straddle_the_last_place() -> None:
    g = torch.Generator().manual_seed(0)
    z_CW = torch.randint(0, 4, (200, V), generator=g).float()
    value_CK, id_CK = top(z_CW, 100, K)
    for row, values, ids in zip(z_CW.tolist(), value_CK.tolist(), id_CK.tolist(), strict=True):
        order = sorted(range(V), key=lambda i: (-row[i], i))[:K]
        assert ids == [100 + i for i in order]
        assert values == [row[i] for i in order]


def test_merging_does_not_depend_on_the_cut() -> None:
    g = torch.Generator().manual_seed(0)
    z_CV = torch.randn(20, V, generator=g, dtype=torch.float64) * 8
    z_CV[3] = 1.0

    def part(start: int, end: int):  # type: ignore[no-untyped-def]
        tile = z_CV[:, start:end].clone()
        return tally(tile, start, torch.empty_like(tile), with_z=True, with_sq=True)

    whole = part(0, V)
    for cuts in ((1, 2), (5, 30), (36, 36), (12, 13)):
        parts = [part(a, b) for a, b in zip((0, *cuts), (*cuts, V), strict=True) if b > a]
        for order in (parts, parts[::-1]):
            merged = order[0]
            for other in order[1:]:
                merged = merge(merged, other)
            for name, value, right in zip(whole._fields, merged, whole, strict=True):
                torch.testing.assert_close(value, right, msg=name)


def test_a_tied_head_gets_both_gradients() -> None:
    """Embedding and head are one tensor: the gradient through the hidden states adds to that of the head."""
    _, embedding_VD, labels_T = random_inputs(1.0)

    def gradient(implementation: Implementation) -> Tensor:
        tied_VD = embedding_VD.double().requires_grad_()
        stats = token_stats(
            tied_VD[labels_T.roll(1)],
            tied_VD,
            labels_T,
            fields=("logp", "entropy"),
            implementation=implementation,
            budget_mib=COLUMNS,
        )
        (stats.logp - 0.1 * stats.entropy).sum().backward()
        assert tied_VD.grad is not None
        return tied_VD.grad

    torch.testing.assert_close(gradient("chunked"), gradient("reference"), rtol=1e-9, atol=1e-12)


def test_bfloat16_is_computed_in_float32() -> None:
    hidden_TD, head_VD, labels_T = random_inputs(5.0)
    half = [x.bfloat16().requires_grad_() for x in (hidden_TD, head_VD)]
    exact = [x.detach().double().requires_grad_() for x in half]
    fields = tuple(name for name in MENU if name not in NOT_DIFFERENTIABLE)
    stats = token_stats(*half, labels_T, fields=fields, top_k=K, budget_mib=COLUMNS)
    reference = token_stats(*exact, labels_T, fields=fields, top_k=K, implementation="reference")
    # values as in float32; gradients are rounded once, at the end, to the 8 bits of their tensors
    assert_agrees(stats, reference, (half, exact), fields, (1e-5, 4e-3))


def test_only_what_is_asked_for_is_there() -> None:
    stats = token_stats(*random_inputs(1.0), fields=("logp",))
    assert stats.logp.shape == (T,)
    with pytest.raises(AttributeError, match=r"'entropy' was not requested; declare it with @needs\('entropy'\)"):
        _ = stats.entropy
    with pytest.raises(ValueError, match="no such token statistic: logprob; the menu is logp"):
        token_stats(*random_inputs(1.0), fields=("logprob",))
    with pytest.raises(ValueError, match="top_logp and top_id need top_k above 0"):
        token_stats(*random_inputs(1.0), fields=("top_logp",))
    with pytest.raises(ValueError, match="top_k=38 must be at most the vocabulary, 37 tokens"):
        token_stats(*random_inputs(1.0), fields=("top_logp",), top_k=38)


def test_an_empty_batch_has_gradients_of_zero() -> None:
    hidden_TD = torch.zeros(0, D, requires_grad=True)
    head_VD = torch.randn(V, D, requires_grad=True)
    stats = token_stats(hidden_TD, head_VD, torch.zeros(0, dtype=torch.long), fields=MENU, top_k=K)
    stats.logp.sum().backward()
    assert head_VD.grad is not None
    assert not head_VD.grad.any()


@pytest.mark.parametrize("label", [-(2**40), -100, -1, V, 1000, 2**40])
@pytest.mark.parametrize("shard", [None, VocabularyShard(group=None, start=3, total=V)])  # type: ignore[arg-type]
@pytest.mark.parametrize("implementation", ["reference", "chunked", "triton"])
def test_labels_outside_the_vocabulary_are_refused(
    implementation: Implementation, shard: VocabularyShard | None, label: int
) -> None:
    """At any place, and on a shard by the size of the whole vocabulary."""
    hidden_TD, head_VD, labels_T = random_inputs(1.0)
    head_VD = head_VD if shard is None else head_VD[3:6]
    for place in (0, T - 1):
        wrong_T = labels_T.index_fill(0, torch.tensor([place]), label)
        with pytest.raises(ValueError, match=rf"labels_T\[{place}\]={label} is not one of the {V} tokens"):
            token_stats(hidden_TD, head_VD, wrong_T, fields=("logp",), tp=shard, implementation=implementation)


def test_statistics_at_some_positions() -> None:
    stats = TokenStats(logp=torch.arange(4.0), top_id=torch.arange(8).reshape(4, 2))
    some = stats.at(torch.tensor([True, False, False, True]))
    assert (some.logp.tolist(), some.top_id.tolist()) == ([0, 3], [[0, 1], [6, 7]])
    assert vars(stats.map(lambda x: x * 2)).keys() == {"logp", "top_id"}
    with pytest.raises(AttributeError, match="was not requested"):
        _ = some.entropy
