"""Several test sets in one run: each with its rows, environment and sampling, and one score that decides."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rl_settings import rl_config
from transformers import PreTrainedTokenizerBase

from RL2.config.programs import RLConfig
from RL2.data.template import Template
from RL2.engines.scripted import ScriptedEngine
from RL2.errors import ConfigError
from RL2.io.report import Report
from RL2.parallel.processes import Processes
from RL2.rollout.environment import load_environment
from RL2.rollout.episodes import Episodes, EpisodeSetting
from RL2.rollout.metrics import NothingScored
from RL2.trainer import tasks
from RL2.trainer.evaluator import Evaluator, scores_of

SCRIPT = """
async def step(state, action, extra_info):
    return {"next_state": state + action, "reward": RIGHT, "score": SCORE, "done": False, "extra_info": extra_info}

async def reset(extra_info):
    return "made up"
"""


class Shown:
    """What the token token_log is handed."""

    def __init__(self) -> None:
        self.tests: list[Any] = []


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, right, score in (("own", "1", "1"), ("half", "0.5", "0.5"), ("broken", "None", "1")):
        (tmp_path / f"{name}.py").write_text(SCRIPT.replace("RIGHT", right).replace("SCORE", score))
    for name, number in (("three", 3), ("five", 5)):
        rows = [json.dumps({"prompt": f"{n}?"}) for n in range(number)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    return tmp_path


def config(folder: Path, *overrides: str) -> RLConfig:
    return rl_config(
        f"train_data.path={folder}/three.jsonl",
        "train_data.prompts_per_rollout=4",
        f"rollout.env_path={folder}/own.py",
        "rollout.max_turns=2",
        "trainer.test_freq=1",
        *overrides,
    )


class Examined:
    """One test of all sets by the code of a run, with an engine that notes what it is asked for."""

    def __init__(
        self, settings: RLConfig, folder: Path, tokenizer: PreTrainedTokenizerBase, processes: Processes
    ) -> None:
        environment = load_environment(settings.rollout.env_path, 5)
        self.engine = ScriptedEngine(lambda token_ids, sampling: [40] * sampling.max_new_tokens)
        self.notes: list[str] = []
        self.token_log = Shown()
        sets = tasks.test_tasks(settings, environment, tasks.reader(Template(tokenizer), 100, self.notes))
        setting = EpisodeSetting(self.engine, environment, tokenizer, settings.rollout.max_turns, max_length=100)
        episodes = Episodes(setting, (), processes)
        report = Report(folder, is_first=True, num_steps=1)
        try:
            evaluator = Evaluator(settings, sets, episodes, report, self.token_log)  # type: ignore[arg-type]
            self.metrics = evaluator.run(0)
            self.names = [each.settings.name for each in sets]
            self.shared = sets[0].environment is environment
        finally:
            episodes.close()
            for each in {environment, *(one.environment for one in sets)}:
                each.close()
        self.samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def test_each_set_has_its_rows_environment_and_sampling(
    folder: Path, tokenizer: PreTrainedTokenizerBase, processes: Processes
) -> None:
    settings = config(
        folder,
        f"test_data.path={folder}/three.jsonl",
        f"test_data.sets.half.path={folder}/five.jsonl",
        f"test_data.sets.half.env_path={folder}/half.py",
        "test_data.sets.half.sampling.temperature=0.6",
        "test_data.sets.half.sampling.max_new_tokens=3",
        "test_data.sets.half.responses_per_prompt=2",
        "test_data.sets.half.prompts_per_rollout=2",
        "test_data.sets.half.max_turns=1",
        "test_data.sets.tasks.prompts_per_rollout=7",
        "trainer.samples_per_step=99",
    )
    found = Examined(settings, folder, tokenizer, processes)
    assert found.names == ["", "half", "tasks"]
    assert found.shared, "one script is loaded once"
    scores = {name: value for name, value in found.metrics.items() if name.endswith("score")}
    assert scores == {"test/score": 2, "test/half/score": 0.5, "test/tasks/score": 2}
    assert found.metrics["test/length"] == 8
    assert found.metrics["test/half/length"] == 3
    assert found.metrics["test/tasks/turns"] == 2
    asked = [(sampling.temperature, sampling.max_new_tokens) for _, sampling in found.engine.requests]
    assert asked == [(0, 4)] * 6 + [(0.6, 3)] * 10 + [(0, 4)] * 14
    keys = [(sample.get("set"), sample["row"], sample["group"], sample["sample"]) for sample in found.samples]
    assert keys == [
        *((None, row, row, 0) for row in range(3)),
        *(("half", row, 3 + row, sample) for row in range(5) for sample in range(2)),
        *(("tasks", row, 8 + row, 0) for row in range(7)),
    ]
    assert [(len(shown), sampling.temperature) for shown, sampling in found.token_log.tests] == [
        (3, 0),
        (10, 0.6),
        (7, 0),
    ]


@pytest.mark.parametrize(("best_by", "score"), [("null", 1.25), ("half", 0.5), ("own", 2)])
def test_without_rows_of_its_own_the_sets_decide(
    best_by: str, score: float, folder: Path, tokenizer: PreTrainedTokenizerBase, processes: Processes
) -> None:
    settings = config(
        folder,
        f"test_data.sets.own.path={folder}/three.jsonl",
        f"test_data.sets.half.path={folder}/five.jsonl",
        f"test_data.sets.half.env_path={folder}/half.py",
        "test_data.sets.half.max_turns=1",
        f"test_data.best_by={best_by}",
    )
    found = Examined(settings, folder, tokenizer, processes)
    assert found.metrics["test/score"] == score
    assert found.names == ["own", "half"]
    assert "test/length" not in found.metrics


def test_a_set_without_a_score_is_named(folder: Path, tokenizer: PreTrainedTokenizerBase, processes: Processes) -> None:
    settings = config(
        folder,
        f"test_data.path={folder}/three.jsonl",
        f"test_data.sets.bad.path={folder}/three.jsonl",
        f"test_data.sets.bad.env_path={folder}/broken.py",
    )
    with pytest.raises(NothingScored, match=r"none of the 3 trajectories of test_data\.sets\.bad has a reward"):
        Examined(settings, folder, tokenizer, processes)


def test_one_set_alone_is_tested_as_before(
    folder: Path, tokenizer: PreTrainedTokenizerBase, processes: Processes
) -> None:
    found = Examined(config(folder, f"test_data.path={folder}/three.jsonl"), folder, tokenizer, processes)
    assert all(name.count("/") == 1 for name in found.metrics)
    assert not any("set" in sample for sample in found.samples)


REFUSED = {
    "test_data.sets.a.pth=x": r"nothing reads test_data\.sets\.a\.pth",
    "test_data.sets.a.responses_per_prompt=2": r"test_data\.sets\.a has nothing to test on: set ",
    "test_data.sets.a.sampling.temprature=1": r"nothing reads test_data\.sets\.a\.sampling\.temprature",
    "test_data.sets.a.sampling.temperature=-1": r"test_data\.sets\.a\.sampling\.temperature=-1; must be at least 0",
    "test_data.sets.a.sampling.max_new_tokens=101": r"test_data\.sets\.a\.sampling\.max_new_tokens=101 does not fit",
    "test_data.sets.a.columns.promt=x": r"test_data\.sets\.a\.columns\.promt: there is no such column",
    "test_data.sets.a=x": r"test_data\.sets\.a='x'; test_data\.sets\.a is a group",
    "test_data.best_by=b": r"test_data\.best_by=b: there is no such set in test_data\.sets \(a\)",
}


def test_what_cannot_work_is_refused(folder: Path) -> None:
    for override, message in REFUSED.items():
        alone = override in ("test_data.sets.a.responses_per_prompt=2", "test_data.sets.a=x")
        with pytest.raises(ConfigError, match=message):
            config(folder, *([] if alone else ["test_data.sets.a.path=x"]), override)


def test_names_that_other_metrics_have_are_refused(folder: Path) -> None:
    for name in ("reward", "env"):
        with pytest.raises(ConfigError, match=f"test_data.sets.{name}: test/{name}/ is the prefix of other metrics"):
            config(folder, f"test_data.sets.{name}.path=x")
    with pytest.raises(ConfigError, match="best_by=a has no effect with rows of test_data itself"):
        config(folder, "test_data.path=x", "test_data.sets.a.path=x", "test_data.best_by=a")


def test_what_a_set_leaves_open_is_as_of_test_data(folder: Path) -> None:
    settings = config(
        folder,
        "test_data.sets.a.path=x",
        "test_data.sets.a.columns.prompt=question",
        "test_data.responses_per_prompt=3",
        "test_data.on_bad_row=skip",
        "test_data.columns.extra_info=null",
        "rollout.test_sampling_params.top_p=0.9",
        "rollout.test_sampling_params.stop=[x]",
    )
    (one,) = settings.test_sets
    assert (one.env_path, one.max_turns) == (f"{folder}/own.py", 2)
    assert (one.responses_per_prompt, one.on_bad_row) == (3, "skip")
    assert one.columns == {"extra_info": None, "prompt": "question"}
    assert one.sampling == settings.rollout.test_sampling_params


def test_scores_before_a_resume_are_those_of_the_sets_that_decide_now(folder: Path) -> None:
    """A mean of two sets is no score of one of them: the best model would be another one."""
    rows = [
        {"train/score": 9.0},
        {"test/score": 0.5, "test/a/score": 0.1, "test/b/score": 0.9},
        {"test/score": 0.3, "test/a/score": 0.2, "test/b/score": 0.4},
        {"test/score": 0.7, "test/a/score": 0.7},
    ]
    expected = {"null": [0.5, pytest.approx(0.3)], "a": [0.1, 0.2, 0.7], "b": [0.9, 0.4]}
    for best_by, scores in expected.items():
        settings = config(folder, "test_data.sets.a.path=x", "test_data.sets.b.path=x", f"test_data.best_by={best_by}")
        sets = [tasks.TestTasks(each, None, []) for each in settings.test_sets]  # type: ignore[arg-type]
        assert scores_of(rows, sets, settings) == scores
