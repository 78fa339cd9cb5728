"""How runs end: with the best model kept, early, or after a test alone. Their tasks are made up by the environment."""

from __future__ import annotations

from pathlib import Path

import pytest
from programs import World, without_times

FALLING = """
calls = 0

async def reset(extra_info):
    return f"task {extra_info['seed']}: "

async def step(state, action, extra_info):
    global calls
    calls += 1
    return dict(next_state=None, reward=float(len(action) % 2), score=-calls, done=True, extra_info=extra_info)
"""
DIGITS = """
async def reset(extra_info):
    return f"task {extra_info['seed']}: "

async def step(state, action, extra_info):
    score = sum(character.isdigit() for character in action) / 10
    return dict(next_state=None, reward=score, score=score, done=True, extra_info=extra_info)
"""
TESTS = (
    "train_data.path=null",
    "test_data.prompts_per_rollout=8",
    "rollout.test_sampling_params.temperature=1",
    "trainer.test_freq=1",
)


def environment(folder: Path, script: str) -> str:
    (folder / "environment.py").write_text(script)
    return f"rollout.env_path={folder}/environment.py"


def test_a_score_that_falls_twice_ends_the_run_and_the_best_model_is_kept(world: World, tmp_path: Path) -> None:
    run = world.run(
        "ppo",
        *TESTS,
        environment(tmp_path, FALLING),
        "trainer.early_stop=true",
        "trainer.keep_best=true",
        "trainer.save_freq=1",
        "trainer.keep=1",
        "trainer.max_steps=6",
    ).succeeded()
    assert [row["step"] for row in run.metrics] == [0, 1, 2]
    assert ["actor/loss" in row for row in run.metrics] == [True, True, False]
    assert "step 2: the test score fell twice in a row" in run.output
    best = (run.save_dir / "best" / "model.safetensors").read_bytes()
    assert best == world.weights.read_bytes()  # of step 0
    assert run.weights.read_bytes() != best
    assert [path.name for path in run.save_dir.glob("step_*")] == ["step_000002"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("endings")


def test_tasks_are_new_at_each_step_and_the_same_at_each_test(world: World, folder: Path) -> None:
    run = world.run("ppo", *TESTS, environment(folder, DIGITS), "trainer.save_freq=1", "trainer.samples_per_step=16")
    seen: dict[str, list[set[str]]] = {"train": [], "test": []}
    for split, tasks in seen.items():
        for step in range(4):
            tasks.append({s["texts"][0] for s in run.samples if (s["split"], s["step"]) == (split, step)})
    assert [len(tasks) for tasks in seen["train"]] == [4, 4, 4, 0]
    assert len(set.union(*seen["train"])) == 12
    assert seen["test"] == [seen["test"][0]] * 4
    assert len(seen["test"][0]) == 8
    assert not seen["test"][0] & set.union(*seen["train"])

    # a checkpoint tested by itself has the score that it had in the run
    settings = (*TESTS, environment(folder, DIGITS), "trainer.eval_only=true")
    alone = world.run("ppo", *settings, f"trainer.load_ckpt_from={run.save_dir}/step_000002").succeeded()
    (row,) = without_times(alone.metrics)
    # when `reset` answers decides which requests are decoded together, and so the last bits of log-probabilities
    assert row == pytest.approx({key: value for key, value in run.metrics[2].items() if key in row}, rel=1e-6)
    assert row["test/entropy"] != pytest.approx(run.metrics[0]["test/entropy"], rel=1e-4)
    assert not (alone.save_dir / "latest").exists()

    again = world.run("ppo", *settings, f"trainer.load_ckpt_from={run.save_dir}/step_000002", save_dir=run.save_dir)
    assert again.process.returncode == 1
    assert "already contains a run" in again.errors
