"""The loop of reinforcement learning. `ppo`, `spo`, `spo_0p5` and `distill` are this loop with another YAML."""

from __future__ import annotations

import time
from collections.abc import Sequence as Seq
from dataclasses import replace
from statistics import fmean

from RL2.batch.packing import pack
from RL2.batch.registry import configured as estimator_of
from RL2.config.programs import RLConfig
from RL2.errors import naming
from RL2.io.report import Metrics, Report
from RL2.models.policy import refuse_unknown_tokens
from RL2.rollout.filters import filter_metrics, success_rates, trainable, with_signal
from RL2.rollout.metrics import (
    NothingScored,
    groups,
    raise_if_all_unscored,
    rollout_metrics,
    staleness,
    unscored_causes,
)
from RL2.rollout.roles import by_role
from RL2.rollout.scheduler import Scheduler
from RL2.trainer.build import Parts, build
from RL2.trainer.evaluator import warn_of_metrics, warn_of_turns
from RL2.trainer.run import Run
from RL2.types import TokenBatch, Trajectory
from RL2.workers.actor import RefActor


def train(config: RLConfig, run: Run) -> None:
    """Sample, annotate and update, until the data has been seen `n_epochs` times."""
    parts = build(config, run)
    actor, engine, evaluator, trainer = parts.actor, parts.engine, parts.evaluator, config.trainer
    for step in range(parts.first_step, parts.last_step + 1):
        clock = Clock()
        with run.progress.phase("sending the weights to the engine"):
            engine.load_weights(actor.weights(), version=step)
            parts.opponents.follow(actor, step)
        metrics: Metrics = {}
        if evaluator.tests and (step == parts.last_step or run.due(trainer.test_freq, step)):
            metrics |= evaluator.run(step)
            if trainer.keep_best and evaluator.newest_is_best:
                run.export_to("best", actor, parts.tokenizer)
            clock.lap("test")
        if step == parts.last_step or evaluator.ends_run:
            break

        trajectories, kept = sample(parts.scheduler, config, step, parts.report)
        metrics |= measure(trajectories, kept, parts, config, step)
        trained = trainable(by_role(trajectories), kept, config)
        if estimator_of(config.adv).needs_greedy:
            trained, of_greedy = with_greedy_rewards(trained, parts, config, step)
            metrics |= of_greedy
        if parts.branching is not None:
            trained, of_branches = parts.branching.grow(trained, step, run.progress)
            metrics |= of_branches
        if not config.rollout.is_async:
            engine.sleep()
        clock.lap("rollout")

        refresh_reference(parts, config, step)
        batch = parts.annotate(known_tokens(pack(trained, step), parts), trained)
        parts.token_log.look(step, trajectories, trained, batch)
        if run.due(trainer.replay_freq, step):
            run.keep_for_replay(step, batch, actor, parts.tokenizer)
        metrics |= update(batch, parts, config, run, step)
        clock.lap("update")

        finish_step(parts, step, metrics | clock.metrics(trajectories))
        run.save_if_due(step + 1, actor, parts.position, parts.tokenizer, parts.critic)

    engine.sleep()  # its memory is the export's now
    parts.token_log.look(step)  # at the last test
    if metrics:
        finish_step(parts, step, metrics)
    if step < parts.last_step:
        fell = "the test score fell twice in a row, so trainer.early_stop ends the run"
        parts.report.say(f"step {step}: {fell}")
    if not trainer.eval_only:
        run.export(actor, parts.tokenizer, parts.critic)


def refresh_reference(parts: Parts, config: RLConfig, step: int) -> None:
    """Make the reference the present policy, if it is time for that."""
    every = config.ref_actor.sync_every
    if every is not None and step > 0 and step % every == 0:
        assert isinstance(parts.reference, RefActor)
        parts.reference.follow(parts.actor)


