"""Each objective against the formula of its source, in float64, gradients with respect to the logits included."""

import pickle
from typing import Any

import pytest
import torch
from published_objectives import PUBLISHED, Dense
from torch import Tensor

from RL2.batch.packing import pack
from RL2.objectives.loss import kl_estimate
from RL2.objectives.objective import needs
from RL2.objectives.policy_gradient import ppo
from RL2.objectives.registry import OBJECTIVES, BoundObjective, bind
from RL2.ops.token_stats import token_stats
from RL2.types import Sequence, TokenBatch, Trajectory

T, V = 60, 41
LENGTHS = (7, 20, 33)
FIELDS = ("logp", "log1mp", "max_logp", "max_log1mp")


def a_batch(labels_T: Tensor, **more: Tensor) -> TokenBatch:
    """Three sequences of actions only."""
    sequences = [Sequence([0] * (n + 1), [False] + [True] * n, [0.0] * (n + 1), [0.0] * (n + 1)) for n in LENGTHS]
    return pack([Trajectory(0, 0, 0, sequences)]).with_(labels_T=labels_T, **more)


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


def judged(labels_T: Tensor, p_TV: Tensor) -> TokenBatch:
    """A batch with advantages of both signs, some of them 0, and old probabilities around the present ones."""
    g = torch.Generator().manual_seed(3)
    advantage_T = torch.randn(T, generator=g, dtype=torch.float64)
    advantage_T[::7] = 0
    noise_T = 0.4 * torch.randn(T, generator=g, dtype=torch.float64)
    old_logp_T = (pick(p_TV, labels_T).log() + noise_T - noise_T.mean()).detach()
    reference_T = old_logp_T + 0.1 * torch.randn(T, generator=g, dtype=torch.float64)
    known = {"advantage_T": advantage_T, "old_logp_T": old_logp_T, "ref_logp_T": reference_T}
    return a_batch(labels_T, **known, covariance_rank_T=torch.linspace(0, 1, T, dtype=torch.float64))


def pick(p_TV: Tensor, ids_T: Tensor) -> Tensor:
    return p_TV[torch.arange(len(ids_T)), ids_T]


def rest(p_TV: Tensor, ids_T: Tensor) -> Tensor:
    """1 - p as the sum of the others."""
    return p_TV.scatter(1, ids_T[:, None], 0).sum(-1)


def bernoulli_kl(p: Tensor, rest_p: Tensor, q: Tensor, rest_q: Tensor) -> Tensor:
    return p * (p / q).log() + rest_p * (rest_p / rest_q).log()


def dense_mode(p_TV: Tensor, batch: TokenBatch, *, js: bool, detach: bool) -> Tensor:
    """KL or Jensen-Shannon divergence between Bern(p_m) and Bern(p_a), from probabilities."""
    a_T, m_T = batch.labels_T, p_TV.argmax(-1)
    target, token = (pick(p_TV, m_T), rest(p_TV, m_T)), (pick(p_TV, a_T), rest(p_TV, a_T))
    if detach:
        target = target[0].detach(), target[1].detach()
    if not js:
        return bernoulli_kl(*target, *token)
    middle = (target[0] + token[0]) / 2, (target[1] + token[1]) / 2
    return (bernoulli_kl(*target, *middle) + bernoulli_kl(*token, *middle)) / 2


def dense_0p5(p_TV: Tensor, batch: TokenBatch, region: str) -> Tensor:
    p_a, rest_a = pick(p_TV, batch.labels_T), rest(p_TV, batch.labels_T)
    half = torch.full_like(p_a, 0.5)
    inside = {"above_half": p_a > 0.5, "below_half": p_a <= 0.5, "all": p_a > 0}[region]
    return bernoulli_kl(half, half, p_a, rest_a) * inside


def dense_rank(p_TV: Tensor, batch: TokenBatch, *, js: bool, cap: int) -> Tensor:
    """Token by token: the target gives each of the first r ranks its probability in plain words."""
    losses = []
    for p_V, label in zip(p_TV, batch.labels_T.tolist(), strict=True):
        order = sorted(range(V), key=lambda i: (-p_V[i].item(), i))
        r = order.index(label) + 1
        p = p_V[order[:r]]
        q = torch.stack([*p[1:], p[0]]).detach()
        m = (p + q) / 2
        jsd = ((p * (p / m).log()).sum() + (q * (q / m).log()).sum()) / 2
        kl = (q * (q / p).log() - q + p).sum()
        losses.append((jsd if js else kl) * (r <= cap))
    return torch.stack(losses)


