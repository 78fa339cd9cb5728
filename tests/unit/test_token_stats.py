"""The statistics seam against the dense definition in float64. T tokens, V vocabulary, D hidden size."""

import pytest
import torch
from torch import Tensor

from RL2.ops import token_stats as ops
from RL2.ops.token_stats import reference_stats, token_stats
from RL2.types import MENU

T, V, D = 48, 37, 16


def inputs(scale: float, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, head and labels; in half of the tokens the label is the mode."""
    g = torch.Generator().manual_seed(0)
    hidden_TD = torch.randn(T, D, generator=g) * scale / D**0.5
    head_VD = torch.randn(V, D, generator=g)
    labels_T = torch.randint(0, V, (T,), generator=g)
    labels_T[::2] = (hidden_TD @ head_VD.T).argmax(-1)[::2]
    return hidden_TD.to(dtype), head_VD.to(dtype), labels_T


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five tokens a chunk, which does not divide T."""
    monkeypatch.setattr(ops, "CHUNK_BYTES", 4 * V * 5)


@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize("scale", [1.0, 10.0, 40.0])
@pytest.mark.parametrize(
    ("dtype", "value_tolerance", "gradient_tolerance"), [(torch.float64, 1e-10, 1e-9), (torch.float32, 1e-5, 1e-4)]
)
def test_chunked_is_the_dense_definition(
    dtype: torch.dtype, value_tolerance: float, gradient_tolerance: float, scale: float, temperature: float
) -> None:
    hidden_TD, head_VD, labels_T = inputs(scale)
    ours = [x.to(dtype).requires_grad_() for x in (hidden_TD, head_VD)]
    exact = [x.double().requires_grad_() for x in (hidden_TD, head_VD)]
    stats = token_stats(*ours, labels_T, temperature=temperature, fields=MENU)
    reference = token_stats(*exact, labels_T, temperature=temperature, fields=MENU, implementation="reference")
    for name in MENU:
        value_T, exact_T = getattr(stats, name), getattr(reference, name)
        torch.testing.assert_close(value_T.double(), exact_T, rtol=value_tolerance, atol=value_tolerance)
        weight_T = torch.linspace(-1, 1, T, dtype=torch.float64)
        grads = torch.autograd.grad((value_T * weight_T.to(dtype)).sum(), ours, retain_graph=True)
        exact_grads = torch.autograd.grad((exact_T * weight_T).sum(), exact, retain_graph=True)
        for grad, exact_grad in zip(grads, exact_grads, strict=True):
            error = (grad.double() - exact_grad).norm() / exact_grad.norm()
            assert error < gradient_tolerance, (name, error)


def test_all_gradients_together_are_the_sum() -> None:
    hidden_TD, head_VD, labels_T = inputs(5.0, torch.float64)
    leaf_TD = hidden_TD.requires_grad_()

    def total(implementation: str) -> Tensor:
        stats = token_stats(leaf_TD, head_VD, labels_T, fields=MENU, implementation=implementation)  # type: ignore[arg-type]
        return sum(((i + 1) * getattr(stats, name).sum() for i, name in enumerate(MENU)), torch.zeros(()))

    (ours,) = torch.autograd.grad(total("chunked"), leaf_TD)
    (exact,) = torch.autograd.grad(total("reference"), leaf_TD)
    torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("gap", [5.0, 28.0, 60.0, 500.0])
def test_near_certainty_keeps_its_precision(gap: float) -> None:
    """p_m = 1 - V exp(-gap): log(1 - p) stays exact where log(-expm1(logp)) in float32 is lost."""
    logits_TV = torch.zeros(2, V)
    logits_TV[:, 3] = gap
    labels_T = torch.tensor([3, 7])
    stats = token_stats(logits_TV, torch.eye(V), labels_T, fields=MENU)
    rest = torch.log(torch.tensor(V - 1.0, dtype=torch.float64))
    others_over_mode = rest - gap
    exact = others_over_mode - torch.log1p(torch.exp(others_over_mode))
    torch.testing.assert_close(stats.max_log1mp.double(), exact.expand(2), rtol=1e-6, atol=0)
    torch.testing.assert_close(stats.log1mp[0].double(), exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(stats.max_logp[0].double(), -torch.log1p(others_over_mode.exp()), rtol=1e-5, atol=1e-40)
    for name in MENU:
        assert getattr(stats, name).isfinite().all(), name


def test_ties_take_the_first_mode_and_stay_finite() -> None:
    logits_TV = torch.zeros(V, V, dtype=torch.float64, requires_grad=True)
    labels_T = torch.arange(V)
    stats = token_stats(logits_TV, torch.eye(V, dtype=torch.float64), labels_T, fields=MENU)
    exact = reference_stats(logits_TV, labels_T, MENU)
    for name in MENU:
        torch.testing.assert_close(getattr(stats, name), getattr(exact, name))
    torch.testing.assert_close(stats.entropy, torch.full((V,), float(V), dtype=torch.float64).log())


def test_bfloat16_is_computed_in_float32() -> None:
    hidden_TD, head_VD, labels_T = inputs(5.0, torch.bfloat16)
    stats = token_stats(hidden_TD, head_VD, labels_T, fields=MENU)
    exact = token_stats(hidden_TD.double(), head_VD.double(), labels_T, fields=MENU, implementation="reference")
    for name in MENU:
        torch.testing.assert_close(getattr(stats, name).double(), getattr(exact, name), rtol=1e-5, atol=1e-5)


def test_only_what_is_asked_for_is_there() -> None:
    stats = token_stats(*inputs(1.0), fields=("logp",))
    assert stats.logp.shape == (T,)
    with pytest.raises(AttributeError, match=r"'entropy' was not asked for; declare it with @needs\('entropy'\)"):
        _ = stats.entropy
    with pytest.raises(ValueError, match="no such token statistic: logprob; the menu is logp"):
        token_stats(*inputs(1.0), fields=("logprob",))


def test_an_empty_batch_has_gradients_of_zero() -> None:
    hidden_TD = torch.zeros(0, D, requires_grad=True)
    head_VD = torch.randn(V, D, requires_grad=True)
    stats = token_stats(hidden_TD, head_VD, torch.zeros(0, dtype=torch.long), fields=MENU)
    stats.logp.sum().backward()
    assert head_VD.grad is not None
    assert not head_VD.grad.any()
