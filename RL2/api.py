"""The library from Python, on one process: load, sample, look at tokens, train, save. docs/python.md is its page.

The names in `__all__` are public and stay. The programs call the same functions; they add configuration, many
processes, servers and checkpoints. Shape letters: T positions of a batch, K of the most likely tokens.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from RL2.batch.estimator import INPUTS, READABLE, Estimator, reads
from RL2.batch.packing import loss_weights, microbatches, minibatches, pack, pack_tokens, part_rewards
from RL2.batch.registry import bound as bound_estimator
from RL2.data.chat import encode
from RL2.data.prompts import make_prompt
from RL2.data.source import DataError
from RL2.engines.embedded.engine import EmbeddedEngine
from RL2.errors import ConfigError, naming
from RL2.models.policy import Policy, export, load_tokenizer, stop_tokens
from RL2.objectives.objective import Loss, Objective, needs
from RL2.objectives.registry import bound as bound_objective
from RL2.parallel.processes import Processes
from RL2.rollout.continuation import decode
from RL2.rollout.environment import Environment, environment_of, load_environment
from RL2.rollout.episodes import EpisodeSetting, begin, finish
from RL2.types import MENU, Prompt, Sampling, StatsRequest, TokenBatch, TokenStats, Trajectory
from RL2.workers.metrics import Metric, Totals, engine_gap
from RL2.workers.optim import adamw, clipped_step
from RL2.workers.passes import TeacherPass, backward, statistics, trained_sequences
from RL2.workers.worker import InvariantError

__all__ = [
    "InvariantError",
    "Loss",
    "Objective",
    "Policy",
    "TokenBatch",
    "TokenStats",
    "Trajectory",
    "adamw",
    "advantages",
    "forward_backward",
    "load",
    "load_environment",
    "loss_weights",
    "minibatches",
    "needs",
    "optimizer_step",
    "pack",
    "pack_texts",
    "part_rewards",
    "reads",
    "sample",
    "save",
    "stats_of_batch",
    "stats_of_texts",
    "token_tables",
]

R = TypeVar("R")
KEY = "model_name"
"""Argument of `load` that errors of a model name."""
UNJUDGED = "no environment judged it"
FIELDS = ("logp", "max_logp", "rank", "entropy")
"""Statistics to look at, unless others are named."""
MAX_TOKENS = 16_384
"""Tokens of a microbatch, or of the longest sequence if that has more, unless another number is given."""


def load(
    model_name: str | Path, device: torch.device | str | None = None, dequantize: bool = False
) -> tuple[Policy, PreTrainedTokenizerBase]:
    """Load a causal language model of a hub name or folder in float32, and its tokenizer.

    `device` defaults to the GPU if there is one, and `dequantize` reads a quantised checkpoint as value * scale.
    `policy.lm` is the model of transformers, and `policy.parameters()` are its weights. Raise ConfigError if there is
    no such model, or if it is not exact here (docs/models.md).
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    with naming(KEY):
        return Policy.load(str(model_name), device, dequantize), load_tokenizer(str(model_name))


def save(policy: Policy, tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Write a folder that `load`, the programs and transformers' `from_pretrained` read, in float32."""
    export(policy.lm, tokenizer, Path(folder), write=True)


def sample(
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | Sequence[Mapping[str, Any]] | Mapping[str, Any]],
    *,
    num_samples: int = 8,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    environment: str | Path | Callable[..., Coroutine[Any, Any, Any]] | Environment | None = None,
    max_turns: int = 1,
) -> list[Trajectory]:
    """Sample `num_samples` responses to each prompt, which `environment` judges. The samples of a prompt are together.

    A prompt is raw text, a list of chat messages, or a row as in a data file: `prompt` or `messages`, and `extra_info`
    for the environment, whose `example` converts rows. `environment` is a script (docs/own_environment.md), its `step`
    alone, or what `load_environment` returns. Without it, trajectories have no reward, and their `unscored` says so.
    The same weights, prompts and `seed` give the same responses, so each step of training needs another `seed`.
    """
    if isinstance(prompts, str):
        raise ConfigError("prompts is one text; pass a list of prompts")
    judge = environment if isinstance(environment, Environment) else _environment(environment)
    engine = EmbeddedEngine(
        policy.lm, decode=lambda ids: decode(tokenizer, ids), max_running_requests=256, memory_share=0.6
    )
    setting = EpisodeSetting(engine, judge, tokenizer, max_turns, engine.max_length)
    with naming(KEY):
        ends = stop_tokens(policy.lm, tokenizer, setting.template)
    sampling = Sampling(max_new_tokens, temperature, top_p, top_k, stop_token_ids=ends)
    numbered = [(number, _prompt(row, number, setting)) for number, row in enumerate(prompts)]

    async def play() -> list[Trajectory]:
        return await finish(begin(setting, numbered, sampling, number=num_samples, seed=seed))

    try:
        trajectories = _run(play())
    finally:
        engine.close()
        if judge is not environment:
            judge.close()
    if environment is None:
        trajectories = [replace(trajectory, unscored=UNJUDGED) for trajectory in trajectories]
    return trajectories


