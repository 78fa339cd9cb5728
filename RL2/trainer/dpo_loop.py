"""Direct preference optimisation."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np

from RL2.batch.packing import sequence_weights
from RL2.config.programs import DPOConfig
from RL2.data.cursor import Cursor
from RL2.data.table import Ragged
from RL2.errors import naming
from RL2.io.progress import Progress
from RL2.models.policy import configured_tokenizer, refuse_unknown_tokens
from RL2.objectives.preference import dpo, ipo
from RL2.parallel.mesh import Mesh
from RL2.parallel.processes import Processes
from RL2.trainer.announce import describe_model
from RL2.trainer.run import Run, number_of_steps
from RL2.trainer.supervised import Rows, SupervisedTask, fit, pairs_reader, train_and_test
from RL2.types import StatsRequest
from RL2.workers.learner import Learner
from RL2.workers.worker import Worker

AT_ONCE = 8192
"""Pairs that are packed at a time for the reference."""


def train(config: DPOConfig, run: Run) -> None:
    """Train by DPO or IPO on the responses of chosen and rejected, `batch_size` pairs a step."""
    data, actor = config.data, config.actor
    tokenizer = configured_tokenizer(actor, "actor")
    notes: list[str] = []
    pairs_of = pairs_reader(config, tokenizer, notes, run.listing(), run.progress)

    def read(path: str) -> Rows:
        return with_reference(pairs_of(path), config, run.processes, run.progress)

    rows, tests = train_and_test(data, read)
    cursor = Cursor(len(rows), data.batch_size, config.trainer.seed)
    num_steps = number_of_steps(config.trainer, cursor)
    run.progress.say(*notes)
    with run.progress.phase("loading the model"):
        learner = Learner(actor, run.processes, num_steps, run.save_dir)
    run.progress.say(describe_model("actor", learner))
    loss = partial(ipo, beta=actor.beta)
    if actor.loss == "sigmoid":
        loss = partial(dpo, beta=actor.beta, label_smoothing=actor.label_smoothing)
    task = SupervisedTask("actor", learner, rows, tests, sequence_weights, loss, logps(config))
    fit(task, cursor, num_steps, tokenizer, run)


def logps(config: DPOConfig) -> StatsRequest:
    return StatsRequest(("logp",), budget_mib=config.actor.logits_budget_mib)


def with_reference(pairs: Rows, config: DPOConfig, processes: Processes, progress: Progress | None = None) -> Rows:
    """Return rows with the reference's log-probabilities, computed once; its model is freed afterwards."""
    starts = np.concatenate([[0], pairs.lengths_B.cumsum(0)])
    if config.actor.reference_free:
        return replace(pairs, ref_logp=Ragged(np.broadcast_to(np.float32(0), starts[-1]), starts))
    reference, actor = config.ref_actor, config.actor
    mesh = Mesh.make(processes, actor)
    group = "actor" if reference.model_name == actor.model_name else "ref_actor"
    progress = progress or Progress(speaks=False)
    with progress.phase("loading the reference"):
        worker = Worker(reference.model_name, actor.dtype, mesh, processes, group, dequantize=reference.dequantize)
    with naming(f"{group}.model_name"):
        refuse_unknown_tokens(worker.lm, [pairs.largest_token_id])
    limit, found = reference.max_inference_length_per_device, np.empty(starts[-1], np.float32)
    with progress.phase("log-probabilities of the reference", 2 * len(pairs), "sequences") as phase:
        for first in range(0, len(pairs), AT_ONCE):
            last = min(first + AT_ONCE, len(pairs))
            stats = worker.stats(pairs.draw(range(first, last)), logps(config), limit, phase.update)
            found[starts[2 * first] : starts[2 * last]] = stats.logp
    return replace(pairs, ref_logp=Ragged(found, starts))