def ratio_and_advantage(p_TV: Tensor, batch: TokenBatch) -> tuple[Tensor, Tensor]:
    assert batch.old_logp_T is not None and batch.advantage_T is not None
    return pick(p_TV, batch.labels_T) / batch.old_logp_T.exp(), batch.advantage_T


def clipped_gain(ratio: Tensor, advantage: Tensor, low: float, high: float) -> Tensor:
    """min(r A, clip(r) A) by the sign of A: only one of the two bounds can hold."""
    return torch.where(advantage > 0, ratio.clamp(max=1 + high), ratio.clamp(min=1 - low)) * advantage


def dense_ppo(p_TV: Tensor, batch: TokenBatch, low: float, high: float, dual: float | None) -> Tensor:
    ratio_T, advantage_T = ratio_and_advantage(p_TV, batch)
    if dual is not None:  # max(min(r A, clip(r) A), c A) for A < 0 bounds the ratio by c
        ratio_T = torch.where(advantage_T < 0, ratio_T.clamp(max=dual), ratio_T)
    return -clipped_gain(ratio_T, advantage_T, low, high)


def dense_gspo(p_TV: Tensor, batch: TokenBatch, low: float, high: float) -> Tensor:
    """s = (product of the sequence's ratios) ^ (1 / its length)."""
    parts = []
    for ratio, advantage in zip(*(x.split(LENGTHS) for x in ratio_and_advantage(p_TV, batch)), strict=True):
        s = ratio.prod() ** (1 / len(ratio))
        parts.append(-clipped_gain(s.expand(len(ratio)), advantage, low, high))
    return torch.cat(parts)


def dense_cispo(p_TV: Tensor, batch: TokenBatch, low: float, high: float) -> Tensor:
    ratio_T, advantage_T = ratio_and_advantage(p_TV, batch)
    weight = torch.tensor([min(max(r, low), high) for r in ratio_T.tolist()], dtype=p_TV.dtype)
    return -weight * advantage_T * pick(p_TV, batch.labels_T).log()


def dense_sapo(p_TV: Tensor, batch: TokenBatch, tau_pos: float, tau_neg: float) -> Tensor:
    losses = []
    for ratio, advantage in zip(*ratio_and_advantage(p_TV, batch), strict=True):
        tau = tau_pos if advantage > 0 else tau_neg
        losses.append(-4 / tau / (1 + (-tau * (ratio - 1)).exp()) * advantage)
    return torch.stack(losses)


def dense_reinforce(p_TV: Tensor, batch: TokenBatch) -> Tensor:
    return -ratio_and_advantage(p_TV, batch)[1] * pick(p_TV, batch.labels_T).log()


CASES: dict[str, tuple[str, dict[str, Any], Dense]] = {
    "sft": ("sft", {}, lambda p, b: -pick(p, b.labels_T).log()),
    "positive_ce": ("positive_ce", {}, lambda p, b: -pick(p, b.labels_T).log()),
    "spo live": ("spo", {}, lambda p, b: dense_mode(p, b, js=False, detach=False)),
    "spo detached": ("spo", {"detach_target": True}, lambda p, b: dense_mode(p, b, js=False, detach=True)),
    "jsd live": ("binary_jsd", {}, lambda p, b: dense_mode(p, b, js=True, detach=False)),
    "jsd detached": ("binary_jsd", {"detach_target": True}, lambda p, b: dense_mode(p, b, js=True, detach=True)),
    "0.5 above": ("spo_0p5", {}, lambda p, b: dense_0p5(p, b, "above_half")),
    "0.5 all": ("spo_0p5", {"region": "all"}, lambda p, b: dense_0p5(p, b, "all")),
    "0.5 below": ("spo_0p5", {"region": "below_half"}, lambda p, b: dense_0p5(p, b, "below_half")),
    "rank kl": ("rank_kl", {}, lambda p, b: dense_rank(p, b, js=False, cap=32)),
    "rank kl cap": ("rank_kl", {"rank_cap": 4}, lambda p, b: dense_rank(p, b, js=False, cap=4)),
    "rank jsd": ("rank_jsd", {}, lambda p, b: dense_rank(p, b, js=True, cap=32)),
    "rank jsd cap": ("rank_jsd", {"rank_cap": 4}, lambda p, b: dense_rank(p, b, js=True, cap=4)),
    "rank jsd and cross-entropy": (
        "rank_jsd",
        {"rank_cap": 4, "ce_coef": 0.7},
        lambda p, b: dense_rank(p, b, js=True, cap=4) - 0.7 * pick(p, b.labels_T).log(),
    ),
    "reinforce": ("reinforce", {}, dense_reinforce),
    "ppo": ("ppo", {}, lambda p, b: dense_ppo(p, b, 0.2, 0.2, None)),
    "clip higher": ("ppo", {"clip_high": 0.28}, lambda p, b: dense_ppo(p, b, 0.2, 0.28, None)),
    "dual clip": ("ppo", {"dual_clip": 1.4}, lambda p, b: dense_ppo(p, b, 0.2, 0.2, 1.4)),
    "dual clip below": ("ppo", {"clip": 0.3, "dual_clip": 1.1}, lambda p, b: dense_ppo(p, b, 0.3, 0.3, 1.1)),
    "gspo": ("gspo", {"clip_high": 4e-4}, lambda p, b: dense_gspo(p, b, 3e-4, 4e-4)),
    "gspo wide": ("gspo", {"clip": 0.05, "clip_high": None}, lambda p, b: dense_gspo(p, b, 0.05, 0.05)),
    "cispo": ("cispo", {}, lambda p, b: dense_cispo(p, b, 0.0, 5.0)),
    "cispo narrow": ("cispo", {"ratio_min": 0.9, "ratio_max": 1.2}, lambda p, b: dense_cispo(p, b, 0.9, 1.2)),
    "sapo": ("sapo", {}, lambda p, b: dense_sapo(p, b, 1.0, 1.05)),
    "sapo hard": ("sapo", {"tau_pos": 3.0, "tau_neg": 7.0}, lambda p, b: dense_sapo(p, b, 3.0, 7.0)),
    **PUBLISHED,
}


