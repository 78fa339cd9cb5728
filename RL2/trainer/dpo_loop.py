"""Optimisation of preferences: on pairs of responses, or on single responses with a label."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from RL2.batch.packing import nll_factors, sequence_weights
from RL2.config.programs import DPOConfig
from RL2.data.cursor import Cursor
from RL2.data.table import Ragged
from RL2.errors import naming
from RL2.io.progress import Progress
from RL2.models.policy import configured_tokenizer, refuse_unknown_tokens
from RL2.objectives.registry import preference
from RL2.parallel.mesh import Mesh
from RL2.parallel.processes import Processes
from RL2.trainer.announce import describe_model
from RL2.trainer.run import Run, number_of_steps
from RL2.trainer.supervised import Rows, SupervisedTask, fit, pairs_reader, reads_reference, train_and_test
from RL2.trainer.unpaired import Baseline, BaselineCursor, labelled_reader, with_labels
from RL2.types import StatsRequest, TokenBatch
from RL2.workers.learner import Learner
from RL2.workers.worker import Worker

AT_ONCE = 8192
"""Rows that are packed at a time for the reference."""


def train(config: DPOConfig, run: Run) -> None:
    """Train on pairs of responses, or on responses with a label, `batch_size` rows a step."""
    data, actor, objective = config.data, config.actor, preference(config.actor)
    tokenizer = configured_tokenizer(actor, "actor")
    notes: list[str] = []
    rows_of = preference_reader(config, tokenizer, notes, run.listing(), run.progress)

    def read(path: str) -> Rows:
        return with_reference(rows_of(path), config, run.processes, run.progress)

    rows, tests = train_and_test(data, read)
    order, baseline = (len(rows), data.batch_size, config.trainer.seed), Baseline(objective.objective)
    on_labels = objective.objective.trains_on == "labels"
    cursor = BaselineCursor(*order, baseline) if on_labels else Cursor(*order)
    num_steps = number_of_steps(config.trainer, cursor)
    run.progress.say(*notes)
    with run.progress.phase("loading the model"):
        learner = Learner(actor, run.processes, num_steps, run.save_dir)
    run.progress.say(describe_model("actor", learner))
    if on_labels:
        complete, loss = baseline.completing(partial(log_ratios, learner, config)), with_labels(objective)
        task = SupervisedTask("actor", learner, rows, tests, sequence_weights, loss, logps(config), complete)
    else:
        task = SupervisedTask("actor", learner, rows, tests, sequence_weights, objective.loss, logps(config), with_nll)
    fit(task, cursor, num_steps, tokenizer, run)


def preference_reader(
    config: DPOConfig,
    tokenizer: PreTrainedTokenizerBase,
    notes: list[str],
    listing: Path | None = None,
    progress: Progress | None = None,
) -> Callable[[str], Rows]:
    """Return a function that reads the rows of a path that the loss trains on: pairs, or responses with a label."""
    labels = preference(config.actor).objective.trains_on == "labels"
    return (labelled_reader if labels else pairs_reader)(config, tokenizer, notes, listing, progress)


def with_nll(batch: TokenBatch, rows: Rows, drawn: list[int], training: bool) -> TokenBatch:
    """Return the minibatch with the factors of the negative log-likelihood, a mean over all its chosen tokens."""
    return batch.with_(nll_factor_T=nll_factors(batch))


def logps(config: DPOConfig) -> StatsRequest:
    return StatsRequest(("logp",), budget_mib=config.actor.logits_budget_mib)


def log_ratios(learner: Learner, config: DPOConfig, batch: TokenBatch) -> Tensor:
    """Return the sum over the actions of each sequence of log p - log p_ref, under the present weights, [B]."""
    logp_T = learner.stats(batch, logps(config), config.actor.max_length_per_device).logp.cpu()
    assert batch.ref_logp_T is not None
    ratio_T = (logp_T - batch.ref_logp_T) * batch.action_T
    return ratio_T.new_zeros(batch.num_sequences).index_add(0, batch.sequence_T, ratio_T)


def with_reference(rows: Rows, config: DPOConfig, processes: Processes, progress: Progress | None = None) -> Rows:
    """Return rows with the reference's log-probabilities, computed once; its model is freed afterwards.

    Rows of a loss that reads no reference stay as they are, and no model is loaded.
    """
    if not reads_reference(config):
        return rows
    reference, actor = config.ref_actor, config.actor
    mesh = Mesh.make(processes, actor)
    group = "actor" if reference.model_name == actor.model_name else "ref_actor"
    progress = progress or Progress(speaks=False)
    with progress.phase("loading the reference"):
        worker = Worker(reference.model_name, actor.dtype, mesh, processes, group, dequantize=reference.dequantize)
    with naming(f"{group}.model_name"):
        refuse_unknown_tokens(worker.lm, [rows.largest_token_id])

    def found_by_it(rows: Rows) -> Rows:
        starts = np.concatenate([[0], rows.lengths_B.cumsum(0)])
        limit, found = reference.max_inference_length_per_device, np.empty(starts[-1], np.float32)
        num_sequences = rows.per_row * len(rows)
        with progress.phase("log-probabilities of the reference", num_sequences, "sequences") as phase:
            for first in range(0, len(rows), AT_ONCE):
                last = min(first + AT_ONCE, len(rows))
                stats = worker.stats(rows.draw(range(first, last)), logps(config), limit, phase.update)
                found[starts[rows.per_row * first] : starts[rows.per_row * last]] = stats.logp
        return replace(rows, ref_logp=Ragged(found, starts))

    if rows.mismatched is not None:
        rows = replace(rows, mismatched=found_by_it(rows.mismatched))
    return found_by_it(rows)
