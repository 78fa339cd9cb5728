"""A run that is killed and started again ends as one that was not: bit for bit."""

from __future__ import annotations

import json
import random
import re
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from programs import World, wait_for_line, without_times
from torch import nn

from RL2.data.cursor import Cursor
from RL2.errors import ConfigError
from RL2.io import checkpoint
from RL2.io.checkpoint import Checkpoints
from RL2.io.report import Report
from RL2.parallel.processes import Processes
from RL2.types import Trajectory

# One turn an episode: with several, the moments at which the environment answers decide which requests are decoded
# together, and with that the last bits of their log-probabilities, even in runs that nobody interrupts.
CASES = {
    "ppo": (
        "actor.update_per_rollout=2",
        "actor.kl.coef=0.01",
        "actor.kl.type=reward",
        "trainer.save_freq=1",
        "trainer.test_freq=3",
    ),
    # with a floor of the learning rate, and a reference that follows the policy
    "spo": (
        "actor.warmup_ratio=0.5",
        "actor.scheduler=cosine",
        "actor.min_lr=1e-7",
        "actor.kl.coef=0.01",
        "ref_actor.sync_every=2",
        "trainer.save_freq=2",
        "trainer.test_freq=4",
    ),
    # adapters with their base as the reference, and rows drawn by their past success
    "spo with adapters": (
        "actor.lora.rank=4",
        "actor.kl.coef=0.01",
        "train_data.curriculum=frontier",
        "train_data.prompts_per_rollout=8",
        "trainer.save_freq=2",
        "trainer.test_freq=4",
    ),
    # with the average of the policy as a teacher, which is in the checkpoints
    "ppo with a teacher": (
        "actor.objective=ppo+0.5*opd",
        "teacher.model_name=ema",
        "teacher.ema_decay=0.5",
        "trainer.save_freq=1",
        "trainer.test_freq=4",
    ),
    # with a critic, and with groups that are replaced
    "ppo with gae": (
        "adv.estimator=gae",
        "adv.lamda=0.9",
        "actor.freeze_steps=2",
        "critic.lr=1e-3",
        "critic.warmup_ratio=0.5",
        "rollout.dynamic_filtering=true",
        "rollout.dynamic_filtering_rounds=3",
        "train_data.responses_per_prompt=2",
        "trainer.save_freq=1",
        "trainer.test_freq=4",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_killed_run_ends_as_an_uninterrupted_one(case: str, world: World) -> None:
    program = case.split()[0]
    settings = (*CASES[case], "trainer.max_steps=8", f"test_data.path={world.root}/rl.jsonl")
    whole, killed = world.start(program, *settings, cold=True), world.start(program, *settings)

    first = json.loads(wait_for_line(killed.save_dir / "metrics.jsonl", killed))
    delay = random.uniform(0, 5 * first["time/step_s"])  # anywhere in a rollout, an update, a save
    time.sleep(delay)
    killed.kill()
    files = sorted(path.name for path in killed.save_dir.iterdir())
    print(f"{program}: killed {delay:.3f} s after its first step; it left {', '.join(files)}")
    whole.wait().succeeded()

    again = world.run(program, *settings, "trainer.load_ckpt_from=latest", save_dir=killed.save_dir).succeeded()
    assert again.weights.read_bytes() == whole.weights.read_bytes()
    for critic in whole.save_dir.glob("critic/*.safetensors"):
        assert (again.save_dir / "critic" / critic.name).read_bytes() == critic.read_bytes()
    assert without_times(again.metrics) == without_times(whole.metrics)
    assert again.samples == whole.samples
    assert [row["step"] for row in again.metrics] == list(range(9))


class Small:
    """What a checkpoint asks of a learner."""

    kept_model = None

    def __init__(self, *sizes: int) -> None:
        self.policy = nn.Sequential(*(nn.Linear(n, m) for n, m in pairwise(sizes)))
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), lr=0.1)
        self.steps = 0

    def step(self) -> None:
        self.policy(torch.ones(self.policy[0].in_features)).square().sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps += 1


def save(folder: Path, step: int, learner: Small, cursor: Cursor, processes: Processes, critic: Any = None) -> Path:
    checkpoints = Checkpoints(folder, processes)
    checkpoints.save(step, learner, cursor, critic)
    checkpoints.finish()
    return folder / f"step_{step:06d}"


@pytest.fixture
def saved(tmp_path: Path, processes: Processes) -> tuple[Path, Small]:
    learner, cursor = Small(2, 3, 1), Cursor(10, 4, seed=0)
    learner.step()
    cursor.next()
    return save(tmp_path, 1, learner, cursor, processes), learner