def pack_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> TokenBatch:
    """Return the texts as one batch, in which each token but the first of its text counts as sampled.

    Each text begins with the tokenizer's prefix, such as BOS. Raise DataError for a text of fewer than 2 tokens.
    """
    if isinstance(texts, str):
        raise ConfigError("texts is one text; pass a list of texts")
    ids = encode(tokenizer, list(texts), begins=True)
    for number, each in enumerate(ids):
        if len(each) < 2:
            raise DataError(f"texts[{number}]={texts[number]!r} has {len(each)} token(s); it takes 2 to predict one")
    return replace(pack_tokens(ids), engine_logp_T=None)


def stats_of_batch(
    policy: Policy,
    batch: TokenBatch,
    fields: Sequence[str] = FIELDS,
    *,
    top_k: int = 0,
    temperature: float = 1.0,
    max_tokens: int | None = None,
) -> TokenStats:
    """Return statistics of the distribution of each sampled token of `batch`, on the CPU and without gradients.

    `TokenStats` says what each field is. They are float32 [T], aligned with `batch.labels_T`, and 0 where
    `batch.action_T` is false; `top_logp` and `top_id` are [T, K] with K = `top_k`.
    """
    if unknown := [name for name in fields if name not in MENU]:
        raise ConfigError(f"fields: there is no statistic {unknown[0]}; choose from {', '.join(MENU)}")
    if bool({"top_logp", "top_id"} & set(fields)) != (top_k > 0):
        raise ConfigError(f"top_k={top_k}: the fields top_logp and top_id need at least 1, and the others take none")
    request = StatsRequest(tuple(fields), top_k, temperature)
    return statistics(policy, batch, _microbatches(batch, range(batch.num_sequences), max_tokens), request)


def token_tables(tokenizer: PreTrainedTokenizerBase, batch: TokenBatch, stats: TokenStats) -> list[dict[str, Any]]:
    """Return a table of the sampled tokens of each sequence: a list for `token`, their texts, and for each statistic.

    `stats` are those of `stats_of_batch`. `pandas.DataFrame` takes such a table.
    """
    tables = []
    for start, end in pairwise(batch.cu_seqlens.tolist()):
        here = torch.arange(start, end)[batch.action_T[start:end]]
        texts = [decode(tokenizer, [token]) for token in batch.labels_T[here].tolist()]
        tables.append({"token": texts} | {name: value[here].tolist() for name, value in vars(stats).items()})
    return tables


def stats_of_texts(
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    fields: Sequence[str] = FIELDS,
    **options: Any,
) -> list[dict[str, Any]]:
    """Return a table of each text as `token_tables` does; `options` are those of `stats_of_batch`."""
    batch = pack_texts(tokenizer, texts)
    return token_tables(tokenizer, batch, stats_of_batch(policy, batch, fields, **options))


def advantages(batch: TokenBatch, estimator: str | Estimator = "reinforce", **arguments: Any) -> Tensor:
    """Return the advantage of each token of `batch`, a whole rollout, float32 [T]; 0 where no token was sampled.

    `estimator` is a name of docs/own_advantage.md, `path.py:function`, or a function with `@reads`. `arguments` are its
    inputs and knobs, such as `norm_var=True` for GRPO.
    """
    inputs = {name: arguments.pop(name) for name in INPUTS if name in arguments}
    found = bound_estimator(estimator, arguments)
    if found.needs_critic and batch.value_T is None:
        raise ConfigError(f"estimator={found.name} reads {READABLE['values']}, and it is None")
    if found.needs_branches and batch.before_T is None:
        raise ConfigError(f"estimator={found.name} reads {READABLE['branches']}, and the batch has none")
    return found.estimator(batch, **inputs, **found.knobs)


