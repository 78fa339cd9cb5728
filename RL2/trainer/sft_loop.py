"""Supervised fine-tuning."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from RL2.batch.packing import loss_weights
from RL2.config.programs import SFTConfig
from RL2.data.cursor import Cursor
from RL2.data.sft import load_examples
from RL2.data.template import Template
from RL2.io.progress import Progress
from RL2.models.policy import configured_tokenizer
from RL2.objectives.objective import Loss
from RL2.objectives.registry import bind
from RL2.trainer.announce import describe_model
from RL2.trainer.run import Run, number_of_steps
from RL2.trainer.supervised import Rows, SupervisedTask, bad_rows, converter, fit, refuse_long, train_and_test
from RL2.trainer.teacher_tokens import refuse_another_tokenizer
from RL2.types import StatsRequest, TokenBatch, TokenStats
from RL2.workers.learner import Learner
from RL2.workers.teacher import make_teacher
from RL2.workers.worker import Worker


def train(config: SFTConfig, run: Run) -> None:
    """Train by cross-entropy, or another objective, on the tokens of responses, `batch_size` examples a step."""
    data, actor = config.data, config.actor
    objective = bind(actor.objective, actor.objective_args)
    tokenizer = configured_tokenizer(actor, "actor")
    refuse_another_tokenizer(config.teacher, actor.model_name, tokenizer)
    notes: list[str] = []

    def weights(batch: TokenBatch) -> Tensor:
        return loss_weights(batch, train_on="all", level=actor.avg_level, average_over="all")

    def loss(stats: TokenStats, batch: TokenBatch) -> Loss:
        loss_T, metrics = objective.loss(stats, batch)
        return loss_T, metrics | {"nll": -stats.logp.detach()}  # whatever is minimised, by this runs can be compared

    rows, tests = train_and_test(data, reader(config, tokenizer, notes, run.listing(), run.progress))
    cursor = Cursor(len(rows), data.batch_size, config.trainer.seed)
    num_steps = number_of_steps(config.trainer, cursor)
    run.progress.say(*notes)
    with run.progress.phase("loading the model"):
        learner = Learner(actor, run.processes, num_steps, run.save_dir)
        if config.teacher.model_name is not None:
            learner.teacher = make_teacher(config.teacher, learner, temperature=1.0)
    workers = {"actor": learner, "teacher": learner.teacher}
    run.progress.say(*(describe_model(name, one) for name, one in workers.items() if isinstance(one, Worker)))
    objective.check(learner.lm.config.vocab_size)
    fields = tuple(dict.fromkeys((*objective.fields, "logp")))
    request = StatsRequest(fields, objective.top_k, budget_mib=actor.logits_budget_mib, beta=objective.beta)
    task = SupervisedTask("actor", learner, rows, tests, weights, loss, request)
    fit(task, cursor, num_steps, tokenizer, run)


def reader(
    config: SFTConfig,
    tokenizer: PreTrainedTokenizerBase,
    notes: list[str],
    listing: Path | None = None,
    progress: Progress | None = None,
) -> Callable[[str], Rows]:
    """Return a function that reads the rows of a path, and notes on them; it lists skipped rows in `listing`."""
    data, example, template = config.data, converter(config.data), Template(tokenizer)

    def read(path: str) -> Rows:
        said, bad = list[str](), bad_rows(data, path)
        examples, num_left_out = load_examples(
            path, tokenizer, example, data.max_length, data.train_on, said, bad, progress, template
        )
        left_out = f"{num_left_out} left out (data.max_length={data.max_length} tokens)"
        notes.extend([f"{path}: {len(examples)} examples, {left_out}", *said, *bad.notes(listing)])
        rows = Rows(examples.ids, examples.trains, per_row=1)
        refuse_long(config, rows, path)
        return rows

    return read
