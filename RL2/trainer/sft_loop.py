"""The loop of supervised fine-tuning."""

from __future__ import annotations

import time

from RL2.config import SFTConfig
from RL2.data.cursor import Cursor
from RL2.data.sft import load_examples
from RL2.models.policy import load_tokenizer
from RL2.objectives.path import cross_entropy
from RL2.packing import loss_weights, pack
from RL2.rollout.environment import load_environment
from RL2.trainer.run import Run
from RL2.types import StatsRequest
from RL2.workers.worker import Learner


def train(config: SFTConfig, run: Run) -> None:
    """Cross-entropy on the tokens of the responses, `batch_size` examples a step."""
    data, trainer = config.data, config.trainer
    tokenizer = load_tokenizer(config.actor.model_name)
    example = load_environment(data.env_path, 1.0).example if data.env_path else None
    examples, num_cut = load_examples(data.path, tokenizer, example, data.max_length)
    cursor = Cursor(len(examples), data.batch_size, trainer.seed)
    num_steps = run.number_of_steps(cursor)

    learner = Learner(config.actor, run.processes, num_steps, run.save_dir)
    request = StatsRequest(("logp",), budget_mib=config.actor.logits_budget_mib)
    report = run.report(num_steps)
    report.say(f"{len(examples)} examples, {num_cut} cut to data.max_length={data.max_length} tokens")
    first_step = run.resume(learner, cursor, report)

    for step in range(first_step, num_steps):
        start = time.perf_counter()
        batch = pack([examples[row] for row in cursor.next()])
        weight_T = loss_weights(batch, train_on="all", level=config.actor.avg_level, average_over="all")
        with report.bar(batch.num_sequences, "update") as bar:
            metrics = learner.step(batch.with_(weight_T=weight_T), cross_entropy, request, bar.update)
        seconds = time.perf_counter() - start
        times = {"time/step_s": seconds, "time/tokens_per_s": len(batch.token_ids_T) / seconds}
        report.step(step, {f"actor/{name}": value for name, value in metrics.items()} | times)
        if run.due(trainer.save_freq, step + 1):
            run.save(step + 1, learner, cursor, tokenizer)

    run.export(learner, tokenizer)
    report.close()
