"""Direct preference optimisation."""

from __future__ import annotations

from functools import partial

import torch

from RL2.config import DPOConfig
from RL2.data.cursor import Cursor
from RL2.data.preference import as_responses
from RL2.models.policy import load_tokenizer, refuse_unknown_tokens
from RL2.objectives.preference import dpo, ipo
from RL2.packing import sequence_weights
from RL2.parallel.mesh import Mesh
from RL2.parallel.processes import Processes
from RL2.report import progress_bar
from RL2.trainer.run import Run, number_of_steps
from RL2.trainer.supervised import Rows, Task, fit, pairs_reader, train_and_test
from RL2.types import StatsRequest, TokenBatch
from RL2.workers.worker import Learner, Worker


def train(config: DPOConfig, run: Run) -> None:
    """DPO or IPO on the responses of chosen and rejected, `batch_size` pairs a step."""
    data, actor = config.data, config.actor
    tokenizer = load_tokenizer(actor.model_name, "actor.model_name", actor.chat_template, actor.chat_template_kwargs)
    notes: list[str] = []
    pairs_of = pairs_reader(config, tokenizer, notes, as_responses, run.listing())

    def read(path: str) -> Rows:
        return Rows(with_reference(pairs_of(path).batch, config, run.processes), per_row=2)

    rows, tests = train_and_test(data, read)
    cursor = Cursor(len(rows), data.batch_size, config.trainer.seed)
    num_steps = number_of_steps(config.trainer, cursor)
    learner = Learner(actor, run.processes, num_steps, run.save_dir)
    loss = partial(ipo, beta=actor.beta)
    if actor.loss == "sigmoid":
        loss = partial(dpo, beta=actor.beta, label_smoothing=actor.label_smoothing)
    task = Task("actor", learner, rows, tests, sequence_weights, loss, logps(config), notes)
    fit(task, cursor, num_steps, tokenizer, run)


def logps(config: DPOConfig) -> StatsRequest:
    return StatsRequest(("logp",), budget_mib=config.actor.logits_budget_mib)


def with_reference(pairs: TokenBatch, config: DPOConfig, processes: Processes) -> TokenBatch:
    """With the reference's log-probabilities of all data, computed once; its model is then let go."""
    if config.actor.reference_free:
        return pairs.with_(ref_logp_T=torch.zeros_like(pairs.reward_T))
    reference, actor = config.ref_actor, config.actor
    mesh = Mesh.make(processes, actor)
    key = "actor.model_name" if reference.model_name == actor.model_name else "ref_actor.model_name"
    worker = Worker(reference.model_name, actor.dtype, mesh, processes, key)
    refuse_unknown_tokens(worker.lm, [pairs.largest_token_id], key)
    limit = reference.max_inference_length_per_device
    with progress_bar(pairs.num_sequences, "reference", processes.is_first) as bar:
        stats = worker.stats(pairs, logps(config), limit, bar.update)
    return pairs.with_(ref_logp_T=stats.logp)
