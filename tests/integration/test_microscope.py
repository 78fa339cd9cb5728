"""What a run records of single tokens: right, the same on any number of processes, and at no cost to the training."""

from __future__ import annotations

import base64
import json
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
import warm
from programs import Run, World, without_times
from pyarrow import parquet
from transformers import AutoModelForCausalLM, AutoTokenizer

from RL2.tools.view.run_index import RunIndex

STEPS = ("trainer.max_steps=2", "trainer.test_freq=1", "trainer.samples_per_step=6")


def start(world: World, *more: str, nproc: int = 1) -> Run:
    test = f"test_data.path={world.root}/rl.jsonl"
    return world.run("ppo", *STEPS, test, "actor.update_per_rollout=2", *more, nproc=nproc).succeeded()


def recorded(run: Run) -> dict[str, list[dict[str, Any]]]:
    return {file.stem: parquet.read_table(file).to_pylist() for file in sorted(run.save_dir.glob("tokens/*"))}


@pytest.fixture(scope="module")
def run(world: World) -> Run:
    return start(world, "trainer.token_stats_freq=1", "trainer.replay_freq=1")


def test_it_holds_what_the_model_says(run: Run) -> None:
    """Of the first step's rollout, against the dense logits of the model that was kept."""
    folder = run.save_dir / "replay_000000"
    lm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = recorded(run)["000000_train"]
    assert len(rows) == 6
    for row in rows:
        prompt = row["sampled"].index(True)  # what follows is random bytes, of which some need each other to be read
        assert "".join(row["tokens"][:prompt]) == tokenizer.decode(row["token_ids"][:prompt])
        ids = torch.tensor(row["token_ids"])
        at_N = torch.tensor(row["sampled"]).nonzero()[:, 0]
        with torch.no_grad():
            logp_NV = lm(ids[None]).logits[0, at_N - 1].log_softmax(-1)
        expected = {
            "logp": logp_NV.gather(1, ids[at_N, None])[:, 0],
            "max_logp": logp_NV.amax(1),
            "entropy": -(logp_NV.exp() * logp_NV).sum(1),
            "top_logp": logp_NV.topk(5).values,
            "engine_logp": logp_NV.gather(1, ids[at_N, None])[:, 0],
        }
        for name, value in expected.items():
            torch.testing.assert_close(torch.tensor(row[name]).double(), value, atol=1e-4, rtol=1e-4, msg=name)
        ranks = (logp_NV > expected["logp"][:, None]).sum(1) + 1
        assert row["rank"] == ranks.tolist()
        assert row["length"] == len(at_N) == len(row["top"])
        assert row["top"][0][0] == tokenizer.decode([int(logp_NV[0].argmax())])


def test_loss_and_pull_are_those_of_the_update(run: Run) -> None:
    """On policy PPO's loss is -advantage, and the pull advantage times the token's weight in its minibatch."""
    for row in recorded(run)["000000_train"]:
        loss_N, pull_N = torch.tensor(row["loss_T"]), torch.tensor(row["pull_T"])
        assert row["loss"] == pytest.approx(float(loss_N.mean()), abs=1e-6)
        assert len({round(loss, 4) for loss in row["loss_T"]}) == 1  # one advantage for the whole response
        assert ((pull_N * loss_N) <= 0).all()
        assert bool(loss_N.any()) == bool(pull_N.any())


def test_rows_are_those_of_samples_and_tests_are_the_same_at_every_step(run: Run) -> None:
    found = recorded(run)
    assert list(found) == ["000000_test", "000000_train", "000001_test", "000001_train", "000002_test"]
    for name, rows in found.items():
        step, split = name.split("_")
        samples = [s for s in run.samples if (s["step"], s["split"]) == (int(step), split)]
        keys = ("row", "group", "sample", "reward", "score")
        assert [[row[key] for key in keys] for row in rows] == [[sample[key] for key in keys] for sample in samples]
        assert [row["length"] for row in rows] == [sample["num_tokens"] for sample in samples]
    tests = [[row["row"] for row in found[name]] for name in found if name.endswith("test")]
    assert tests[0] == tests[1] == tests[2]
    assert found["000000_test"][0]["loss"] is None


def test_the_viewer_finds_the_replay_of_a_rollout(run: Run) -> None:
    """The run's own objective again: the pull, but for a minibatch's divisor instead of the step's."""
    warm.run("RL2.tools.cli", "replay", str(run.save_dir), "--step", "0", "--objectives", "ppo, sft").check_returncode()
    chunks = dict(RunIndex([str(run.save_dir)]).chunks())
    items = json.loads(zlib.decompress(base64.b64decode(chunks["token-0"]), -15))
    replayed = [item for item in items if item["replay"]]
    assert len(replayed) == 6
    for item in replayed:
        assert list(item["replay"]) == ["ppo", "sft"]
        assert len(item["replay"]["sft"]) == len(item["pull"])
        ratios = [mine / whole for mine, whole in zip(item["pull"], item["replay"]["ppo"], strict=True) if whole]
        assert ratios == pytest.approx([ratios[0]] * len(ratios), rel=1e-2) if ratios else not any(item["pull"])
    assert any(any(item["pull"]) for item in replayed)


def test_the_training_does_not_notice(world: World, run: Run) -> None:
    without = start(world, "trainer.token_stats_freq=null")
    assert not (without.save_dir / "tokens").exists()
    assert without.weights.read_bytes() == run.weights.read_bytes()
    assert without_times(without.metrics) == without_times(run.metrics)


def test_two_processes_record_the_same(world: World, run: Run) -> None:
    """Other layouts: tests/integration/test_layout_runs.py."""
    two = start(world, "trainer.token_stats_freq=1", nproc=2)
    for one, other in zip(recorded(run)["000000_train"], recorded(two)["000000_train"], strict=True):
        assert [one[name] for name in ("tokens", "rank", "top")] == [other[name] for name in ("tokens", "rank", "top")]
        for name in ("logp", "max_logp", "entropy", "loss_T", "pull_T"):
            assert one[name] == pytest.approx(other[name], abs=1e-4), name


def test_a_cut_distribution_has_no_gap(world: World, tmp_path: Path) -> None:
    run = start(world, "trainer.token_stats_freq=2", "rollout.train_sampling_params.top_k=20", "actor.tis_coef=0")
    found = recorded(run)
    assert list(found) == ["000000_test", "000000_train", "000001_test", "000002_test"]
    assert {row["engine_logp"] is None for row in found["000000_train"]} == {True}
    assert {row["engine_logp"] is None for row in found["000000_test"]} == {False}
