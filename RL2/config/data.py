"""Keys of data: `train_data`, `test_data` and its sets, and `data` of the supervised programs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from RL2.config.rollout import SamplingParams, check_opponents
from RL2.config.values import NAME, NAME_RULE, Count, Range
from RL2.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class TrainData:
    """The prompts that a policy trains on."""

    path: str | None = None
    """A .json, .jsonl, .csv, .parquet or .arrow file, or a hub data set as `split@name:subset`; `name` alone means its
    `train` split. null: no rows; the environment's `reset` generates tasks, new ones at each step, and an epoch of
    `trainer.n_epochs` is one step."""
    prompts_per_rollout: Count
    """Number of prompts per training step."""
    responses_per_prompt: Count = 1
    """Number of samples per prompt; they form a group."""
    curriculum: Literal["none", "failures", "frontier"] = "none"
    """Order of the rows after each has been seen once. none: every row once per epoch. With s the past success rate of
    a row, failures: with probability proportional to 1 - s; frontier: to s (1 - s), which prefers rows that are solved
    half of the time."""
    on_bad_row: Literal["stop", "skip"] = "stop"
    """Treatment of rows that cannot be used. stop: raise an error that names them. skip: continue without them,
    print their number, and list them in save_dir/skipped_rows.jsonl."""
    columns: dict[str, Any] = field(default_factory=dict)
    """Names of the columns in the rows where they differ from RL2's: `columns.prompt=question`. null ignores a column:
    with `columns.messages=null`, rows that have both columns are read by `prompt`."""

    def __post_init__(self) -> None:
        _check_columns(self.columns, "train_data.columns", ("prompt", "messages", "extra_info"))


@dataclass(frozen=True, kw_only=True)
class TestSet:
    """One of `test_data.sets`."""

    path: str | None = None
    """File or data set of the rows; null: `prompts_per_rollout` tasks that the environment's `reset` generates."""
    env_path: str | None = None
    """Environment script of this set; null: `rollout.env_path`."""
    prompts_per_rollout: Count | None = None
    """Number of prompts in flight, or of tasks to generate; null: all rows. Not inherited from
    `test_data.prompts_per_rollout`."""
    responses_per_prompt: Count | None = None
    """Number of samples per prompt; null: `test_data.responses_per_prompt`."""
    max_turns: Count | None = None
    """Maximum number of responses per episode; null: `rollout.max_turns`."""
    on_bad_row: Literal["stop", "skip"] | None = None
    """Treatment of rows that cannot be used; null: `test_data.on_bad_row`."""
    columns: dict[str, Any] = field(default_factory=dict)
    """Names of columns that differ from `test_data.columns`."""
    opponents: dict[str, Any] = field(default_factory=dict)
    """Frozen models that play roles, where they differ from `test_data.opponents`."""
    sampling: dict[str, Any] = field(default_factory=dict)
    """Sampling parameters that differ from `rollout.test_sampling_params`: `sampling.temperature=0.6`."""


@dataclass(frozen=True)
class TestSettings:
    """A test set with every setting resolved: `test_data` itself, or one of its sets."""

    name: str
    """Name of the set; the empty string is `test_data` itself."""
    path: str | None
    """File or data set of the rows; None: tasks that the environment's `reset` generates."""
    env_path: str | None
    """Environment script."""
    prompts_per_rollout: int | None
    """Number of prompts in flight, or of tasks to generate."""
    responses_per_prompt: int
    """Number of samples per prompt."""
    max_turns: int
    """Maximum number of responses per episode."""
    on_bad_row: Literal["stop", "skip"]
    """Treatment of rows that cannot be used."""
    columns: dict[str, Any]
    """Names of the columns in the rows."""
    sampling: SamplingParams
    """Sampling parameters."""
    opponents: dict[str, Any] = field(default_factory=dict)
    """Frozen models that play roles, by role."""

    @property
    def key(self) -> str:
        """Prefix of the configuration keys."""
        return f"test_data.sets.{self.name}" if self.name else "test_data"

    @property
    def prefix(self) -> str:
        """Prefix of the metrics."""
        return f"test/{self.name}" if self.name else "test"


