"""Losses whose gradient is taken in the forward pass: which ones, and that updates are the same."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from RL2.batch.packing import pack
from RL2.models.policy import Policy
from RL2.objectives.registry import bound
from RL2.parallel.processes import Processes
from RL2.tools.reproduce.model import build_model
from RL2.types import Sequence, StatsRequest, TokenBatch, TokenStats, Trajectory
from RL2.workers.metrics import LossFunction, Totals
from RL2.workers.passes import backward
from RL2.workers.token_wise import TokenWise

BUDGET_MIB = 5 * 272 * 4 / 2**20
"""Tiles of about 5 tokens, which cut sequences."""

MICROBATCHES = ([0, 1, 2], [3, 4], [5])


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    folder = tmp_path_factory.mktemp("token_wise")
    build_model(folder / "model", ["1 + 2 = 3"], seed=0)
    return Policy.load(str(folder / "model"))


@pytest.fixture
def batch(policy: Policy) -> TokenBatch:
    """Six sequences whose tokens were sampled by other weights."""
    g = torch.Generator().manual_seed(0)
    trajectories = []
    for n, length in enumerate((9, 14, 6, 11, 8, 12)):
        ids = torch.randint(5, policy.lm.config.vocab_size, (length,), generator=g).tolist()
        logps = (torch.rand(length, generator=g) - 3.5).tolist()
        mask = [t >= 3 for t in range(length)]
        one = Sequence(ids, mask, logps, [0.0] * (length - 1) + [1.0], [0] * length)
        trajectories.append(Trajectory(row=n, group=n, sample=0, score=1.0, sequences=[one]))
    made = pack(trajectories, 0)
    random_T = torch.randn(len(made.labels_T), generator=g)
    assert made.engine_logp_T is not None
    return made.with_(
        advantage_T=random_T,
        old_logp_T=made.engine_logp_T + 0.2 * random_T,
        weight_T=made.action_T * torch.rand(len(random_T), generator=g),
    )


def update(
    policy: Policy, batch: TokenBatch, loss: LossFunction, fields: tuple[str, ...], token_wise: TokenWise | None
) -> tuple[list[Tensor], dict[str, float]]:
    """Gradients and metrics of all microbatches."""
    policy.zero_grad()
    totals = Totals(Processes.alone(torch.device("cpu")))
    request = StatsRequest(fields, budget_mib=BUDGET_MIB)
    assert not backward(policy, batch, MICROBATCHES, loss, request, totals, token_wise=token_wise)
    return [x.grad.clone() for x in policy.parameters() if x.grad is not None], totals.means()


@pytest.mark.parametrize(
    ("name", "holds"),
    [("spo", True), ("ppo", True), ("sft", True), ("sapo", True), ("gspo", False), ("gmpo", False)],
)
def test_updates_are_the_same(policy: Policy, batch: TokenBatch, name: str, holds: bool) -> None:
    """Sequence-level objectives are recognised as such on the first microbatch."""
    objective = bound(name, {})
    fields = objective.request().fields
    exact, metrics = update(policy, batch, objective.loss, fields, None)
    token_wise = TokenWise(policy, worth=0)
    ours, same = update(policy, batch, objective.loss, fields, token_wise)
    assert token_wise.holds is holds
    assert metrics == pytest.approx(same, rel=1e-5, abs=1e-6)
    for one, other in zip(ours, exact, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm() + 1e-9


def test_a_loss_that_turns_out_to_be_another_one(policy: Policy, batch: TokenBatch) -> None:
    """The first microbatch, of three sequences, shows no coupling; the others do."""

    def coupled(stats: TokenStats, actions: TokenBatch) -> tuple[Tensor, dict[str, Tensor]]:
        return (stats.logp * stats.logp.sum() if actions.num_sequences < 3 else stats.logp), {}

    exact, _ = update(policy, batch, coupled, ("logp",), None)
    token_wise = TokenWise(policy, worth=0)
    ours, _ = update(policy, batch, coupled, ("logp",), token_wise)
    assert token_wise.holds is False
    for one, other in zip(ours, exact, strict=True):
        assert (one - other).norm() <= 1e-4 * other.norm() + 1e-9


def test_a_loss_that_refuses_parts_is_no_token_wise_one(policy: Policy, batch: TokenBatch) -> None:
    def refuses(stats: TokenStats, actions: TokenBatch) -> tuple[Tensor, dict[str, Tensor]]:
        if int(actions.lengths_B.min()) < 3:
            raise ValueError("a part of a sequence")
        return stats.logp, {}

    token_wise = TokenWise(policy, worth=0)
    update(policy, batch, refuses, ("logp",), token_wise)
    assert token_wise.holds is False


def test_small_models_are_left_alone(policy: Policy, batch: TokenBatch) -> None:
    token_wise = TokenWise(policy)
    objective = bound("sft", {})
    update(policy, batch, objective.loss, objective.request().fields, token_wise)
    assert token_wise.holds is None


@pytest.mark.parametrize("name", ["spo", "ppo", "gspo"])
def test_a_process_that_starts_later_computes_in_the_same_way(policy: Policy, batch: TokenBatch, name: str) -> None:
    """So a resumed run has the same weights, bit for bit."""
    objective = bound(name, {})
    fields, experienced = objective.request().fields, TokenWise(policy, worth=0)
    update(policy, batch, objective.loss, fields, experienced)
    one, other = (
        update(policy, batch, objective.loss, fields, token_wise)[0]
        for token_wise in (experienced, TokenWise(policy, worth=0))
    )
    assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True))
