"""A kept step through several objectives, against autograd on dense logits in float64."""

from __future__ import annotations

import json
import math
import subprocess
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import warm
from programs import Run, World
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from RL2.types import TokenBatch

TITLES = ("spo", "spo actor.path.detach_target=true", "spo_0p5 actor.path.region=all", "sft", "reinforce")


@pytest.fixture(scope="module")
def run(world: World) -> Run:
    return world.run("spo", "trainer.replay_freq=2", "actor.average_over=kept").succeeded()


def rl2(*arguments: str) -> subprocess.CompletedProcess[str]:
    return warm.run("RL2.tools.cli", "replay", *arguments)


@pytest.fixture(scope="module")
def replayed(run: Run) -> dict[str, Any]:
    done = rl2(str(run.save_dir), "--step", "2", "--objectives", ", ".join(TITLES))
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    return json.loads((run.save_dir / "replay_000002" / "replay.json").read_text())


class Dense:
    """The same step with all logits in memory, sequence by sequence."""

    def __init__(self, folder: Path) -> None:
        self.lm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
        self.batch = TokenBatch(**load_file(folder / "batch.safetensors"))
        starts = self.batch.cu_seqlens.tolist()
        self.cuts = [slice(a, b) for a, b in pairwise(starts)]
        self.right = [bool(self.batch.reward_T[cut].sum() > 0) for cut in self.cuts]

    def gradient(self, loss: Any, which: list[bool]) -> tuple[float, Tensor]:
        """Of the mean over the sequences of `which` of what `loss` makes of (log p [n, V], labels [n], b)."""
        self.lm.zero_grad()
        total = torch.zeros((), dtype=torch.float64)
        for b, cut in enumerate(self.cuts):
            if which[b]:
                logp_TV = self.lm(self.batch.token_ids_T[cut][None]).logits[0].log_softmax(-1)
                action_T = self.batch.action_T[cut]
                total = total + loss(logp_TV[action_T], self.batch.labels_T[cut][action_T], b) / sum(which)
        total.backward()
        return float(total.detach()), torch.cat([p.grad.flatten() for p in self.lm.parameters()])


def sampled(logp_TV: Tensor, labels_T: Tensor) -> Tensor:
    return logp_TV.gather(1, labels_T[:, None])[:, 0]


def bernoulli(p: Tensor, q: Tensor) -> Tensor:
    return p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()


@pytest.fixture(scope="module")
def dense(run: Run) -> Dense:
    return Dense(run.save_dir / "replay_000002")


@pytest.fixture(scope="module")
def reference(dense: Dense) -> dict[str, tuple[float, Tensor]]:
    """Loss and gradient of every objective by its formula."""

    def spo(logp_TV: Tensor, labels_T: Tensor, b: int) -> Tensor:
        return bernoulli(logp_TV.max(-1).values.exp(), sampled(logp_TV, labels_T).exp()).mean()

    def detached(logp_TV: Tensor, labels_T: Tensor, b: int) -> Tensor:
        return bernoulli(logp_TV.max(-1).values.exp().detach(), sampled(logp_TV, labels_T).exp()).mean()

    def half(logp_TV: Tensor, labels_T: Tensor, b: int) -> Tensor:
        p = sampled(logp_TV, labels_T).exp()
        return (-0.5 * (p * (1 - p)).log() + math.log(0.5)).mean()

    def sft(logp_TV: Tensor, labels_T: Tensor, b: int) -> Tensor:
        return -sampled(logp_TV, labels_T).mean()

    groups = dense.batch.group_B.tolist()

    def reinforce(logp_TV: Tensor, labels_T: Tensor, b: int) -> Tensor:
        of = [right for right, group in zip(dense.right, groups, strict=True) if group == groups[b]]
        return -(dense.right[b] - sum(of) / len(of)) * sampled(logp_TV, labels_T).mean()

    everything = [True] * len(dense.right)
    formulas = dict(zip(TITLES, (spo, detached, half, sft, reinforce), strict=True))
    return {
        title: dense.gradient(formula, everything if title == "reinforce" else dense.right)
        for title, formula in formulas.items()
    }


