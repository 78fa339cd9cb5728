"""Training of a reward model."""

from __future__ import annotations

from functools import partial

from RL2.batch.packing import sequence_weights
from RL2.config.programs import RMConfig
from RL2.data.cursor import Cursor
from RL2.models.policy import configured_tokenizer
from RL2.models.value import VALUE, ValueModel, mark_padding
from RL2.objectives.preference import bradley_terry
from RL2.trainer.announce import describe_model
from RL2.trainer.run import Run, number_of_steps
from RL2.trainer.supervised import SupervisedTask, fit, pairs_reader, train_and_test
from RL2.workers.learner import Learner


def train(config: RMConfig, run: Run) -> None:
    """Train by Bradley-Terry on the values at the last tokens of chosen and rejected, `batch_size` pairs a step."""
    data, critic = config.data, config.critic
    tokenizer = configured_tokenizer(critic, "critic")
    notes: list[str] = []
    rows, tests = train_and_test(data, pairs_reader(config, tokenizer, notes, run.listing(), run.progress))
    cursor = Cursor(len(rows), data.batch_size, config.trainer.seed)
    num_steps = number_of_steps(config.trainer, cursor)
    run.progress.say(*notes)
    with run.progress.phase("loading the model"):
        learner = Learner(critic, run.processes, num_steps, run.save_dir, "critic", ValueModel)
    run.progress.say(describe_model("critic", learner))
    mark_padding(learner.lm, tokenizer)
    loss = partial(bradley_terry, center_coef=critic.center_coef)
    task = SupervisedTask("critic", learner, rows, tests, sequence_weights, loss, VALUE)
    fit(task, cursor, num_steps, tokenizer, run)