def test_model_optimizer_cursor_and_random_numbers_come_back(saved: tuple[Path, Small], processes: Processes) -> None:
    folder, learner = saved
    numbers = torch.rand(3), random.random()
    other, cursor = Small(2, 3, 1), Cursor(10, 4, seed=0)
    assert checkpoint.load(folder, other, cursor, processes) == 1
    assert (torch.rand(3).tolist(), random.random()) == (numbers[0].tolist(), numbers[1])
    assert other.steps == 1
    assert cursor.drawn == 4
    for trained in (learner, other):
        trained.step()
    for weight, expected in zip(other.policy.parameters(), learner.policy.parameters(), strict=True):
        assert torch.equal(weight, expected)


def test_a_critic_comes_back_too_and_is_missed(tmp_path: Path, processes: Processes) -> None:
    actor, critic, cursor = Small(2, 3, 1), Small(2, 1), Cursor(10, 4, seed=0)
    critic.step()
    with_critic = save(tmp_path, 1, actor, cursor, processes, critic)
    other = Small(2, 1)
    checkpoint.load(with_critic, Small(2, 3, 1), cursor, processes, other)
    assert other.steps == 1
    for trained in (critic, other):
        trained.step()
    for weight, expected in zip(other.policy.parameters(), critic.policy.parameters(), strict=True):
        assert torch.equal(weight, expected)

    alone = save(tmp_path, 2, actor, cursor, processes)
    with pytest.raises(ConfigError, match=r"step_000002 has no critic, which adv.estimator=gae needs"):
        checkpoint.load(alone, actor, cursor, processes, critic)


def test_latest_is_the_checkpoints_of_the_folder_newest_first(tmp_path: Path) -> None:
    assert checkpoint.candidates("latest", tmp_path) == []
    names = ("step_000002", "step_000010", "step_000030.partial", "step_000040.superseded")
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "notes.json").write_text("{}")
    assert checkpoint.candidates("latest", tmp_path) == [tmp_path / "step_000010", tmp_path / "step_000002"]


def test_best_is_the_tested_checkpoint_with_the_highest_score(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no checkpoint of a tested step"):
        checkpoint.candidates("best", tmp_path)
    rows = [{"step": step, "test/score": score} for step, score in ((0, 0.95), (2, 0.5), (4, 0.9), (6, 0.9), (9, 0.99))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 8, "te')
    for step in (2, 4, 6, 8):
        (tmp_path / f"step_{step:06d}").mkdir()
        (tmp_path / f"step_{step:06d}" / "notes.json").write_text("{}")
    assert checkpoint.candidates("best", tmp_path) == [tmp_path / "step_000004"]


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nothing"):
        message = f"trainer.load_ckpt_from={folder} is not a checkpoint (it has no notes.json)"
        with pytest.raises(ConfigError, match=re.escape(message)):
            checkpoint.candidates(str(folder), tmp_path)


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        (
            (2, 4, 1),
            "Size mismatch between saved torch.Size([3, 2]) and current: torch.Size([4, 2])",
        ),
        ((2, 3, 1, 5), "Missing key in checkpoint state_dict: model.2.weight"),
        ((2, 3), "it also has model.1.bias"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(
    sizes: tuple[int, ...], reason: str, saved: tuple[Path, Small], processes: Processes
) -> None:
    with pytest.raises(ConfigError, match=re.escape(reason)) as caught:
        checkpoint.load(saved[0], Small(*sizes), Cursor(10, 4, seed=0), processes)
    assert str(caught.value).startswith(f"trainer.load_ckpt_from={saved[0]} ")
    assert "\n" not in str(caught.value)


def test_a_damaged_checkpoint_is_refused(saved: tuple[Path, Small], processes: Processes) -> None:
    for part in (saved[0] / "state").glob("*.distcp"):
        part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(ConfigError, match=r"load_ckpt_from=.* cannot be loaded: "):
        checkpoint.load(saved[0], Small(2, 3, 1), Cursor(10, 4, seed=0), processes)


def test_what_an_interrupted_run_wrote_is_cut_back(tmp_path: Path) -> None:
    report = Report(tmp_path, is_first=True, num_steps=3)
    # line ends that are none in JSON, and what looks like the end of a line that was cut
    texts = ["\u2028 \x85 \r\n }", "ü}"]
    for step in range(3):
        report.samples(step, "train", [Trajectory(row=step, group=0, sample=0, texts=texts)])
    file = tmp_path / "samples.jsonl"
    whole = file.read_bytes()
    lines = whole.splitlines(keepends=True)
    for cut in range(len(lines[0]) + len(lines[1]), len(whole) + 1):
        file.write_bytes(whole[:cut])
        report.keep_before(2)
        assert file.read_bytes() == lines[0] + lines[1]


def test_going_back_sets_later_checkpoints_aside(tmp_path: Path) -> None:
    for step in (2, 4, 6):
        folder = tmp_path / f"step_{step:06d}"
        folder.mkdir()
        (folder / "notes.json").write_text("{}")
    checkpoint.set_aside_after(tmp_path, 4)
    assert checkpoint.candidates("latest", tmp_path)[0] == tmp_path / "step_000004"
    assert (tmp_path / "step_000006.superseded" / "notes.json").exists()