def test_numbers_are_those_of_the_dense_reference(
    replayed: dict[str, Any], dense: Dense, reference: dict[str, tuple[float, Tensor]]
) -> None:
    assert any(dense.right)
    assert not all(dense.right)
    actions = int(dense.batch.action_T.sum())
    wrong = [not right for right in dense.right]

    def entropy(logp_TV: Tensor, labels_T: Tensor, b: int) -> Tensor:
        return -(logp_TV.exp() * logp_TV).sum() * len(dense.right) / actions

    directions = {
        "entropy": dense.gradient(entropy, [True] * len(wrong))[1],
        "correct": dense.gradient(lambda logp, labels, b: sampled(logp, labels).sum(), dense.right)[1],
        "wrong": dense.gradient(lambda logp, labels, b: sampled(logp, labels).sum(), wrong)[1],
    }
    assert [one["title"] for one in replayed["objectives"]] == list(TITLES)
    for one in replayed["objectives"]:
        loss, gradient = reference[one["title"]]
        assert one["loss"] == pytest.approx(loss, rel=1e-4, abs=1e-6), one["title"]
        assert one["norm"] == pytest.approx(float(gradient.norm()), rel=1e-4), one["title"]
        for name, of in directions.items():
            expected = -float(gradient @ of / gradient.norm())
            assert one[name] == pytest.approx(expected, rel=1e-3, abs=1e-4 * float(of.norm())), (one["title"], name)


def test_cosines(replayed: dict[str, Any], reference: dict[str, tuple[float, Tensor]]) -> None:
    seen = {(pair["of"], pair["and"]): pair["cosine"] for pair in replayed["cosines"]}
    assert len(seen) == len(TITLES) * (len(TITLES) + 1) // 2
    for (a, b), cosine in seen.items():
        x, y = reference[a][1], reference[b][1]
        assert cosine == pytest.approx(float(x @ y / x.norm() / y.norm()), abs=1e-4), (a, b)
    assert all(seen[title, title] == pytest.approx(1, abs=1e-12) for title in TITLES)
    assert seen["spo", "spo actor.path.detach_target=true"] < 0.9


def test_weights_of_tokens(replayed: dict[str, Any], dense: Dense) -> None:
    """Of `sft` the token's share in the mean; of reinforce that times the advantage; of the mode under spo nothing."""
    weights = {one["title"]: torch.tensor(one["weight_N"]) for one in replayed["objectives"]}
    sequence_N = dense.batch.sequence_T[dense.batch.action_T]
    counts_B = torch.bincount(sequence_N)
    right_B = torch.tensor(dense.right)
    share_N = (right_B / counts_B)[sequence_N] / right_B.sum()
    torch.testing.assert_close(weights["sft"], share_N.float())
    assert (weights["reinforce"][right_B[sequence_N]] >= 0).all()
    assert (weights["reinforce"][~right_B[sequence_N]] <= 0).all()
    assert (weights["spo"][~right_B[sequence_N]] == 0).all()


def test_what_was_not_kept_or_cannot_be(run: Run) -> None:
    (run.save_dir / "replay_000001.partial").mkdir(exist_ok=True)  # as a kill leaves it
    for arguments, said in (
        (("--step", "1"), "has not kept step 1; it has kept 0, 2 (trainer.replay_freq=N keeps every N-th)"),
        (("--step", "2", "--objectives", "grpo"), "actor.objective=grpo; choose one of"),
        (("--step", "2", "--objectives", "spo lr"), "'lr' is not a setting; write key=value"),
        (("--step", "2", "--objectives", "spo actor.foo=1"), "nothing reads actor.foo"),
    ):
        done = rl2(str(run.save_dir), *arguments)
        assert done.returncode == 1
        assert said in done.stderr, done.stderr
