"""A factor and a soft cap after the head: every statistic and its gradients against the dense definition in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from RL2.ops.token_stats import Implementation, LogitTransform, token_stats
from RL2.types import MENU

T, V, D, K = 12, 37, 16, 5
TRANSFORMS = {
    "factor": LogitTransform(scale=0.25),
    "soft cap": LogitTransform(softcap=5.0),
    "both": LogitTransform(scale=3.0, softcap=30.0),
}
WITHOUT_RANK = tuple(name for name in MENU if name != "rank")
NARROW = 13 * T * 4 / 2**20
"""MiB of tiles of 13 columns, which do not divide V."""
PATHS: dict[str, tuple[Implementation, tuple[str, ...], float]] = {
    "reference": ("reference", MENU, 64.0),
    "chunked": ("chunked", MENU, 64.0),
    "several tiles": ("chunked", WITHOUT_RANK, NARROW),
    "triton": ("triton", MENU, 64.0),
}


def results(inputs: tuple[Tensor, Tensor, Tensor], fields: tuple[str, ...], **how: object) -> dict[str, Tensor]:
    """Return the statistics by name, and the gradients of one loss on all of them."""
    hidden_TD, head_VD, labels_T = inputs
    leaves = [hidden_TD.clone().requires_grad_(), head_VD.clone().requires_grad_()]
    stats = token_stats(*leaves, labels_T, temperature=0.7, fields=fields, top_k=K, **how)  # type: ignore[arg-type]
    found = {name: getattr(stats, name) for name in fields}
    smooth = [x for name, x in found.items() if name not in ("rank", "top_id")]
    loss = sum((x.double() * torch.linspace(-1, 1.5, x.numel()).view(x.shape).double()).sum() for x in smooth)
    assert isinstance(loss, Tensor)
    grads = torch.autograd.grad(loss, leaves)
    return {name: x.detach() for name, x in found.items()} | {"grad hidden": grads[0], "grad head": grads[1]}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("path", PATHS)
def test_statistics_are_those_of_the_changed_logits(path: str, transform: LogitTransform) -> None:
    g = torch.Generator().manual_seed(0)
    hidden_TD, head_VD = torch.randn(T, D, generator=g) * 2, torch.randn(V, D, generator=g)
    inputs = hidden_TD, head_VD, torch.randint(0, V, (T,), generator=g)
    exact = (hidden_TD.double(), head_VD.double(), inputs[2])
    implementation, fields, budget_mib = PATHS[path]
    ours = results(inputs, fields, implementation=implementation, transform=transform, budget_mib=budget_mib)
    right = results(exact, fields, implementation="reference", transform=transform)
    for name, value in ours.items():
        torch.testing.assert_close(value.double(), right[name].double(), rtol=1e-4, atol=1e-5, msg=name)


def test_the_dense_definition_is_softmax_of_the_changed_logits() -> None:
    logits_TV = torch.linspace(-9, 9, 3 * V).view(3, V).double()
    labels_T = torch.tensor([0, 5, 36])
    stats = token_stats(
        logits_TV,
        torch.eye(V).double(),
        labels_T,
        transform=LogitTransform(softcap=4.0),
        fields=("logp",),
        implementation="reference",
    )
    wanted = (4 * torch.tanh(logits_TV / 4)).log_softmax(-1).gather(1, labels_T[:, None])[:, 0]
    torch.testing.assert_close(stats.logp, wanted)
