"""Groups without a signal are replaced within a rollout, from the same stream of rows."""

from __future__ import annotations

from pathlib import Path

import pytest
from rl_settings import rl_config
from transformers import PreTrainedTokenizerBase

from RL2.config.programs import RLConfig
from RL2.data.cursor import Cursor
from RL2.engines.scripted import ScriptedEngine
from RL2.errors import ConfigError
from RL2.io.report import Report
from RL2.parallel.processes import Processes
from RL2.rollout.environment import Environment, load_environment
from RL2.rollout.episodes import Episodes, EpisodeSetting
from RL2.rollout.filters import filter_metrics, trainable
from RL2.rollout.scheduler import Scheduler
from RL2.trainer import tasks
from RL2.trainer.rl import sample
from RL2.trainer.tasks import Example, Source, train_tasks
from RL2.types import Prompt, Sampling

EASY = 4
"""Rows from this one on are always solved."""

SCRIPT = """
async def step(state, action, extra_info):
    reward = float(extra_info["easy"] or len(action) % 2)
    return {"next_state": None, "reward": reward, "score": reward, "done": True, "extra_info": extra_info}
"""
WITH_RESET = SCRIPT + "async def reset(extra_info): return str(extra_info['seed'])\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "env.py").write_text(SCRIPT)
    (tmp_path / "reset.py").write_text(WITH_RESET)
    return tmp_path


def config(*overrides: str) -> RLConfig:
    return rl_config("train_data.prompts_per_rollout=4", "rollout.dynamic_filtering=true", *overrides)


def one_long_one_short(token_ids: list[int], sampling: Sampling) -> list[int]:
    """Of two samples of a prompt one has an odd length: requests come in order."""
    return [ord("a")] * (1 + next(TURN) % 2)


TURN = iter(range(10**6))


def episodes(
    settings: RLConfig, environment: Environment, tokenizer: PreTrainedTokenizerBase, processes: Processes
) -> Episodes:
    engine = ScriptedEngine(one_long_one_short)
    return Episodes(EpisodeSetting(engine, environment, tokenizer, settings.rollout.max_turns, 100), (), processes)


@pytest.mark.parametrize(("rounds", "kept", "limit"), [(1, 2, 4), (2, 3, 6), (10, 4, 20)])
def test_dropped_groups_are_replaced_by_further_rows(
    rounds: int, kept: int, limit: int, folder: Path, tokenizer: PreTrainedTokenizerBase, processes: Processes
) -> None:
    settings = config(f"rollout.dynamic_filtering_rounds={rounds}")
    environment = load_environment(folder / "env.py", 5)
    prompts = [Prompt(n, "p", [100], {"easy": n >= EASY}) for n in range(2 * EASY)]
    cursor, expected = Cursor(len(prompts), 4, seed=1), Cursor(len(prompts), 4, seed=1)
    report = Report(folder, is_first=True, num_steps=1)
    played = episodes(settings, environment, tokenizer, processes)
    scheduler = Scheduler(prompts, cursor, played, settings, num_steps=1)
    trajectories, signal = sample(scheduler, settings, 0, report)
    scheduler.close()
    environment.close()

    # the rows of the stream, each in a group of its own, and none drawn that was not rolled out
    rows = [t.row for t in trajectories if t.sample == 0]
    assert rows == expected.next(cursor.drawn)
    assert [t.group for t in trajectories] == [n // 2 for n in range(2 * len(rows))]
    assert len(rows) <= limit
    assert [t.row for t in signal if t.sample == 0] == [row for row in rows if row < EASY]
    assert len(signal) == 2 * kept


COUNTING = """
from pathlib import Path

def counted(groups):
    with Path(__file__).with_suffix(".log").open("a") as log:
        print(*(group[0].group for group in groups), file=log)
    return [group for group in groups if len({trajectory.reward for trajectory in group}) > 1]
"""


def test_a_filter_is_called_once_for_each_group(
    folder: Path, tokenizer: PreTrainedTokenizerBase, processes: Processes
) -> None:
    (folder / "mine.py").write_text(COUNTING)
    filtering = "rollout.dynamic_filtering_rounds=10", f"rollout.filter={folder}/mine.py:counted"
    settings = rl_config("train_data.prompts_per_rollout=4", *filtering)
    environment = load_environment(folder / "env.py", 5)
    prompts = [Prompt(n, "p", [100], {"easy": n >= EASY}) for n in range(2 * EASY)]
    played = episodes(settings, environment, tokenizer, processes)
    scheduler = Scheduler(prompts, Cursor(len(prompts), 4, seed=1), played, settings, num_steps=1)
    trajectories, kept = sample(scheduler, settings, 0, Report(folder, is_first=True, num_steps=1))
    assert trainable(trajectories, kept, settings) == kept
    filter_metrics(trajectories, kept, settings)
    scheduler.close()
    environment.close()

    rounds = [line.split() for line in (folder / "mine.log").read_text().splitlines()]
    assert len(rounds) > 1
    assert [int(group) for groups in rounds for group in groups] == list(range(len(trajectories) // 2))


def no_rows(source: Source, example: Example) -> list[Prompt]:
    raise AssertionError(f"{source.path}: there is nothing to read")


def test_tasks_that_reset_makes_up(folder: Path) -> None:
    settings = config(
        "train_data.path=null", "trainer.max_steps=2", "trainer.test_freq=1", "test_data.prompts_per_rollout=3"
    )
    environment = load_environment(folder / "reset.py", 5)
    assert [p.row for p in train_tasks(settings, environment, no_rows)] == [0, 1, 2, 3]
    (tests,) = tasks.test_tasks(settings, environment, no_rows)
    assert [p.row for p in tests.prompts] == [0, 1, 2]
    assert len({p.extra_info["seed"] for p in tests.prompts}) == 3
    environment.close()

    environment = load_environment(folder / "env.py", 5)
    with pytest.raises(ConfigError, match=r"train_data.path is not set, and .*env.py has no `reset`"):
        train_tasks(settings, environment, no_rows)
    environment.close()