def test_every_objective_has_a_case() -> None:
    assert {name for name, _, _ in CASES.values()} == set(OBJECTIVES)


def computed(bound: BoundObjective, leaf_TV: Tensor, batch: TokenBatch, temperature: float = 1.0) -> tuple[Tensor, Any]:
    """The objective through the statistics seam, everything in the dtype of the logits."""
    dtype = leaf_TV.dtype
    batch = batch.with_(**{n: x.to(dtype) for n, x in batch.tensors().items() if x.is_floating_point()})
    eye_VV = torch.eye(V, dtype=dtype)
    how = {"temperature": temperature, "fields": bound.fields, "top_k": bound.top_k}
    return bound.loss(token_stats(leaf_TV, eye_VV, batch.labels_T, **how), batch)


@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_are_those_of_dense_float64(
    case: str, dtype: torch.dtype, tolerance: float, temperature: float
) -> None:
    name, knobs, dense = CASES[case]
    if case == "vespo" and dtype == torch.float32:
        tolerance *= 10  # the exponent has products of ratios, which may be off by their rounding times c2 W
    logits_TV, labels_T = logits_and_labels()
    exact_TV = logits_TV.double().requires_grad_()
    p_TV = (exact_TV / temperature).softmax(-1)
    batch = judged(labels_T, p_TV)
    exact_T = dense(p_TV, batch)
    weight_T = torch.linspace(0.5, 1.5, T, dtype=torch.float64)
    (exact_grad,) = torch.autograd.grad((exact_T * weight_T).sum(), exact_TV)

    leaf_TV = logits_TV.to(dtype).requires_grad_()
    loss_T, _ = computed(bind(name, knobs), leaf_TV, batch, temperature)
    (grad,) = torch.autograd.grad((loss_T * weight_T.to(dtype)).sum(), leaf_TV)

    assert 1 - p_TV.max().item() < 1e-11
    assert (loss_T.double() - exact_T).norm() / exact_T.norm() < tolerance
    assert (grad.double() - exact_grad).norm() / exact_grad.norm() < tolerance
    # token by token as well, where there is something to compare
    scale = exact_T.abs().clamp(min=1e-2)
    assert ((loss_T.double() - exact_T).abs() / scale).max() < 10 * tolerance


