"""`rl2 credit` on a kept step, as a user runs it."""

from __future__ import annotations

import json
import math
import random
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import warm
from programs import Run, World

from RL2.tools.view.run_index import RunIndex

pytestmark = pytest.mark.slow
TITLES = "positive_ce, reinforce, spo, spo_0p5"
OPTIONS = ("--budget", "6k", "--answers", "6", "--objectives", TITLES)


@pytest.fixture(scope="module")
def run(world: World) -> Run:
    return world.run("ppo", "trainer.replay_freq=1", "trainer.max_steps=1", "adv.estimator=reinforce").succeeded()


def rl2(run: Run, *arguments: str) -> subprocess.CompletedProcess[str]:
    return warm.run("RL2.tools.cli", "credit", str(run.save_dir), *arguments)


@pytest.fixture(scope="module")
def folder(run: Run) -> Path:
    done = rl2(run, *OPTIONS)
    assert done.returncode == 0, done.stderr
    assert "agreement with the measured advantages" in done.stdout
    return run.save_dir / "replay_000000"


@pytest.fixture(scope="module")
def result(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "credit.json").read_text())
    return found


def test_each_answer_has_values_with_intervals(result: dict[str, Any]) -> None:
    assert len(result["answers"]) == 6
    assert result["skipped"] == []
    for one in result["answers"]:
        length = len(one["tokens"])
        assert len(one["value"]) == length + 1
        assert one["value"][-1] == [one["reward"]] * 3
        assert all(0 <= low <= value <= high <= 1 for value, low, high in one["value"])
        assert all(low <= value <= high for value, low, high in one["advantage"])
        assert sum(one["number"]) > 0


def test_pulls_are_derivatives_of_the_loss(result: dict[str, Any]) -> None:
    """The pull of -log p is 1 - p times the token's weight, on rewarded answers alone; with advantages on all."""
    for one in result["answers"]:
        rest = [-math.expm1(logp) for logp in one["logp"]]
        shares = [pull / share for pull, share in zip(one["pulls"]["positive_ce"], rest, strict=True)]
        assert shares == pytest.approx([shares[0]] * len(shares), rel=1e-4)
        assert (shares[0] > 0) == (one["reward"] > 0)
        advantages = [pull / share for pull, share in zip(one["pulls"]["reinforce"], rest, strict=True)]
        assert advantages == pytest.approx([advantages[0]] * len(advantages), rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("share", [0.3, 0.8])
def test_a_killed_command_continues_to_the_same_results(run: Run, folder: Path, share: float) -> None:
    """The file is cut at any byte, as a kill leaves it."""
    samples, before = folder / "credit_samples.jsonl", (folder / "credit.json").read_bytes()
    whole = samples.read_bytes()
    samples.write_bytes(whole[: int(share * len(whole))])
    done = rl2(run, *OPTIONS)
    assert done.returncode == 0, done.stderr
    assert (folder / "credit.json").read_bytes() == before
    assert samples.read_bytes() == whole


def test_a_command_that_is_killed_outright_gives_the_same_table(run: Run, folder: Path) -> None:
    """SIGKILL comes at a random moment between the first round and the last."""
    samples, before = folder / "credit_samples.jsonl", (folder / "credit.json").read_bytes()
    whole = samples.read_bytes()
    begin = whole.index(b"\n") + 1
    limit = random.Random().randint(begin + 1, whole.rindex(b"\n", 0, -1))
    samples.unlink()
    (folder / "credit.json").unlink()
    program = warm.Program("RL2.tools.cli", ["credit", str(run.save_dir), *OPTIONS], folder / "out", folder / "err")
    while program.poll() is None and (not samples.exists() or samples.stat().st_size < limit):
        time.sleep(0.001)
    program.kill()
    program.wait()
    assert not (folder / "credit.json").exists(), "it was killed before its end"
    left = samples.read_bytes()
    assert len(left) >= limit and whole.startswith(left), limit
    done = rl2(run, *OPTIONS)
    assert done.returncode == 0, done.stderr
    assert (folder / "credit.json").read_bytes() == before
    assert samples.read_bytes() == whole


def test_the_viewer_finds_it(run: Run, result: dict[str, Any]) -> None:
    index = RunIndex([str(run.save_dir)])
    index.refresh()
    shown = [item["credit"] for item in index.tokens.rest if item["credit"]]
    assert len(shown) == 6
    assert list(shown[0]["pulls"]) == TITLES.split(", ")


def test_what_cannot_be_used(run: Run, result: dict[str, Any]) -> None:
    for arguments, said in (
        (("--step", "7"), "has not kept step 7; it has kept 0"),
        (("--budget", "many"), "--budget many: write a number of tokens, such as 500k or 2M"),
        (("--rewards", "1,0"), "--rewards 1,0: the first must be below the second"),
        (("--seed", "3", *OPTIONS), "was begun with other settings (seed)"),
        (("--objectives", "grpo"), "actor.objective=grpo; choose one of"),
        (("--engine", "hf"), "--engine hf: choose embedded, vllm or sglang"),
    ):
        done = rl2(run, *arguments)
        assert done.returncode == 1
        assert said in done.stderr, done.stderr


def test_pairs_train_with_dpo(world: World, run: Run, folder: Path, tmp_path: Path) -> None:
    """A larger budget continues the samples; some token is then known to be better than its alternative."""
    done = rl2(run, "--budget", "60k", *OPTIONS[2:], "--pairs", str(tmp_path / "pairs.jsonl"))
    assert done.returncode == 0, done.stderr
    pairs = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    assert pairs
    for pair in pairs:
        assert pair["chosen_value"] > pair["rejected_value"]
        assert len(pair["chosen_ids"]) == len(pair["rejected_ids"]) == 1
    trained = world.run(
        "dpo",
        f"data.path={tmp_path}/pairs.jsonl",
        "actor.loss=pivotal",
        f"data.batch_size={len(pairs)}",
        "trainer.n_epochs=4",
        "trainer.max_steps=4",
    ).succeeded()
    margins = [row["actor/margin"] for row in trained.metrics if "actor/margin" in row]
    assert margins[0] == pytest.approx(0, abs=1e-6), "the policy is the reference"
    assert margins[-1] > margins[0]