def sample(
    scheduler: Scheduler, config: RLConfig, step: int, report: Report
) -> tuple[list[Trajectory], list[Trajectory]]:
    """Return the rollout of a step, with groups in place of filtered ones, and those of it that filters keep.

    Each role of an episode is filtered, and trains, on its own. Some of the rollout is written to samples.jsonl.
    """
    number, wanted = config.train_data.responses_per_prompt, config.train_data.prompts_per_rollout
    with report.progress.phase(f"rollout of step {step}", wanted * number, "responses") as phase:
        trajectories = scheduler.take(step, phase.update)
    kept = with_signal(by_role(trajectories), config)
    for _ in range(1, config.rollout.dynamic_filtering_rounds):
        missing = wanted - len(groups(kept))  # equal on all processes, as all have all trajectories
        if not missing:
            break
        with report.progress.phase(f"more rollouts of step {step}", missing * number, "responses") as phase:
            more = scheduler.take_more(missing, step, len(groups(trajectories)), phase.update)
        trajectories += more
        kept += with_signal(by_role(more), config)
    rates = success_rates(by_role(trajectories))
    scheduler.cursor.learn({scheduler.places[row]: rate for row, rate in rates.items()})
    raise_if_all_unscored(trajectories)
    for cause, count in unscored_causes(trajectories).most_common(3):
        report.say(f"step {step}: {count} of {len(trajectories)} trajectories unscored: {cause}")
    warn_of_metrics(trajectories, step, report)
    warn_of_turns(trajectories, config.rollout.max_turns, step, report)
    report.samples(step, "train", by_role(trajectories[: config.trainer.samples_per_step]))
    return trajectories, kept


def with_greedy_rewards(
    trajectories: Seq[Trajectory], parts: Parts, config: RLConfig, step: int
) -> tuple[list[Trajectory], Metrics]:
    """Play a greedy episode for each prompt of `trajectories`; return these with its reward, and metrics of it.

    Without a greedy reward there is no advantage, so prompts whose greedy episode is unscored do not train. Raise
    NothingScored if none is scored.
    """
    scheduler, sampling = parts.scheduler, replace(config.rollout.train_sampling_params, temperature=0.0)
    rows = sorted({trajectory.row for trajectory in trajectories})
    with parts.report.progress.phase(f"greedy responses of step {step}", len(rows), "responses") as phase:
        prompts = [scheduler.prompts[scheduler.places[row]] for row in rows]
        greedy = scheduler.episodes.play(prompts, sampling, 1, config.trainer.seed, phase.update)
    rewards = {row: one.reward for row, one in zip(rows, greedy, strict=True) if one.unscored is None}
    if not rewards:
        raise NothingScored(f"each greedy response of adv.estimator=remax is unscored, the first: {greedy[0].unscored}")
    told = [replace(one, greedy_reward=rewards[one.row]) for one in trajectories if one.row in rewards]
    return told, {
        "train/greedy_reward": fmean(rewards.values()),
        "train/greedy_tokens": sum(one.num_tokens for one in greedy),
        "train/greedy_unscored": 1 - len(rewards) / len(rows),
    }


def measure(trajectories: Seq[Trajectory], kept: Seq[Trajectory], parts: Parts, config: RLConfig, step: int) -> Metrics:
    """Return metrics of the rollout, of the order of the data, and of the engine."""
    metrics = rollout_metrics(trajectories, "train") | filter_metrics(trajectories, kept, config)
    metrics |= parts.scheduler.cursor.metrics() | parts.engine.metrics()
    return metrics | staleness(trajectories, step, config.rollout.max_staleness)


def known_tokens(batch: TokenBatch, parts: Parts) -> TokenBatch:
    """Return `batch`; raise ConfigError if a model that reads it does not have one of its tokens."""
    for key, lm in parts.readers.items():
        with naming(key):
            refuse_unknown_tokens(lm, [batch.largest_token_id])
    return batch


def update(batch: TokenBatch, parts: Parts, config: RLConfig, run: Run, step: int) -> Metrics:
    """Update the critic, if there is one, and the actor, once its frozen steps are over; return metrics of both."""
    metrics: Metrics = {}
    if parts.critic is not None:
        with run.progress.phase("update of the critic", batch.num_sequences, "sequences") as phase:
            metrics |= parts.critic.update(batch, phase.update)
    if step >= config.actor.freeze_steps:
        with run.progress.phase(f"update of step {step}", batch.num_sequences, "sequences") as phase:
            metrics |= parts.actor.update(batch, phase.update)
    return metrics


def finish_step(parts: Parts, step: int, metrics: Metrics) -> None:
    """Report a step, and warn of what looks wrong."""
    parts.report.step(step, metrics)
    parts.report.say(*parts.alarms.see(step, metrics))


class Clock:
    """A clock for the parts of a step, in seconds."""

    def __init__(self) -> None:
        self.begun = self.last = time.perf_counter()
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[f"time/{name}_s"], self.last = now - self.last, now

    def metrics(self, trajectories: Seq[Trajectory]) -> Metrics:
        seconds = time.perf_counter() - self.begun
        sampled = sum(trajectory.num_tokens for trajectory in trajectories)
        return self.laps | {"time/step_s": seconds, "time/tokens_per_s": sampled / seconds}
