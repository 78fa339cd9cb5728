"""The Triton kernels: on a GPU for real (tests/gpu), here under Triton's interpreter (conftest.py), on small shapes."""

from __future__ import annotations

import pytest
import torch

from RL2.ops import tally as plain
from RL2.ops import tally_triton as kernels
from RL2.ops.token_stats import token_stats
from RL2.types import MENU

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
C, W, K = 6, 37, 4


def tile(scale: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    z_CW = torch.randn(C, W, generator=g, dtype=dtype) * scale
    z_CW[1] = z_CW[1].round()  # ties
    z_CW[2] = 0.0
    z_CW[3, 5] += 100.0  # near certainty
    return z_CW.to(DEVICE)


@pytest.fixture(autouse=True)
def several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 columns a block, which do not divide the tile."""
    monkeypatch.setattr(kernels, "BLOCK", 16)


@pytest.mark.parametrize("scale", [1.0, 40.0])
@pytest.mark.parametrize("width", [W, 16, 1])
def test_tallies_are_alike(width: int, scale: float) -> None:
    z_CW = tile(scale)[:, :width].contiguous()
    ours = kernels.tally(z_CW.clone(), 100, torch.empty_like(z_CW), with_z=True, with_sq=True)
    exact = plain.tally(z_CW.double(), 100, torch.empty_like(z_CW).double(), with_z=True, with_sq=True)
    for name, value, right in zip(exact._fields, ours, exact, strict=True):
        torch.testing.assert_close(value.double(), right, rtol=1e-5, atol=1e-5, msg=name)


def test_counts_are_alike() -> None:
    z_CW = tile(1.0)
    labels_C = torch.tensor([100, 110, 136, 105, 0, 500], device=DEVICE)
    logit_C = torch.where((labels_C >= 100) & (labels_C < 137), plain.pick(z_CW, labels_C - 100), 0.5)
    ours = kernels.count_above(z_CW, 100, labels_C, logit_C)
    assert ours.tolist() == plain.count_above(z_CW, 100, labels_C, logit_C).tolist()


@pytest.mark.parametrize("asked", ["logp", "entropy", "sum_p2", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_alike(dtype: torch.dtype, asked: str) -> None:
    z_CW = tile(3.0)
    labels_C = torch.tensor([100, 110, 136, 105, 0, 500], device=DEVICE)
    whole = plain.tally(z_CW.clone(), 100, torch.empty_like(z_CW), with_z=True, with_sq=True)
    row = plain.rows(whole, plain.pick(z_CW, labels_C - 100), labels_C)
    top_id_CK = plain.top(z_CW, 100, K)[1]
    g = torch.Generator().manual_seed(1)
    names = [n for n in MENU if n not in ("rank", "top_id", "top_logp")] if asked == "all" else [asked]
    grads = {name: torch.randn(C, generator=g).to(DEVICE) for name in names}
    if asked == "all":
        grads["top_logp"] = torch.randn(C, K, generator=g).to(DEVICE)
    slope = plain.slopes(row, labels_C, top_id_CK, grads, 1 / 0.7)
    ours = kernels.gradient(z_CW.clone(), 100, torch.empty_like(z_CW, dtype=dtype), slope, dtype)
    exact = plain.gradient(z_CW.clone(), 100, torch.empty_like(z_CW), slope, torch.float32)
    assert ours.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(ours.float(), exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("fields", [MENU, tuple(name for name in MENU if name != "rank")])
def test_the_whole_is_the_dense_definition(fields: tuple[str, ...]) -> None:
    g = torch.Generator().manual_seed(0)
    hidden_TD, head_VD = torch.randn(9, 8, generator=g) * 3, torch.randn(W, 8, generator=g)
    labels_T = torch.randint(W, (9,), generator=g).to(DEVICE)
    ours = [x.to(DEVICE).requires_grad_() for x in (hidden_TD, head_VD)]
    exact = [x.double().to(DEVICE).requires_grad_() for x in (hidden_TD, head_VD)]
    budget_mib = 4 * W * 5 / 2**20  # several tiles either way
    stats = token_stats(*ours, labels_T, fields=fields, top_k=K, implementation="triton", budget_mib=budget_mib)
    right = token_stats(*exact, labels_T, fields=fields, top_k=K, implementation="reference")
    total = exact_total = torch.zeros((), device=DEVICE)
    for i, name in enumerate(fields):
        torch.testing.assert_close(getattr(stats, name).double(), getattr(right, name).double(), rtol=1e-5, atol=1e-5)
        if name not in ("rank", "top_id"):
            total = total + (i + 1) * getattr(stats, name).sum()
            exact_total = exact_total + (i + 1) * getattr(right, name).sum()
    for grad, exact_grad in zip(torch.autograd.grad(total, ours), torch.autograd.grad(exact_total, exact), strict=True):
        assert (grad.double() - exact_grad).norm() / exact_grad.norm() < 1e-4
