"""Token statistics on a GPU: python -m pytest tests/gpu. Without one these tests are not collected (conftest.py)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from RL2.ops.token_stats import Implementation, token_stats
from RL2.types import MENU

K = 8
DIFFERENTIABLE = tuple(name for name in MENU if name not in ("rank", "top_id"))


def inputs(T: int, V: int, D: int, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden_TD = (torch.randn(T, D, device="cuda") * scale / D**0.5).to(dtype)
    head_VD = torch.randn(V, D, device="cuda").to(dtype)
    labels_T = torch.randint(V, (T,), device="cuda")
    labels_T[::2] = (hidden_TD.float() @ head_VD.float().T).argmax(-1)[::2]
    return hidden_TD, head_VD, labels_T


@pytest.mark.parametrize("implementation", ["triton", "chunked"])
@pytest.mark.parametrize("fields", [MENU, tuple(name for name in MENU if name != "rank")], ids=["all", "no rank"])
@pytest.mark.parametrize("scale", [1.0, 40.0])
@pytest.mark.parametrize(("dtype", "tolerances"), [(torch.float32, (1e-5, 1e-4)), (torch.bfloat16, (2e-5, 1e-2))])
def test_is_the_dense_definition(
    dtype: torch.dtype,
    tolerances: tuple[float, float],
    scale: float,
    fields: tuple[str, ...],
    implementation: Implementation,
) -> None:
    hidden_TD, head_VD, labels_T = inputs(300, 5003, 64, scale, dtype)
    ours = [x.clone().requires_grad_() for x in (hidden_TD, head_VD)]
    exact = [x.double().requires_grad_() for x in (hidden_TD, head_VD)]
    how = {"temperature": 0.7, "fields": fields, "top_k": K}
    stats = token_stats(*ours, labels_T, **how, implementation=implementation, budget_mib=1.5)  # type: ignore[arg-type]
    right = token_stats(*exact, labels_T, **how, implementation="reference")  # type: ignore[arg-type]
    for name in fields:
        value, exact_value = getattr(stats, name).double(), getattr(right, name).double()
        if name in ("rank", "top_id"):  # float32 logits may swap two that are alike
            assert (value == exact_value).double().mean() > 0.99
            continue
        torch.testing.assert_close(value, exact_value, rtol=tolerances[0], atol=tolerances[0], msg=name)
        weight = torch.linspace(-1, 1.5, value.numel(), device="cuda").view(value.shape)
        grads = torch.autograd.grad((getattr(stats, name) * weight).sum(), ours, retain_graph=True)
        rights = torch.autograd.grad((getattr(right, name) * weight.double()).sum(), exact, retain_graph=True)
        for grad, exact_grad in zip(grads, rights, strict=True):
            error = float((grad.double() - exact_grad).norm() / exact_grad.norm())
            assert error < tolerances[1], (name, error)


def test_a_tile_of_more_than_2_to_the_31_logits() -> None:
    """Row offsets do not fit into 32 bits; the last rows would come out as others, or not at all."""
    T, V, D = 16_384, 151_936, 64
    assert T * V > 2**31
    hidden_TD, head_VD, labels_T = inputs(T, V, D, 3.0, torch.bfloat16)
    leaf_TD = hidden_TD.clone().requires_grad_()
    fields = ("logp", "max_logp", "entropy", "rank")
    stats = token_stats(
        leaf_TD, head_VD, labels_T, fields=fields, implementation="triton", budget_mib=4 * T * V / 2**20
    )
    (stats.logp + 0.1 * stats.entropy).sum().backward()
    assert leaf_TD.grad is not None
    for at in (slice(0, 64), slice(T - 64, T)):
        part_TD = hidden_TD[at].double().requires_grad_()
        right = token_stats(part_TD, head_VD.double(), labels_T[at], fields=fields, implementation="reference")
        for name in ("logp", "max_logp", "entropy"):
            torch.testing.assert_close(getattr(stats, name)[at].double(), getattr(right, name), rtol=2e-5, atol=2e-5)
        # between two that are alike, float32 logits may choose the other
        assert (stats.rank[at] - right.rank).abs().max() <= 0.001 * V
        (right.logp + 0.1 * right.entropy).sum().backward()
        assert part_TD.grad is not None
        assert (leaf_TD.grad[at].double() - part_TD.grad).norm() / part_TD.grad.norm() < 1e-2
