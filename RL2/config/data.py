"""Keys of data: `train_data`, `test_data` and its sets, and `data` of the supervised programs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from RL2.config.rollout import SamplingParams
from RL2.config.values import NAME, NAME_RULE, Count, Range
from RL2.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class TrainData:
    path: str | None
    """A .json, .jsonl, .csv, .parquet or .arrow file, or a hub data set as `split@name:subset`; `name` alone is its
    `train` split. null: no rows, the environment's `reset` makes up tasks, new ones at each step; an epoch of
    `trainer.n_epochs` is then one step."""
    prompts_per_rollout: Count
    """Prompts of one training step."""
    responses_per_prompt: Count
    """Samples of each prompt; they form a group."""
    curriculum: Literal["none", "failures", "frontier"]
    """Which rows are drawn once each has been seen. none: all in turn. By their past success rate s, failures:
    proportional to 1 - s; frontier: to s (1 - s), most of what is solved half of the time (data/curriculum.py)."""
    on_bad_row: Literal["stop", "skip"] = "stop"
    """What becomes of rows that cannot be used. stop: an error names them. skip: the run goes on without them, says how
    many there are, and lists them in save_dir/skipped_rows.jsonl."""
    columns: dict[str, Any]
    """Names of the columns in the rows, where they are others: `columns.prompt=question`. null leaves a column out:
    with `columns.messages=null` rows that have both are read by their `prompt`."""

    def __post_init__(self) -> None:
        _check_columns(self.columns, "train_data.columns", ("prompt", "messages", "extra_info"))


@dataclass(frozen=True, kw_only=True)
class TestSet:
    """One of `test_data.sets`."""

    path: str | None = None
    """File or data set of its rows; null: `prompts_per_rollout` tasks that `reset` makes up."""
    env_path: str | None = None
    """Environment of the set; null: `rollout.env_path`."""
    prompts_per_rollout: Count | None = None
    """Prompts in flight at once, or tasks that are made up; null: all rows. `test_data.prompts_per_rollout` does not
    count here."""
    responses_per_prompt: Count | None = None
    """Samples of each prompt; null: `test_data.responses_per_prompt`."""
    max_turns: Count | None = None
    """Responses of one episode at most; null: `rollout.max_turns`."""
    on_bad_row: Literal["stop", "skip"] | None = None
    """null: `test_data.on_bad_row`."""
    columns: dict[str, Any] = field(default_factory=dict)
    """Names of columns that differ from those of `test_data.columns`."""
    sampling: dict[str, Any] = field(default_factory=dict)
    """Keys of `rollout.test_sampling_params` that are others in this set: `sampling.temperature=0.6`."""


@dataclass(frozen=True)
class TestSettings:
    """A test set with all that holds for it: `test_data` itself, or one of its sets."""

    name: str
    """Name of the set; '' is `test_data` itself."""
    path: str | None
    """File or data set of its rows; None: tasks that `reset` makes up."""
    env_path: str
    """Script of its environment."""
    prompts_per_rollout: int | None
    """Prompts in flight at once, or tasks that are made up."""
    responses_per_prompt: int
    """Samples of each prompt."""
    max_turns: int
    """Responses of one episode at most."""
    on_bad_row: Literal["stop", "skip"]
    """Stop at rows that cannot be used, or leave them out."""
    columns: dict[str, Any]
    """Names of the columns in its rows."""
    sampling: SamplingParams
    """How it is sampled."""

    @property
    def key(self) -> str:
        """The group of its keys."""
        return f"test_data.sets.{self.name}" if self.name else "test_data"

    @property
    def prefix(self) -> str:
        """Prefix of the names of its metrics."""
        return f"test/{self.name}" if self.name else "test"


@dataclass(frozen=True, kw_only=True)
class TestData:
    path: str | None
    """As `train_data.path`; null: tasks that `reset` makes up, the same at each test."""
    prompts_per_rollout: Count | None
    """Prompts in flight at once; the whole file is tested in any case. null: all at once. Without a file, how many
    tasks are made up."""
    responses_per_prompt: Count
    """Samples of each prompt; the score is the mean over all."""
    on_bad_row: Literal["stop", "skip"] = "stop"
    """As `train_data.on_bad_row`."""
    columns: dict[str, Any]
    """As `train_data.columns`, which count here too."""
    sets: dict[str, TestSet] = field(default_factory=dict)
    """Further test sets by name, each with its own rows, environment and sampling: `sets.aime.path=...`. The metrics of
    a set begin with `test/NAME/`."""
    best_by: str | None = None
    """Without rows of `test_data` itself, `test/score` is the score of this set; null: the mean of the sets' scores.
    `test/score` decides what trainer.keep_best, trainer.early_stop and trainer.load_ckpt_from=best take."""

    def __post_init__(self) -> None:
        _check_columns(self.columns, "test_data.columns", ("prompt", "messages", "extra_info"))
        for name, each in self.sets.items():
            key = f"test_data.sets.{name}"
            if not NAME.fullmatch(name):
                raise ConfigError(f"{key}: a test set cannot have this name; {NAME_RULE}")
            if name in ("reward", "env"):
                raise ConfigError(f"{key}: test/{name}/ is where other metrics are; choose another name")
            _check_columns(each.columns, f"{key}.columns", ("prompt", "messages", "extra_info"))
            if each.path is None and each.prompts_per_rollout is None:
                raise ConfigError(
                    f"{key} has nothing to test on: set {key}.path, or {key}.prompts_per_rollout for tasks that its "
                    "environment makes up"
                )
        if self.best_by is not None and self.best_by not in self.sets:
            have = ", ".join(self.sets) or "none"
            raise ConfigError(f"test_data.best_by={self.best_by}: there is no such set in test_data.sets ({have})")
        if self.best_by is not None and self.has_own:
            raise ConfigError(
                f"test_data.best_by={self.best_by} has no effect with rows of test_data itself, whose score decides; "
                "make these a set too: test_data.sets.NAME.path"
            )

    @property
    def has_own(self) -> bool:
        """Return whether there is something to test on beside `sets`."""
        return self.path is not None or self.prompts_per_rollout is not None


@dataclass(frozen=True, kw_only=True)
class SupervisedData:
    path: str
    """As `train_data.path`. Rows of sft: {"prompt", "response"}, {"messages"} or {"messages", "response"}; of rm and
    dpo: {"prompt", "chosen", "rejected"} or {"chosen", "rejected"} as two lists of messages."""
    test_path: str | None
    """As `data.path`: what `trainer.test_freq` tests on."""
    test_ratio: Annotated[float, Range(0, 0.999)]
    """Or this share of the rows of `data.path`, drawn once, which is then not trained on; 0: none."""
    env_path: str | None
    """A script whose `example(row)` turns a raw row into one of these formats."""
    columns: dict[str, Any]
    """Names of the columns in the rows, where they are others, as in `train_data.columns`."""
    max_length: Count
    """Tokens. A longer row, or a pair of which one is longer, is left out. How many is printed. It may be more than
    fits into a microbatch: a row that is really longer than that is refused."""
    batch_size: Count
    """Rows of one optimizer step."""
    on_bad_row: Literal["stop", "skip"] = "stop"
    """What becomes of rows that cannot be used. stop: an error names them. skip: the run goes on without them, says how
    many there are, and lists them in save_dir/skipped_rows.jsonl."""

    def __post_init__(self) -> None:
        if self.test_path is not None and self.test_ratio > 0:
            raise ConfigError(f"data.test_path={self.test_path} and data.test_ratio={self.test_ratio}: choose one")
        _check_columns(self.columns, "data.columns", ("prompt", "messages", "response", "chosen", "rejected"))


def _check_columns(columns: dict[str, Any], key: str, known: tuple[str, ...]) -> None:
    for name, theirs in columns.items():
        if name not in known:
            raise ConfigError(f"{key}.{name}: there is no such column; choose one of {', '.join(known)}")
        if theirs is not None and not isinstance(theirs, str):
            raise ConfigError(f"{key}.{name}={theirs!r}; expected the name of a column, or null to leave it out")


@dataclass(frozen=True, kw_only=True)
class SFTData(SupervisedData):
    train_on: Literal["all", "last", "weighted"] = "weighted"
    """Which turns of the assistant train: all, the last one, or all but those with `weight: 0` (OpenAI's rows)."""
