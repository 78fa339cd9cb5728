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

from RL2.errors import UserError
from RL2.parallel.processes import Processes
from RL2.tools.atlas.measure import Atlas, measure
from RL2.trainer.run import kept_step
from RL2.types import TokenBatch

OFF_MODE = "sft actor.select.not_mode=true"
TITLES = ("spo", "spo actor.path.detach_target=true", "spo_0p5 actor.path.region=all", "sft", OFF_MODE, "reinforce")


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

    def off_mode(logp_TV: Tensor, labels_T: Tensor, b: int) -> Tensor:
        logp_T = sampled(logp_TV, labels_T)
        kept_T = logp_T < logp_TV.max(-1).values
        return -(logp_T * kept_T).sum() / kept_T.sum().clamp(min=1)

    groups = dense.batch.group_B.tolist()

    def reinforce(logp_TV: Tensor, labels_T: Tensor, b: int) -> Tensor:
        of = [right for right, group in zip(dense.right, groups, strict=True) if group == groups[b]]
        return -(dense.right[b] - sum(of) / len(of)) * sampled(logp_TV, labels_T).mean()

    everything = [True] * len(dense.right)
    formulas = dict(zip(TITLES, (spo, detached, half, sft, off_mode, reinforce), strict=True))
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


DETACHED = "spo actor.path.detach_target=true"


@pytest.fixture(scope="module")
def atlas(run: Run, processes: Processes) -> Atlas:
    return measure(run.save_dir, 2, processes, [DETACHED])


def test_the_atlas_is_that_of_dense_logits(atlas: Atlas, dense: Dense) -> None:
    """The gradients of `sft`, and of `spo` with a constant target, are multiples of e_a - p."""
    batch = dense.batch
    with torch.no_grad():
        logits = [dense.lm(batch.token_ids_T[cut][None]).logits[0][batch.action_T[cut]] for cut in dense.cuts]
    logp_NV, labels_N = torch.cat(logits).log_softmax(-1), batch.labels_T[batch.action_T]
    p_NV, logp_N = logp_NV.exp(), sampled(logp_NV, labels_N)
    p_N, mode_N = logp_N.exp(), logp_NV.max(-1).values.exp()
    sequence_N = batch.sequence_T[batch.action_T]
    right_B = torch.tensor(dense.right)
    share_N = (right_B / torch.bincount(sequence_N))[sequence_N].double() / right_B.sum()
    along_NV = -p_NV.scatter_add(1, labels_N[:, None], -torch.ones_like(labels_N)[:, None].double())  # e_a - p
    by_entropy_NV = -p_NV * (logp_NV - (p_NV * logp_NV).sum(-1, keepdim=True))
    factors = {"sft": share_N, DETACHED: share_N * (mode_N - p_N) / (1 - p_N)}
    moves = {title: factor_N[:, None] * along_NV for title, factor_N in factors.items()}  # against the gradient
    found = {one.title: one for one in atlas.effects}
    assert len(found["sft"].pull_N) == len(labels_N)
    for title, move_NV in moves.items():
        one, norm = found[title], move_NV.norm()
        assert one.norm == pytest.approx(float(norm), rel=1e-4)
        close = {"rtol": 1e-3, "atol": 1e-5}
        torch.testing.assert_close(one.pull_N.double(), sampled(move_NV, labels_N), **close)
        torch.testing.assert_close(one.entropy_N.double(), (move_NV * by_entropy_NV).sum(-1) / norm, **close)
        risen_N = p_N * (sampled(move_NV, labels_N) - (p_NV * move_NV).sum(-1))
        torch.testing.assert_close(one.prob_N.double(), risen_N / norm, **close)
    titles = list(found)
    cosine = float((moves["sft"] * moves[DETACHED]).sum() / moves["sft"].norm() / moves[DETACHED].norm())
    assert float(atlas.cosines_OO[titles.index("sft"), titles.index(DETACHED)]) == pytest.approx(cosine, abs=1e-4)
    own = {one.title: float(x) for one, x in zip(atlas.effects, atlas.cosines_OO.diagonal(), strict=True)}
    without = {one.title for one in atlas.effects if one.norm == 0}  # spo_0p5, if no token is above a half
    assert {title for title, cosine in own.items() if math.isnan(cosine)} == without
    assert without <= {"spo_0p5"}
    assert all(abs(cosine - 1) < 1e-12 for title, cosine in own.items() if title not in without)


def test_the_atlas_groups_what_coincides_and_says_what_is_left_out(atlas: Atlas) -> None:
    (same,) = [cluster for cluster in atlas.clusters if "reinforce" in cluster]
    assert {"ppo", "cispo"} <= set(same)  # on the first update the ratio is 1
    assert not {"spo", "sft"} & set(same)
    assert "a teacher" in atlas.left_out["gkd"]
    assert "pairs" in atlas.left_out["simpo"]
    assert "labels" in atlas.left_out["kto"]
    assert not set(atlas.left_out) & {one.title for one in atlas.effects}


def test_the_atlas_page(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "atlas.html"
    done = warm.run("RL2.tools.cli", "atlas", str(run.save_dir), "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert "of step 2" in done.stdout
    page = out.read_text()
    assert "http" not in page.replace("http-equiv", "")
    data = json.loads(page.split('id="data">')[1].split("</script>")[0])
    assert {"sft", "spo", "reinforce"} <= {one["title"] for one in data["objectives"]}
    assert any(any(sequence["action"]) for sequence in data["sequences"])


def test_what_was_not_kept_or_cannot_be(run: Run) -> None:
    (run.save_dir / "replay_000001.partial").mkdir(exist_ok=True)  # as a kill leaves it
    for arguments, said in (
        (("--step", "1"), "has not kept step 1; it has kept 0, 2"),
        (("--step", "2", "--objectives", "grpo"), "actor.objective=grpo; choose one of"),
        (("--step", "2", "--objectives", "spo lr"), "'lr' is not a setting; write key=value"),
        (("--step", "2", "--objectives", "spo actor.foo=1"), "nothing reads actor.foo"),
    ):
        done = rl2(str(run.save_dir), *arguments)
        assert done.returncode == 1
        assert said in done.stderr, done.stderr


def test_steps_are_found(run: Run, tmp_path: Path) -> None:
    (run.save_dir / "replay_000009").mkdir(exist_ok=True)  # a folder without a batch is no step
    assert kept_step(run.save_dir) == (run.save_dir, 2)
    assert kept_step(run.save_dir, "0") == kept_step(run.save_dir / "replay_000000") == (run.save_dir, 0)
    for path, said in ((tmp_path, "has kept no step"), (tmp_path / "x", "there is no such folder")):
        with pytest.raises(UserError, match=said):
            kept_step(path)
