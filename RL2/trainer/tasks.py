"""Rows and made-up tasks that reinforcement learning trains and tests on."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from RL2.config.data import TestSettings
from RL2.config.programs import RLConfig
from RL2.data.bad_rows import BadRows
from RL2.data.prompts import Prompts, load_prompts
from RL2.data.sft import marked, pieces
from RL2.data.source import Row, with_columns
from RL2.data.template import Template
from RL2.errors import ConfigError
from RL2.io.progress import Progress
from RL2.io.report import NUM_SHOWN
from RL2.rollout.environment import Environment, load_environment
from RL2.rollout.episode import request_seed
from RL2.rollout.episodes import Player
from RL2.types import Prompt

Example = Callable[[Row], Row | None] | None
"""Function that converts a raw row into one of the known formats, or into None to leave it out."""


@dataclass(frozen=True)
class Source:
    """A file or data set of rows, and what the configuration says of it."""

    path: str
    key: str
    """Group of its settings: `train_data`, `test_data` or `test_data.sets.NAME`."""
    on_bad_row: Literal["stop", "skip"]
    keeps_messages: bool = False
    """Prompts have the messages too, which agents and scripts with roles read."""

    def bad_rows(self) -> BadRows:
        return BadRows(self.path, skip=self.on_bad_row == "skip", key=f"{self.key}.on_bad_row")


Load = Callable[[Source, Example], Seq[Prompt]]


@dataclass(frozen=True)
class TestTasks:
    """A test set with its environment and prompts."""

    settings: TestSettings
    environment: Environment
    prompts: Seq[Prompt]
    player: Player | None = None
    """Another way to play its episodes than engine and environment in turn."""

    @property
    def num_responses(self) -> int:
        return len(self.prompts) * self.settings.responses_per_prompt


def reader(
    template: Template,
    longest: int,
    notes: list[str],
    listing: Path | None = None,
    progress: Progress | None = None,
) -> Callable[[Source, Example], Prompts]:
    """Return a function that reads the prompts of a source and adds lines about them to `notes`.

    Skipped rows go to the file `listing`. `template` is that of the tokenizer, and `longest` the limit of a sequence in
    tokens.
    """
    tokenizer = template.tokenizer

    def read(source: Source, example: Example) -> Prompts:
        bad, keeps = source.bad_rows(), source.keeps_messages
        prompts = load_prompts(source.path, tokenizer, example, longest - 1, bad, progress, template, keeps)
        first = prompts[0]
        shown = marked(tokenizer, first.token_ids, [False] * len(first.token_ids))
        said = [f"{source.path}: {sizes(prompts)}", f"{source.path}, row {first.row + 1}: {shown}[[response]]"]
        notes.extend([*said, *bad.notes(listing)])
        return prompts

    return read


def sizes(prompts: Prompts) -> str:
    """Return the number of prompts and their lengths in words."""
    mean, most = prompts.lengths.mean(), prompts.lengths.max()
    return f"{len(prompts)} rows; prompts of {mean:.0f} tokens on average, at most {most}"


def first_rows(prompts: Seq[Prompt], tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """Return the texts of the first prompts of the data, each followed by a mark for the response that trains."""
    shown = [prompt for prompt in prompts[:NUM_SHOWN] if prompt.token_ids]
    responses = [("[the response]", True)]
    return [
        {"name": f"row {p.row + 1}", "pieces": pieces(tokenizer, p.token_ids, [False] * len(p.token_ids)) + responses}
        for p in shown
    ]


def train_tasks(config: RLConfig, environment: Environment, load: Load) -> Seq[Prompt]:
    """Return what is trained on: rows by `load`, or tasks that the environment generates."""
    data = config.train_data
    if data.path is None and config.trainer.eval_only:
        return synthetic_prompts(data.prompts_per_rollout)  # of which none is played
    has_agent = config.rollout.agent is not None
    keeps_messages = has_agent or bool(environment.roles)
    source = data.path and Source(data.path, "train_data", data.on_bad_row, keeps_messages)
    return _tasks(source or "train_data", data.columns, environment, load, data.prompts_per_rollout, has_agent)


def test_tasks(config: RLConfig, environment: Environment, load: Load) -> list[TestTasks]:
    """Return what is tested on, set by set; nothing in a run without tests.

    `environment` is that of `rollout.env_path`; sets with the same script share it.
    """
    if config.trainer.test_freq is None and not config.trainer.eval_only:
        return []
    environments = {config.rollout.env_path: environment}
    has_agent = config.rollout.agent is not None
    found = []
    for each in config.test_sets:
        if each.env_path is not None and each.env_path not in environments:
            environments[each.env_path] = load_environment(
                each.env_path, config.rollout.env_timeout_s, config.reward.weights, with_roles=True
            )
        own = environments[each.env_path]
        source = each.path and Source(each.path, each.key, each.on_bad_row, has_agent or bool(own.roles))
        number = each.prompts_per_rollout or 0
        prompts = _tasks(source or each.key, each.columns, own, load, number, has_agent, config.trainer.seed)
        found.append(TestTasks(each, own, prompts))
    return found


def _tasks(
    source: Source | str,
    columns: dict[str, Any],
    environment: Environment,
    load: Load,
    number: int,
    has_agent: bool,
    seed: int | None = None,
) -> Seq[Prompt]:
    """Return the rows of a source or, where only the key of one is given, `number` tasks without a row.

    `reset` or `play` of the environment, or the agent, generates them.
    """
    if isinstance(source, Source):
        return load(source, with_columns(columns, environment.example))
    if not environment.has_reset and not environment.roles and not has_agent:
        raise ConfigError(
            f"{source}.path is not set, and {environment.path} has no `reset` that generates tasks; "
            f"pass {source}.path=..."
        )
    return synthetic_prompts(number, seed)


def synthetic_prompts(number: int, seed: int | None = None) -> list[Prompt]:
    """Return prompts without a text, for tasks that `reset` or an agent generates.

    Without a `seed` the tasks are new in each rollout; with one they are always the same.
    """
    # rollouts have no seeds below 0, so what is tested on is not what was trained on
    seeds = [{} if seed is None else {"seed": request_seed(-1 - seed, n, 0, 0) % 2**32} for n in range(number)]
    return [Prompt(n, "", [], extra_info) for n, extra_info in enumerate(seeds)]
