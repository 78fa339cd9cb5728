"""Each objective against the formula of its source, in float64, gradients with respect to the logits included."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from RL2.objectives.path import cross_entropy, spo, spo_0p5
from RL2.objectives.policy import ppo
from RL2.objectives.table import OBJECTIVES, bind
from RL2.objectives.terms import importance_weight, kl_estimate
from RL2.ops.token_stats import token_stats
from RL2.packing import pack
from RL2.types import Sequence, TokenBatch, Trajectory

T, V = 60, 23
FIELDS = ("logp", "log1mp", "max_logp", "max_log1mp")


def a_batch(advantage_T: Tensor | None = None, old_logp_T: Tensor | None = None) -> TokenBatch:
    sequence = Sequence([0] * (T + 1), [False] + [True] * T, [0.0] * (T + 1), [0.0] * (T + 1))
    batch = pack([Trajectory(row=0, group=0, sample=0, sequences=[sequence])])
    more = {"advantage_T": advantage_T, "old_logp_T": old_logp_T}
    return batch.with_(**{name: x for name, x in more.items() if x is not None})


def logits_and_labels() -> tuple[Tensor, Tensor]:
    """Probabilities of the mode from 0.1 to 1 - 1e-12; the label is the mode, the second, or any token."""
    g = torch.Generator().manual_seed(0)
    logits_TV = torch.randn(T, V, generator=g)
    mode_T = torch.randint(0, V, (T,), generator=g)
    logits_TV[torch.arange(T), mode_T] += torch.linspace(0, 30, T)
    labels_T = torch.randint(0, V, (T,), generator=g)
    labels_T[::3] = logits_TV.argmax(-1)[::3]
    labels_T[1::3] = logits_TV.topk(2).indices[1::3, 1]
    return logits_TV, labels_T


def dense_spo(p_TV: Tensor, p_a: Tensor, rest_a: Tensor, *, detach: bool) -> Tensor:
    """KL(Bern(p_m) || Bern(p_a)) from probabilities; 1 - p as the sum of the others."""
    p_m, mode_T = p_TV.max(-1)
    rest_m = p_TV.scatter(1, mode_T[:, None], 0).sum(-1)
    if detach:
        p_m, rest_m = p_m.detach(), rest_m.detach()
    return p_m * (p_m / p_a).log() + rest_m * (rest_m / rest_a).log()


def dense_0p5(p_a: Tensor, rest_a: Tensor, region: str) -> Tensor:
    half = torch.full_like(p_a, 0.5)
    kl = half * (half / p_a).log() + half * (half / rest_a).log()
    inside = {"above_half": p_a > 0.5, "below_half": p_a <= 0.5, "all": p_a > 0}[region]
    return kl * inside


CASES: dict[str, tuple[Callable[..., tuple[Tensor, dict[str, Tensor]]], Callable[[Tensor, Tensor, Tensor], Tensor]]] = {
    "spo live": (lambda s, b: spo(s, b, detach_target=False), lambda p, a, r: dense_spo(p, a, r, detach=False)),
    "spo detached": (lambda s, b: spo(s, b, detach_target=True), lambda p, a, r: dense_spo(p, a, r, detach=True)),
    "0.5 above": (lambda s, b: spo_0p5(s, b, region="above_half"), lambda p, a, r: dense_0p5(a, r, "above_half")),
    "0.5 all": (lambda s, b: spo_0p5(s, b, region="all"), lambda p, a, r: dense_0p5(a, r, "all")),
    "0.5 below": (lambda s, b: spo_0p5(s, b, region="below_half"), lambda p, a, r: dense_0p5(a, r, "below_half")),
    "sft": (lambda s, b: cross_entropy(s, b), lambda p, a, r: -a.log()),
}


@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_are_those_of_dense_float64(
    case: str, dtype: torch.dtype, tolerance: float, temperature: float
) -> None:
    objective, dense = CASES[case]
    logits_TV, labels_T = logits_and_labels()
    exact_TV = logits_TV.double().requires_grad_()
    p_TV = (exact_TV / temperature).softmax(-1)
    p_a = p_TV.gather(1, labels_T[:, None])[:, 0]
    rest_a = p_TV.scatter(1, labels_T[:, None], 0).sum(-1)
    exact_T = dense(p_TV, p_a, rest_a)
    weight_T = torch.linspace(0.5, 1.5, T, dtype=torch.float64)
    (exact_grad,) = torch.autograd.grad((exact_T * weight_T).sum(), exact_TV)

    leaf_TV = logits_TV.to(dtype).requires_grad_()
    stats = token_stats(leaf_TV, torch.eye(V, dtype=dtype), labels_T, temperature=temperature, fields=FIELDS)
    loss_T, _ = objective(stats, a_batch())
    (grad,) = torch.autograd.grad((loss_T * weight_T.to(dtype)).sum(), leaf_TV)

    assert 1 - p_TV.max().item() < 1e-11
    assert (loss_T.double() - exact_T).norm() / exact_T.norm() < tolerance
    assert (grad.double() - exact_grad).norm() / exact_grad.norm() < tolerance
    # token by token as well, where there is something to compare
    scale = exact_T.abs().clamp(min=1e-2)
    assert ((loss_T.double() - exact_T).abs() / scale).max() < 10 * tolerance


@pytest.mark.parametrize("detach_target", [False, True])
def test_spo_is_zero_without_gradient_on_the_mode(detach_target: bool) -> None:
    logits_TV, _ = logits_and_labels()
    leaf_TV = logits_TV.requires_grad_()
    stats = token_stats(leaf_TV, torch.eye(V), logits_TV.argmax(-1), fields=FIELDS)
    loss_T, metrics = spo(stats, a_batch(), detach_target=detach_target)
    (grad,) = torch.autograd.grad(loss_T.sum(), leaf_TV)
    assert not loss_T.any()
    assert not grad.any()
    assert not metrics["off_mode"].any()


def test_spo_gradient_of_the_docstring() -> None:
    """(p_a - p_m) / (p_a (1 - p_a)) dp_a + log(p_m (1 - p_a) / (p_a (1 - p_m))) dp_m."""
    g = torch.Generator().manual_seed(1)
    leaf_TV = torch.randn(T, V, generator=g, dtype=torch.float64).requires_grad_()
    labels_T = torch.randint(0, V, (T,), generator=g)
    stats = token_stats(leaf_TV, torch.eye(V, dtype=torch.float64), labels_T, fields=FIELDS)
    (grad,) = torch.autograd.grad(spo(stats, a_batch(), detach_target=False)[0].sum(), leaf_TV)
    p_TV = leaf_TV.detach().softmax(-1)
    p_m, mode_T = p_TV.max(-1)
    p_a = p_TV.gather(1, labels_T[:, None])[:, 0]
    dp_a = p_a[:, None] * (torch.eye(V)[labels_T] - p_TV)
    dp_m = p_m[:, None] * (torch.eye(V)[mode_T] - p_TV)
    by_hand = ((p_a - p_m) / (p_a * (1 - p_a)))[:, None] * dp_a
    by_hand = by_hand + (p_m * (1 - p_a) / (p_a * (1 - p_m))).log()[:, None] * dp_m
    torch.testing.assert_close(grad, by_hand, rtol=1e-9, atol=1e-12)


def test_ppo_clips_as_the_paper_says() -> None:
    logits_TV, labels_T = logits_and_labels()
    stats = token_stats(logits_TV.double(), torch.eye(V, dtype=torch.float64), labels_T, fields=("logp",))
    g = torch.Generator().manual_seed(2)
    advantage_T = torch.randn(T, generator=g, dtype=torch.float64)
    logp_T = stats.logp.detach().requires_grad_()
    old_logp_T = stats.logp.detach() + 0.3 * torch.randn(T, generator=g, dtype=torch.float64)
    batch = a_batch(advantage_T, old_logp_T)
    loss_T, metrics = ppo(type(stats)(logp=logp_T), batch, clip=0.2)
    for t in range(T):
        ratio = (logp_T[t] - old_logp_T[t]).exp().item()
        expected = -min(ratio * advantage_T[t].item(), min(max(ratio, 0.8), 1.2) * advantage_T[t].item())
        assert loss_T[t].item() == pytest.approx(expected, rel=1e-9)
    (grad,) = torch.autograd.grad(loss_T.sum(), logp_T)
    outside = ((logp_T - old_logp_T).exp() > 1.2) & (advantage_T > 0)
    assert outside.any()
    assert not grad[outside].any()
    assert metrics["clipped"][outside].all()


def test_ppo_on_fresh_rollouts_is_reinforce() -> None:
    logits_TV, labels_T = logits_and_labels()
    leaf_TV = logits_TV.double().requires_grad_()
    stats = token_stats(leaf_TV, torch.eye(V, dtype=torch.float64), labels_T, fields=("logp",))
    advantage_T = torch.linspace(-1, 1, T, dtype=torch.float64)
    (grad,) = torch.autograd.grad(ppo(stats, a_batch(advantage_T), clip=0.2)[0].sum(), leaf_TV)
    by_hand = -advantage_T[:, None] * (torch.eye(V)[labels_T] - leaf_TV.detach().softmax(-1))
    torch.testing.assert_close(grad, by_hand, rtol=1e-9, atol=1e-12)


def test_kl_estimates() -> None:
    logp_T, ref_logp_T = torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -1.0])
    torch.testing.assert_close(kl_estimate(logp_T, ref_logp_T, "k1"), torch.tensor([0.5, -1.0]))
    torch.testing.assert_close(kl_estimate(logp_T, ref_logp_T, "k2"), torch.tensor([0.125, 0.5]))
    k3 = kl_estimate(logp_T, ref_logp_T, "k3")
    torch.testing.assert_close(k3, torch.tensor([2.718281828**-0.5 - 1 + 0.5, 2.718281828 - 1 - 1]))


def test_k1_and_k3_are_unbiased() -> None:
    g = torch.Generator().manual_seed(0)
    logits, ref = torch.randn(V, generator=g).log_softmax(-1), torch.randn(V, generator=g).log_softmax(-1)
    exact = (logits.exp() * (logits - ref)).sum()
    for estimator in ("k1", "k3"):
        torch.testing.assert_close((logits.exp() * kl_estimate(logits, ref, estimator)).sum(), exact)  # type: ignore[arg-type]


def test_importance_weight_is_capped_and_constant() -> None:
    logp_T = torch.tensor([-1.0, -1.0], requires_grad=True)
    weight_T = importance_weight(logp_T, torch.tensor([-1.5, -4.0]), cap=2.0)
    torch.testing.assert_close(weight_T, torch.tensor([2.718281828**0.5, 2.0]))
    assert not weight_T.requires_grad


def test_the_table_fills_knobs_and_names_what_is_missing() -> None:
    bound = bind("spo", {"detach_target": True})
    assert bound.fields == ("logp", "log1mp", "max_logp", "max_log1mp")
    assert bound.knobs == {"detach_target": True}
    with pytest.raises(ValueError, match=f"actor.objective=nope; choose one of {', '.join(OBJECTIVES)}"):
        bind("nope", {})
    with pytest.raises(ValueError, match=r"actor\.clip has no effect: actor\.objective=spo does not read it"):
        bind("spo", {"clip": 0.2})
    with pytest.raises(ValueError, match=r"actor\.clip='wide'; expected a number"):
        bind("ppo", {"clip": "wide"})
