"""A kept step of a run, as `rl2 credit` needs it: its rollouts with their rows, and the parts that continue them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from pyarrow import parquet

from RL2.config.programs import RLConfig
from RL2.credit.continuations import Recorded
from RL2.data.template import Template
from RL2.engines.make import make_engine
from RL2.errors import ConfigError, UserError, naming
from RL2.io.progress import Progress
from RL2.io.report import TOKENS
from RL2.models.policy import configured_tokenizer, max_length, stop_tokens
from RL2.parallel.processes import Processes
from RL2.rollout.continuation import decode
from RL2.rollout.environment import load_environment
from RL2.rollout.episodes import EpisodeSetting
from RL2.rollout.scheduler import rollout_seed
from RL2.tools.replay import read_batch, run_config
from RL2.trainer.run import REPLAY_BATCH, replay_folder
from RL2.trainer.tasks import reader, train_tasks
from RL2.types import Prompt, Sampling, TokenBatch
from RL2.workers.actor import Actor


@dataclass(frozen=True)
class KeptAnswer:
    """An answer of the step."""

    row: int
    sample: int
    reward: float
    recorded: Recorded
    sequence: int
    """Number of its sequence in the batch of the step."""


@dataclass(frozen=True)
class KeptStep:
    """A kept step, and what samples from its weights."""

    step: int
    folder: Path
    engine: str
    batch: TokenBatch
    actor: Actor
    setting: EpisodeSetting
    sampling: Sampling
    answers: list[KeptAnswer]
    skipped: list[dict[str, Any]]
    """Row, sample and reason of each answer that cannot be continued."""


def open_step(
    run: Path, step: int, title: str, number: int, engine: str, progress: Progress, closing: ExitStack
) -> KeptStep:
    """Load a kept step with its first `number` answers; `closing` closes its engine and environments.

    `title` is an objective as for `rl2 replay`, which only has to fit. `engine` is a value of rollout.engine, or empty
    for the run's. Raise UserError if the step or the run's settings cannot be used.
    """
    if engine not in ("", "embedded", "vllm", "sglang"):
        raise ConfigError(f"--engine {engine}: choose embedded, vllm or sglang")
    folder = replay_folder(run, step)
    config = run_config(run, folder, title, engine)
    _refuse(config)
    # nothing trains meanwhile, so the engine may share the weights
    rollout: Any = replace(config.rollout, max_staleness=0, partial_rollout=0.0)
    tokenizer = configured_tokenizer(config.actor, "actor")
    template = Template(tokenizer)
    with naming("actor.model_name"):
        longest = min(_longest(run) + 1, max_length(config.actor.model_name))
    processes = Processes.start(timeout_s=600)
    closing.callback(processes.stop)
    environment = load_environment(str(rollout.env_path), rollout.env_timeout_s, config.reward.weights)
    closing.callback(environment.close)
    prompts = train_tasks(config, environment, reader(template, longest, [], progress=progress))
    actor = Actor(config.actor, processes, 1, folder)
    sampler = make_engine(rollout, actor, lambda ids: decode(tokenizer, ids), longest, folder)
    closing.callback(sampler.close)
    sampler.load_weights(actor.weights(), version=step)
    setting = EpisodeSetting(sampler, environment, tokenizer, rollout.max_turns, longest, template)
    params = rollout.train_sampling_params
    with naming("actor.model_name"):
        ends = stop_tokens(actor.lm, tokenizer, template)
    sampling = Sampling(
        params.max_new_tokens,
        params.temperature,
        params.top_p,
        params.top_k,
        stop_token_ids=ends,
        min_p=params.min_p,
    )
    batch = read_batch(folder / REPLAY_BATCH)
    answers, skipped = _answers(_rows(run, step)[:number], batch, prompts, rollout_seed(config, step))
    return KeptStep(step, folder, rollout.engine, batch, actor, setting, sampling, answers, skipped)


def _longest(run: Path) -> int:
    """Return the limit of a sequence in the run, in tokens; `run_config` sets the sizes of the layout to 1."""
    actor: Any = OmegaConf.to_container(OmegaConf.load(run / "config.yaml"))
    return int(actor["actor"]["max_length_per_device"]) * int(actor["actor"]["sp_size"])


def _refuse(config: RLConfig) -> None:
    """Raise ConfigError for runs whose answers cannot be continued as they were sampled."""
    params = config.rollout.train_sampling_params
    if config.rollout.agent is not None:
        raise ConfigError(
            f"rollout.agent={config.rollout.agent}: an agent cannot be started in the middle of an episode, so its "
            "answers have no continuations; credit works with an environment script"
        )
    if params.temperature == 0:
        raise ConfigError("the run samples at temperature 0: its policy has one continuation, and values say nothing")
    if params.stop:
        raise ConfigError(
            "rollout.train_sampling_params.stop is set: a stop string may begin in the recorded part of an answer, "
            "where the engine does not look for it"
        )


def _rows(run: Path, step: int) -> list[dict[str, Any]]:
    """Return the recorded rollouts of a step that have token ids."""
    file = run / TOKENS / f"{step:06d}_train.parquet"
    if not file.exists():
        raise UserError(
            f"{file} is missing, which says which row each answer belongs to; it is written at kept steps unless "
            "trainer.token_stats_freq=null or trainer.samples_per_step=0, and trainer.records_mib bounds its folder"
        )
    rows: list[dict[str, Any]] = parquet.read_table(file).to_pylist()
    return rows


def _answers(
    rows: Sequence[dict[str, Any]], batch: TokenBatch, prompts: Sequence[Prompt], seed: int
) -> tuple[list[KeptAnswer], list[dict[str, Any]]]:
    """Return the answers in `rows`, and the reasons of those that are skipped."""
    ids = {}
    for b, (start, end) in enumerate(pairwise(batch.cu_seqlens.tolist())):
        ids[(*batch.token_ids_T[start:end].tolist(), int(batch.labels_T[end - 1]))] = b
    wanted = {row["row"] for row in rows}
    by_row = {prompt.row: prompt for prompt in prompts if prompt.row in wanted}
    answers, skipped = [], []
    for row in rows:
        sequence, prompt = ids.get(tuple(row["token_ids"])), by_row.get(row["row"])
        reason = None
        if sequence is None:
            reason = "its environment rewrote the history, so it has several sequences"
        elif prompt is None:
            reason = "its row is no longer in train_data.path"
        elif prompt.token_ids and prompt.token_ids != row["token_ids"][: len(prompt.token_ids)]:
            reason = "its row has another prompt now than in the run"
        if reason is not None:
            skipped.append({"row": row["row"], "sample": row["sample"], "reason": reason})
            continue
        assert sequence is not None and prompt is not None
        recorded = Recorded(prompt, row["token_ids"], row["sampled"], row["group"], seed)
        answers.append(KeptAnswer(row["row"], row["sample"], row["reward"], recorded, sequence))
    return answers, skipped
