"""`dpo` on single responses with a label: KTO learns, on two processes as on one, and BCO resumes exactly."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from programs import Run, World, write_rows

pytestmark = pytest.mark.slow
Runs = dict[str, Future[Run]]


@pytest.fixture(scope="module")
def runs(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    rows = [json.loads(line) for line in Path(f"{world.root}/pairs.jsonl").read_text().splitlines()]
    path = tmp_path_factory.mktemp("labelled") / "labelled.jsonl"
    sides = [(row["prompt"], row[side], side == "chosen") for row in rows for side in ("chosen", "rejected")]
    write_rows(path, [{"prompt": p, "completion": text, "label": good} for p, text, good in sides])

    def run(loss: str, *overrides: str, nproc: int = 1) -> Run:
        given = (f"data.path={path}", f"actor.loss={loss}", "actor.beta=0.5", "actor.lr=1e-3", *overrides)
        return world.run("dpo", *given, nproc=nproc)

    def resume(whole: Future[Run]) -> Run:
        return run("bco", "trainer.max_steps=4", f"trainer.load_ckpt_from={whole.result().save_dir}/step_000002")

    with ThreadPoolExecutor(2) as pool:
        tested = ("data.test_ratio=0.25", "trainer.test_freq=10", "trainer.max_steps=20")
        found = {
            "bco": pool.submit(run, "bco", "trainer.max_steps=4", "trainer.save_freq=2"),
            "kto": pool.submit(run, "kto", *tested),
            "one": pool.submit(run, "kto"),
            "two": pool.submit(run, "kto", nproc=2),
        }
        yield found | {"bco resumed": pool.submit(resume, found["bco"])}


def test_kto_raises_good_and_lowers_bad_responses(runs: Runs) -> None:
    run = runs["kto"].result().succeeded()
    first, *_, last = run.metrics
    assert first["test/loss"] == pytest.approx(0.5, abs=1e-3)  # the policy is the reference
    assert last["test/loss"] < 0.4
    assert last["test/accuracy"] > 0.8
    assert last["test/reward_chosen"] > last["test/reward_rejected"] + 0.3
    assert all(row["actor/responses"] == 8 and row["actor/baseline"] >= 0 for row in run.metrics[:-1])
    assert "good and" in run.output


def test_two_processes_are_one(runs: Runs) -> None:
    one, two = (runs[name].result().succeeded().metrics for name in ("one", "two"))
    for mine, theirs in zip(one, two, strict=True):
        for name in ("loss", "grad_norm", "reward", "baseline"):
            assert theirs[f"actor/{name}"] == pytest.approx(mine[f"actor/{name}"], rel=1e-3, abs=1e-5), name


def test_the_mean_of_bco_goes_on_where_the_run_does(runs: Runs) -> None:
    whole, resumed = (runs[name].result().succeeded().metrics for name in ("bco", "bco resumed"))
    assert [row["step"] for row in resumed] == [2, 3]
    for mine, theirs in zip(whole[2:], resumed, strict=True):
        for name in ("loss", "baseline", "reward"):
            assert theirs[f"actor/{name}"] == mine[f"actor/{name}"], name
    assert whole[2]["actor/baseline"] != 0