def forward_backward(
    policy: Policy,
    batch: TokenBatch,
    objective: str | Objective,
    *,
    temperature: float = 1.0,
    max_tokens: int | None = None,
    teacher: Policy | None = None,
    teacher_temperature: float | None = None,
    **knobs: Any,
) -> dict[str, float]:
    """Add the gradients of (loss_T * batch.weight_T).sum() to those of `policy`; return this loss, and metrics.

    `objective` is a name of docs/objectives.md, `path.py:function`, or a function with `@needs`; `knobs` are its own.
    `temperature` is that of the sampling. `teacher` is a model with the tokenizer of `policy`, for objectives that need
    one; its temperature is by default that of the policy. Microbatches have at most `max_tokens` tokens, and the result
    does not depend on it. Metrics are means over the tokens that train: those of the objective, `entropy`, and
    `logp_gap`, the distance from the log-probabilities at which the tokens were sampled, in nats. It is near 0 if
    weights and temperature are the same, and `top_p` and `top_k` cut nothing. Raise InvariantError if a statistic is
    impossible or the loss is not finite.
    """
    if batch.weight_T is None:
        raise ConfigError("batch.weight_T is None; set it: batch = batch.with_(weight_T=loss_weights(batch))")
    found = bound_objective(objective, knobs)
    found.check(policy.lm.config.vocab_size)
    if found.needs_teacher != (teacher is not None):
        raise ConfigError(
            f"objective={found.name} needs a teacher; pass teacher=load(...)[0]"
            if teacher is None
            else f"teacher has no effect: objective={found.name} reads none"
        )

    def loss(stats: TokenStats, actions: TokenBatch) -> tuple[Tensor, dict[str, Metric]]:
        loss_T, metrics = found.loss(stats, actions)
        gap = {} if actions.engine_logp_T is None else engine_gap(stats, actions)
        return loss_T, {**metrics, "entropy": stats.entropy, **gap}

    totals = Totals(Processes.alone(next(policy.parameters()).device))
    mine = _microbatches(batch, trained_sequences(batch), max_tokens)
    teach = None if teacher is None else _teaching(teacher, policy, teacher_temperature or temperature)
    broken = backward(policy, batch, mine, loss, found.request(temperature), totals, teach=teach)
    metrics = totals.means()
    if not math.isfinite(metrics["loss"]):
        broken.append(f"the loss is {metrics['loss']}")
    if broken:
        raise InvariantError(f"{broken[0]}; take no step, and forget the gradients with policy.zero_grad()")
    return metrics


def optimizer_step(policy: Policy, optimizer: torch.optim.Optimizer, *, max_grad_norm: float = 1.0) -> float:
    """Scale the gradients of `policy` to a norm of at most `max_grad_norm`, take a step, and forget the gradients.

    Returns the norm before scaling. Raise InvariantError, before the step, if it is not finite.
    """

    def check(grad_norm: float) -> None:
        if not math.isfinite(grad_norm):
            raise InvariantError(f"the norm of the gradients is {grad_norm}; the step was not taken")

    return clipped_step(optimizer, policy.parameters(), max_grad_norm, check)


def _teaching(teacher: Policy, policy: Policy, temperature: float) -> TeacherPass:
    """Return the pass of `teacher` over the microbatches of `policy`."""
    teacher.eval()
    return lambda microbatch, shared: teacher.teach(microbatch, shared, temperature, policy.lm)


async def _unjudged(state: str, action: str, extra_info: dict[str, Any]) -> dict[str, Any]:
    return {"next_state": None, "reward": 0.0, "score": 0.0, "done": True, "extra_info": extra_info}


def _environment(judge: str | Path | Callable[..., Coroutine[Any, Any, Any]] | None) -> Environment:
    return load_environment(judge) if isinstance(judge, str | Path) else environment_of(judge or _unjudged)


def _prompt(row: str | Sequence[Mapping[str, Any]] | Mapping[str, Any], number: int, setting: EpisodeSetting) -> Prompt:
    """Return an element of `prompts` of `sample` as a prompt. Raise DataError, naming it, if it is not one."""
    example = setting.environment.example
    try:
        if isinstance(row, str):
            return make_prompt({"prompt": row}, setting.template, number)
        if not isinstance(row, Mapping):
            return make_prompt({"messages": list(row)}, setting.template, number)
        converted = dict(row) if example is None else example(dict(row))
        if converted is None:
            raise DataError("example of the environment leaves it out")
        return make_prompt(converted, setting.template, number)
    except DataError as error:
        raise DataError(f"prompts[{number}]: {error}") from error


def _microbatches(batch: TokenBatch, ids: Sequence[int], max_tokens: int | None) -> list[list[int]]:
    longest = int(batch.lengths_B.max())
    limit = max(MAX_TOKENS, longest) if max_tokens is None else max_tokens
    if limit < longest:
        raise ConfigError(f"max_tokens={max_tokens} must be at least {longest}, the length of the longest sequence")
    (mine,) = microbatches(batch, ids, limit, num_ranks=1)
    return mine


def _run(work: Coroutine[Any, Any, R]) -> R:
    """Run `work` to its end; in a notebook, where this thread's event loop is at work already, in another thread."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    begun: Future[tuple[asyncio.AbstractEventLoop, asyncio.Task[R]]] = Future()

    async def watched() -> R:
        task = asyncio.current_task()
        assert task is not None
        begun.set_result((task.get_loop(), task))
        return await work

    with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(torch.get_num_threads(),)) as thread:
        done = thread.submit(asyncio.run, watched())
        try:
            return done.result()
        except KeyboardInterrupt:
            loop, task = begun.result()
            with suppress(RuntimeError):  # it has just ended
                loop.call_soon_threadsafe(task.cancel)
            raise