@pytest.mark.parametrize("case", CASES)
def test_closed_form_is_what_autograd_finds(case: str) -> None:
    name, knobs, _ = CASES[case]
    bound = bind(name, knobs)
    logits_TV, labels_T = logits_and_labels()
    leaf_TV = logits_TV.double().requires_grad_()
    p_TV = leaf_TV.detach().softmax(-1)
    assert bound.gradient is not None
    for batch in (judged(labels_T, p_TV), a_batch(labels_T, advantage_T=torch.linspace(-1, 1, T).double())):
        (grad,) = torch.autograd.grad(computed(bound, leaf_TV, batch)[0].sum(), leaf_TV)
        torch.testing.assert_close(bound.gradient(p_TV, batch, **bound.knobs), grad, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("case", CASES)
def test_float32_is_finite_from_certain_to_impossible(case: str) -> None:
    """Rows of equal logits, and modes ahead by up to 10,000; the label is the mode, the second or the last."""
    name, knobs, _ = CASES[case]
    gaps = torch.tensor([0.0, 1e-6, 20.0, 90.0, 300.0, 1e4]).repeat_interleave(T // 6)
    leaf_TV = torch.zeros(T, V)
    leaf_TV[:, 5] = gaps
    leaf_TV[:, 6] = -gaps
    leaf_TV.requires_grad_()
    labels_T = torch.tensor([5, 0, 6]).repeat(T // 3)
    advantage_T = torch.tensor([1.0, -1.0]).repeat(T // 2)
    loss_T, metrics = computed(bind(name, knobs), leaf_TV, a_batch(labels_T, advantage_T=advantage_T))
    (grad,) = torch.autograd.grad(loss_T.sum(), leaf_TV)
    assert loss_T.isfinite().all()
    assert grad.isfinite().all()
    assert all(x.isfinite().all() and x.shape == loss_T.shape for x in metrics.values())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_no_token_no_loss(name: str) -> None:
    logits_TV, labels_T = logits_and_labels()
    batch = a_batch(labels_T, advantage_T=torch.ones(T)).positions(torch.zeros(T, dtype=torch.bool))
    leaf_TV = logits_TV[:0].requires_grad_()
    loss_T, _ = computed(bind(name, {}), leaf_TV, batch)
    (grad,) = torch.autograd.grad(loss_T.sum(), leaf_TV)
    assert loss_T.shape == (0,)
    assert grad.shape == (0, V)


@pytest.mark.parametrize("name", ["spo", "binary_jsd", "rank_kl", "rank_jsd"])
def test_the_mode_itself_is_left_alone(name: str) -> None:
    logits_TV, _ = logits_and_labels()
    leaf_TV = logits_TV.requires_grad_()
    loss_T, metrics = computed(bind(name, {}), leaf_TV, a_batch(logits_TV.argmax(-1)))
    (grad,) = torch.autograd.grad(loss_T.sum(), leaf_TV)
    assert not loss_T.any()
    assert not grad.any()
    assert not metrics.get("off_mode", torch.zeros(1)).any()


@pytest.mark.parametrize("name", ["rank_kl", "rank_jsd"])
def test_ranks_beyond_the_cap_are_left_alone_and_counted(name: str) -> None:
    logits_TV, labels_T = logits_and_labels()
    rank_T = (logits_TV > pick(logits_TV, labels_T)[:, None]).sum(-1) + 1
    leaf_TV = logits_TV.requires_grad_()
    loss_T, metrics = computed(bind(name, {"rank_cap": 4}), leaf_TV, a_batch(labels_T))
    (grad,) = torch.autograd.grad(loss_T.sum(), leaf_TV)
    assert (rank_T > 4).any()
    assert not loss_T[rank_T > 4].any()
    assert not grad[rank_T > 4].any()
    assert metrics["covered"].bool().tolist() == (rank_T <= 4).tolist()
    trained_T = (rank_T > 1) & (rank_T <= 4)
    assert loss_T[trained_T].all()
    if name == "rank_kl":  # p - q: nothing for the tokens that the sampled one does not overtake
        behind_TV = logits_TV < pick(logits_TV, labels_T)[:, None]
        assert grad[behind_TV].abs().max() < 1e-7


def test_half_is_the_fixed_point_of_spo_0p5() -> None:
    leaf_TV = torch.zeros(T, V, dtype=torch.float64)
    leaf_TV[:, 2] = torch.tensor(V - 1.0, dtype=torch.float64).log()
    loss_T, _ = computed(bind("spo_0p5", {"region": "all"}), leaf_TV.requires_grad_(), a_batch(torch.full((T,), 2)))
    (grad,) = torch.autograd.grad(loss_T.sum(), leaf_TV)
    assert loss_T.abs().max() < 1e-14
    assert grad.abs().max() < 1e-14


RATIOS = ["ppo", "gspo", "cispo", "sapo", "importance_sampling", "dppo", "dro", "gmpo", "luspo", "vespo", "kl_cov"]
"""Objectives with the gradient of REINFORCE on a fresh rollout (luspo: times the length of the sequence)."""


@pytest.mark.parametrize("name", ["sft", "reinforce", *RATIOS, "a2po", "dft"])
def test_a_certain_token_has_no_gradient(name: str) -> None:
    leaf_TV = torch.zeros(T, V)
    leaf_TV[:, 2] = 200.0
    batch = a_batch(torch.full((T,), 2), advantage_T=torch.linspace(-1, 1, T))
    loss_T, _ = computed(bind(name, {}), leaf_TV.requires_grad_(), batch)
    (grad,) = torch.autograd.grad(loss_T.sum(), leaf_TV)
    assert not grad.any()
    if name == "sft":
        assert not loss_T.any()


@pytest.mark.parametrize("name", ["reinforce", *(name for name in RATIOS if name not in ("dro", "kl_cov"))])
def test_no_advantage_no_loss(name: str) -> None:
    logits_TV, labels_T = logits_and_labels()
    batch = judged(labels_T, logits_TV.double().softmax(-1)).with_(advantage_T=torch.zeros(T))
    leaf_TV = logits_TV.requires_grad_()
    loss_T, _ = computed(bind(name, {}), leaf_TV, batch)
    (grad,) = torch.autograd.grad(loss_T.sum(), leaf_TV)
    assert not loss_T.any()
    assert not grad.any()


@pytest.mark.parametrize("name", ["reinforce", *RATIOS])
def test_on_fresh_rollouts_all_policy_gradients_are_reinforce(name: str) -> None:
    """With one advantage a sequence, which is what gspo and its relatives take the ratio for."""
    logits_TV, labels_T = logits_and_labels()
    leaf_TV = logits_TV.double().requires_grad_()
    advantage_T = torch.tensor([-1.0, 0.5, 2.0]).repeat_interleave(torch.tensor(LENGTHS)).double()
    loss_T, metrics = computed(bind(name, {}), leaf_TV, a_batch(labels_T, advantage_T=advantage_T))
    (grad,) = torch.autograd.grad(loss_T.sum(), leaf_TV)
    if name == "luspo":
        grad = grad / torch.tensor(LENGTHS).repeat_interleave(torch.tensor(LENGTHS))[:, None]
    by_hand = -advantage_T[:, None] * (torch.eye(V)[labels_T] - leaf_TV.detach().softmax(-1))
    torch.testing.assert_close(grad, by_hand, rtol=1e-9, atol=1e-12)
    assert not metrics.get("clipped", torch.zeros(1)).any()


def test_gspo_clips_whole_sequences() -> None:
    logits_TV, labels_T = logits_and_labels()
    leaf_TV = logits_TV.double().requires_grad_()
    logp_T = pick(leaf_TV.detach().log_softmax(-1), labels_T)
    sequence_T = torch.arange(3).repeat_interleave(torch.tensor(LENGTHS))
    # the ratios of one sequence differ but have the mean that decides
    drift_T = torch.tensor([0.1, 0.0, -0.1]).double()[sequence_T] + torch.linspace(-1, 1, T).double()
    drift_T = drift_T - torch.stack([x.mean() for x in torch.linspace(-1, 1, T).double().split(LENGTHS)])[sequence_T]
    batch = a_batch(labels_T, advantage_T=torch.ones(T).double(), old_logp_T=logp_T - drift_T)
    loss_T, metrics = computed(bind("gspo", {"clip": 0.01}), leaf_TV, batch)
    (grad,) = torch.autograd.grad(loss_T.sum(), leaf_TV)
    assert metrics["clipped"].bool().tolist() == (sequence_T == 0).tolist()
    assert not grad[sequence_T == 0].any()
    assert grad[sequence_T > 0].any(-1).all()


def test_ppo_clips_as_the_paper_says() -> None:
    logits_TV, labels_T = logits_and_labels()
    stats = token_stats(logits_TV.double(), torch.eye(V, dtype=torch.float64), labels_T, fields=("logp",))
    g = torch.Generator().manual_seed(2)
    advantage_T = torch.randn(T, generator=g, dtype=torch.float64)
    logp_T = stats.logp.detach().requires_grad_()
    old_logp_T = stats.logp.detach() + 0.3 * torch.randn(T, generator=g, dtype=torch.float64)
    batch = a_batch(labels_T, advantage_T=advantage_T, old_logp_T=old_logp_T)
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


def test_an_objective_is_frozen_and_pickled_by_name() -> None:
    assert (ppo.needs, ppo.top_k, OBJECTIVES["rank_jsd"].top_k) == (("logp",), None, "rank_cap")
    assert pickle.loads(pickle.dumps(ppo)) is ppo
    with pytest.raises(AttributeError):
        ppo.needs = ()  # type: ignore[misc]


def test_a_declaration_names_statistics_of_the_menu() -> None:
    with pytest.raises(ValueError, match="no such token statistic: p; the menu is logp, log1mp"):
        needs("p")
    with pytest.raises(ValueError, match=r"go with @needs\(..., top_k='KNOB'\)"):
        needs("top_logp", "top_id")