@dataclass(frozen=True, kw_only=True)
class TestData:
    """The prompts that a policy is tested on."""

    path: str | None = None
    """File or data set of the rows, in the forms of `train_data.path`; null: tasks that the environment's `reset` makes
    up, the same at each test."""
    prompts_per_rollout: Count | None = None
    """Number of prompts in flight; every row is tested in any case. null: all at once. Without `test_data.path`: the
    number of tasks to generate."""
    responses_per_prompt: Count = 1
    """Number of samples per prompt; the score is the mean over all of them."""
    on_bad_row: Literal["stop", "skip"] = "stop"
    """Treatment of rows that cannot be used, as in `train_data.on_bad_row`."""
    columns: dict[str, Any] = field(default_factory=dict)
    """Names of columns that differ from `train_data.columns`."""
    opponents: dict[str, Any] = field(default_factory=dict)
    """Frozen models that play roles in tests, where they differ from `rollout.opponents`; `policy` is the policy."""
    sets: dict[str, TestSet] = field(default_factory=dict)
    """Further test sets by name, each with its own rows, environment and sampling: `sets.aime.path=...`. Metrics of a
    set begin with `test/NAME/`."""
    best_by: str | None = None
    """Name of the set whose score is `test/score`, if `test_data` has no rows of its own; null: the mean of the sets'
    scores. `test/score` is what trainer.keep_best, trainer.early_stop and trainer.load_ckpt_from=best compare."""

    def __post_init__(self) -> None:
        _check_columns(self.columns, "test_data.columns", ("prompt", "messages", "extra_info"))
        check_opponents(self.opponents, "test_data.opponents")
        for name, each in self.sets.items():
            key = f"test_data.sets.{name}"
            if not NAME.fullmatch(name):
                raise ConfigError(f"{key}: a test set cannot have this name; {NAME_RULE}")
            if name in ("reward", "env"):
                raise ConfigError(f"{key}: test/{name}/ is the prefix of other metrics; choose another name")
            _check_columns(each.columns, f"{key}.columns", ("prompt", "messages", "extra_info"))
            check_opponents(each.opponents, f"{key}.opponents")
            if each.path is None and each.prompts_per_rollout is None:
                raise ConfigError(
                    f"{key} has nothing to test on: set {key}.path, or {key}.prompts_per_rollout for tasks that its "
                    "environment generates"
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
        """True if `test_data` has rows or tasks of its own, beside `sets`."""
        return self.path is not None or self.prompts_per_rollout is not None


@dataclass(frozen=True, kw_only=True)
class SupervisedData:
    """The rows of `rm` and `dpo`, and of `sft` with one more key."""

    path: str
    """File or data set of the rows, in the forms of `train_data.path`. sft reads {"prompt", "response"}, {"messages"}
    or {"messages", "response"}; rm and dpo read {"prompt", "chosen", "rejected"}, or {"chosen", "rejected"} as two
    lists of messages."""
    test_path: str | None = None
    """File or data set of the rows that `trainer.test_freq` tests on; null: see `data.test_ratio`."""
    test_ratio: Annotated[float, Range(0, 0.999)] = 0.0
    """Share of the rows of `data.path` to hold out for tests, drawn once; 0: none."""
    env_path: str | None = None
    """Script whose `example(row)` turns a raw row into one of the formats of `data.path`."""
    columns: dict[str, Any] = field(default_factory=dict)
    """Names of the columns in the rows where they differ from RL2's, as in `train_data.columns`."""
    max_length: Count
    """Maximum length of a row, in tokens; longer rows, and pairs with a longer member, are dropped and counted. May
    exceed what a microbatch holds; a row that does not fit into one is an error."""
    batch_size: Count = 128
    """Number of rows per optimizer step."""
    on_bad_row: Literal["stop", "skip"] = "stop"
    """Treatment of rows that cannot be used. stop: raise an error that names them. skip: continue without them,
    print their number, and list them in save_dir/skipped_rows.jsonl."""

    def __post_init__(self) -> None:
        if self.test_path is not None and self.test_ratio > 0:
            raise ConfigError(f"data.test_path={self.test_path} and data.test_ratio={self.test_ratio}: choose one")
        _check_columns(self.columns, "data.columns", ("prompt", "messages", "response", "chosen", "rejected"))


def _check_columns(columns: dict[str, Any], key: str, known: tuple[str, ...]) -> None:
    for name, theirs in columns.items():
        if name not in known:
            raise ConfigError(f"{key}.{name}: there is no such column; choose one of {', '.join(known)}")
        if theirs is not None and not isinstance(theirs, str):
            raise ConfigError(f"{key}.{name}={theirs!r}; expected the name of a column, or null to ignore it")


@dataclass(frozen=True, kw_only=True)
class SFTData(SupervisedData):
    """The rows of `sft`."""

    train_on: Literal["all", "last", "weighted"] = "weighted"
    """Assistant turns that train: all of them, the last one, or all but those with `weight: 0` (OpenAI's format)."""
