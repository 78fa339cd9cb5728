"""The loop of reinforcement learning. `ppo`, `spo` and `spo_0p5` are this loop with another YAML."""

from __future__ import annotations

import time
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import replace
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from RL2.batch.advantages import ADVANTAGES, gae, whitened
from RL2.batch.packing import pack, part_rewards
from RL2.config.programs import RLConfig
from RL2.data.curriculum import Curriculum
from RL2.data.cursor import Cursor
from RL2.data.prompts import largest_token_id
from RL2.engines.make import make_engine
from RL2.errors import ConfigError
from RL2.io.progress import Progress, time_of_day
from RL2.io.report import Metrics, Report
from RL2.models.policy import load_tokenizer, max_length, refuse_unknown_tokens, stop_tokens
from RL2.objectives.loss import kl_estimate, overlong_penalty
from RL2.rollout.collect import (
    groups,
    raise_if_all_unscored,
    rollout_metrics,
    staleness,
    unscored_causes,
)
from RL2.rollout.environment import load_environment
from RL2.rollout.episode import decode
from RL2.rollout.filters import filter_metrics, success_rates, trainable, with_signal
from RL2.rollout.spread import Rollouts
from RL2.rollout.supply import Supply
from RL2.trainer.alarms import Alarms
from RL2.trainer.announce import of_engine, of_model, of_rollouts, of_test
from RL2.trainer.early_stopping import Scores
from RL2.trainer.inputs import of_prompts
from RL2.trainer.run import Run, number_of_steps
from RL2.trainer.tasks import TestTasks, first_rows, reader, test_tasks, train_tasks
from RL2.trainer.token_log import Microscope
from RL2.types import TokenBatch, Trajectory
from RL2.workers.actor import Actor, AdapterFreeReference, RefActor, Reference
from RL2.workers.critic import Critic
from RL2.workers.worker import Worker


def train(config: RLConfig, run: Run) -> None:
    """Roll out, judge, update, until the data has been seen `n_epochs` times."""
    trainer, progress = config.trainer, run.progress
    template = config.actor.chat_template, config.actor.chat_template_kwargs
    tokenizer = load_tokenizer(config.actor.model_name, "actor.model_name", *template)
    environment = load_environment(config.rollout.env_path, config.rollout.env_timeout_s, config.reward.weights)
    # the last token of a sequence is only a label and takes no position
    longest = min(config.actor.max_length + 1, max_length(config.actor.model_name))
    notes: list[str] = []
    read = reader(tokenizer, longest, notes, run.listing(), progress)
    prompts, tests = train_tasks(config, environment, read), test_tasks(config, environment, read)
    progress.say(*notes)
    tested = {each.settings.key: of_prompts(each.prompts) for each in tests}
    run.know_rows({"train_data": of_prompts(prompts), "test_data": of_prompts([])} | tested)
    cursor = make_cursor(len(prompts), config)
    num_steps = 0 if trainer.eval_only else number_of_steps(trainer, cursor)

    with progress.phase("loading the models"):
        actor, ref_actor, critic = make_workers(config, run, num_steps)
    workers = {"actor": actor, "ref_actor": ref_actor, "critic": critic}
    progress.say(*(of_model(name, worker) for name, worker in workers.items() if isinstance(worker, Worker)))
    given = [largest_token_id(prompts), *(largest_token_id(each.prompts) for each in tests)]
    stop_token_ids = stop_tokens(actor.lm, tokenizer)
    readers = {"actor.model_name": actor.lm}
    readers |= {"ref_actor.model_name": ref_actor.lm} if isinstance(ref_actor, RefActor) else {}
    readers |= {"critic.model_name": critic.lm} if critic is not None else {}
    for key, lm in readers.items():
        refuse_unknown_tokens(lm, [*given, *stop_token_ids], key)
    with progress.phase("starting the engine"):
        engine = make_engine(config.rollout, actor, lambda ids: decode(tokenizer, ids), longest, run.save_dir)
    progress.say(of_engine(config))
    rollouts = Rollouts(
        config.rollout,
        engine=engine,
        environment=environment,
        tokenizer=tokenizer,
        end_tokens=stop_token_ids,
        max_length=longest,
        processes=run.processes,
    )
    report = run.report(num_steps)
    report.first_rows(first_rows(prompts, tokenizer))
    microscope = Microscope(config, actor, tokenizer, report)
    supply = Supply(prompts, cursor, rollouts, config, num_steps)
    run.closing.callback(supply.close)  # a thread may be at work
    first_step = run.resume(actor, supply, report, critic)
    report.say(of_rollouts(config, first_step, num_steps))

    scores = Scores(run.processes.gather(scores_of(report.rows(), tests, config), "the scores so far"))
    num_tests = max(1, sum(each.num_responses for each in decisive(tests, config)))
    num_train = config.train_data.prompts_per_rollout * config.train_data.responses_per_prompt
    watch = Alarms(num_tests, trainer.save_dir, report.rows(), num_train, config.reward.weights)
    last_step = first_step if trainer.eval_only else max(first_step, num_steps)
    report.begin(first_step)

    for step in range(first_step, last_step + 1):
        clock = Clock()
        with progress.phase("giving the weights to the engine"):
            engine.load_weights(actor.weights(), version=step)
        metrics: Metrics = {}
        if tests and (step == last_step or run.due(trainer.test_freq, step)):
            if step == first_step:
                report.say(*map(of_test, tests))
            metrics = test(tests, rollouts, config, step, report, microscope)
            if step == first_step:
                report.say(f"first test: score {metrics['test/score']:.3f}, at {time_of_day()}")
            scores.add(metrics["test/score"])
            if trainer.keep_best and scores.newest_is_best:
                run.export_to("best", actor, tokenizer)
            clock.lap("test")
        if step == last_step or (trainer.early_stop and scores.fell_twice):
            break

        trajectories = sample(supply, config, step, report)
        metrics |= rollout_metrics(trajectories, "train") | filter_metrics(trajectories, config)
        metrics |= cursor.metrics() | engine.metrics() | staleness(trajectories, step, config.rollout.max_staleness)
        if not config.rollout.is_async:
            engine.sleep()
        clock.lap("rollout")

        trained = trainable(trajectories, config)
        batch = pack(trained, step)
        for key, lm in readers.items():
            refuse_unknown_tokens(lm, [batch.largest_token_id], key)
        batch = judge(batch, config, actor, ref_actor, critic, progress, trajectories=trained)
        microscope.look(step, trajectories, batch)
        if run.due(trainer.replay_freq, step):
            run.keep_for_replay(step, batch, actor, tokenizer)
        if critic is not None:
            with progress.phase("update of the critic", batch.num_sequences, "sequences") as phase:
                metrics |= critic.update(batch, phase.update)
        if step >= config.actor.freeze_steps:
            with progress.phase(f"update of step {step}", batch.num_sequences, "sequences") as phase:
                metrics |= actor.update(batch, phase.update)
        clock.lap("update")

        report.step(step, metrics | clock.metrics(trajectories))
        report.say(*watch.see(step, metrics))
        run.save_if_due(step + 1, actor, supply, tokenizer, critic)

    supply.close()
    engine.close()
    microscope.look(step)  # at the last test
    if metrics:
        report.step(step, metrics)
        report.say(*watch.see(step, metrics))
    if step < last_step:
        report.say(f"step {step}: the test score fell twice in a row, which is where trainer.early_stop ends the run")
    if not trainer.eval_only:
        run.export(actor, tokenizer, critic)
    for each in {environment, *(each.environment for each in tests)}:
        each.close()
    report.close()


def make_cursor(num_prompts: int, config: RLConfig) -> Cursor:
    data, seed = config.train_data, config.trainer.seed
    if data.curriculum == "none":
        return Cursor(num_prompts, data.prompts_per_rollout, seed)
    return Curriculum(num_prompts, data.prompts_per_rollout, seed, data.curriculum)


def make_workers(config: RLConfig, run: Run, num_steps: int) -> tuple[Actor, Reference | None, Critic | None]:
    """The policy, and what its configuration asks for beside it."""
    critic, ref_actor, updates = None, None, actor_updates(config, num_steps)
    actor = Actor(config.actor, run.processes, updates, run.save_dir, config.logprob_gap_limit)
    if config.actor.kl.coef > 0:
        ref_actor = make_reference(config, actor)
    if config.adv.estimator == "gae":
        critic = Critic(config.critic, run.processes, num_steps * config.critic.update_per_rollout, run.save_dir)
    return actor, ref_actor, critic


def actor_updates(config: RLConfig, num_steps: int) -> int:
    """Optimizer steps of the actor. Raises ConfigError if there are none in so many steps."""
    frozen = config.actor.freeze_steps
    if frozen >= num_steps > 0:
        raise ConfigError(f"actor.freeze_steps={frozen} leaves none of the {num_steps} steps to the actor")
    return (num_steps - frozen) * config.actor.update_per_rollout


def make_reference(config: RLConfig, actor: Actor) -> Reference:
    """What the KL divergence is measured from; under LoRA the actor itself, without its adapters."""
    if actor.has_adapters and config.ref_actor.model_name == config.actor.model_name:
        return AdapterFreeReference(config.ref_actor, actor)
    return RefActor(config.ref_actor, config.actor, actor.mesh, actor.processes)


def sample(supply: Supply, config: RLConfig, step: int, report: Report) -> list[Trajectory]:
    """The rollout of one step, with replacements of filtered groups; some of it goes to samples.jsonl."""
    number, wanted = config.train_data.responses_per_prompt, config.train_data.prompts_per_rollout
    with report.progress.phase(f"rollout of step {step}", wanted * number, "responses") as phase:
        trajectories = supply.rollout(step, phase.update)
    for _ in range(1, config.rollout.dynamic_filtering_rounds):
        # equal on all processes, as all have all trajectories
        missing = wanted - len(groups(with_signal(trajectories, config)))
        if not missing:
            break
        with report.progress.phase(f"more rollouts of step {step}", missing * number, "responses") as phase:
            trajectories += supply.more(missing, step, len(groups(trajectories)), phase.update)
    supply.cursor.learn(success_rates(trajectories))
    raise_if_all_unscored(trajectories)
    for cause, count in unscored_causes(trajectories).most_common(3):
        report.say(f"step {step}: {count} of {len(trajectories)} trajectories unscored: {cause}")
    say_of_metrics(trajectories, step, report)
    report.samples(step, "train", trajectories[: config.trainer.samples_per_step])
    return trajectories


def test(
    tests: list[TestTasks], rollouts: Rollouts, config: RLConfig, step: int, report: Report, microscope: Microscope
) -> Metrics:
    """Return metrics of the present weights on every test set, among them `test/score`.

    The seed is the same at every step: only the weights differ.
    """
    metrics: Metrics = {}
    before = 0
    for each in tests:
        settings = each.settings
        trajectories = test_one(each, rollouts, config, step, report, before)
        raise_if_all_unscored(trajectories, f" of {settings.key}" if settings.name else "")
        say_of_metrics(trajectories, step, report)
        metrics |= rollout_metrics(trajectories, settings.prefix)
        before += len(each.prompts)
        shown = trajectories[: config.trainer.samples_per_step]
        report.samples(step, "test", shown, settings.name)
        microscope.tests.append((shown, settings.sampling))
    return metrics | {"test/score": fmean(scores_of([metrics], tests, config))}


def test_one(
    each: TestTasks, rollouts: Rollouts, config: RLConfig, step: int, report: Report, before: int
) -> list[Trajectory]:
    """Return the trajectories of one test set; their groups are numbered behind the `before` groups of other sets."""
    settings, prompts = each.settings, each.prompts
    wave = settings.prompts_per_rollout or len(prompts)
    episodes = replace(rollouts.episodes, environment=each.environment, max_turns=settings.max_turns)
    trajectories: list[Trajectory] = []
    what = f"test {settings.name} before step {step}" if settings.name else f"test before step {step}"
    with report.progress.phase(what, each.num_responses, "responses") as phase:
        for start in range(0, len(prompts), wave):
            of_wave = rollouts.collect(
                prompts[start : start + wave],
                settings.sampling,
                settings.responses_per_prompt,
                config.trainer.seed + start,
                phase.update,
                episodes,
            )
            trajectories += [replace(trajectory, group=before + start + trajectory.group) for trajectory in of_wave]
    return trajectories


def scores_of(rows: Iterable[Metrics], tests: list[TestTasks], config: RLConfig) -> list[float]:
    """Return `test/score` of each test in `rows`, as the present settings have it.

    Rows without a test, and those of a run whose settings were others and that lack a set, are left out.
    """
    names = [f"{each.settings.prefix}/score" for each in decisive(tests, config)]
    return [fmean(row[name] for name in names) for row in rows if names and all(name in row for name in names)]


def decisive(tests: list[TestTasks], config: RLConfig) -> list[TestTasks]:
    """Return the sets whose mean score is `test/score`: `test_data` itself, else the one that is named, else all."""
    if config.test_data.has_own:
        return tests[:1]
    return [each for each in tests if config.test_data.best_by in (None, each.settings.name)]


def say_of_metrics(trajectories: Seq[Trajectory], step: int, report: Report) -> None:
    """Name each metric of the environment that is no number, once in a run."""
    for trajectory in trajectories:
        for name, why in trajectory.left_out.items():
            report.say_once(f"metric {name}", f"step {step}: WARNING: a metric of the environment is left out: {why}")


def judge(
    batch: TokenBatch,
    config: RLConfig,
    actor: Actor,
    ref_actor: Reference | None,
    critic: Critic | None = None,
    progress: Progress | None = None,
    *,
    trajectories: Seq[Trajectory] = (),
) -> TokenBatch:
    """The rollout with what the update reads beside it: old and reference log-probabilities, values, advantages.

    `trajectories` are those that were packed into `batch`.
    """
    progress, number = progress or Progress(speaks=False), batch.num_sequences
    kl, adv, select = config.actor.kl, config.adv, config.actor.select
    kl_in_advantage = ref_actor is not None and kl.type != "loss"
    selects = select.not_mode or select.entropy_quantile > 0
    if config.actor.update_per_rollout > 1 or kl_in_advantage or selects:
        with progress.phase("log-probabilities before the update", number, "sequences") as phase:
            batch = actor.add_old_logprobs(batch, phase.update)
    if ref_actor is not None:
        with progress.phase("log-probabilities of the reference", number, "sequences") as phase:
            batch = batch.with_(ref_logp_T=ref_actor.logp(batch, phase.update))

    # costs count for the advantages only: which sequences are correct is the environment's word
    reward_T, cost_T = batch.reward_T, torch.zeros_like(batch.reward_T)
    if kl_in_advantage:
        assert batch.old_logp_T is not None and batch.ref_logp_T is not None
        cost_T = kl.coef * kl_estimate(batch.old_logp_T, batch.ref_logp_T, kl.used_estimator) * batch.action_T
    if kl.type == "reward":
        reward_T, cost_T = reward_T - cost_T, torch.zeros_like(cost_T)
    knobs: dict[str, Any] = {}
    if adv.estimator == "gdpo":
        knobs |= gdpo_parts(batch, trajectories, config)
    elif adv.overlong_buffer:
        reward_T = reward_T - overlong(batch, config, adv.overlong_penalty)
    if adv.estimator in ("reinforce", "gae"):
        knobs |= {"global_norm": adv.global_norm, "norm_var": adv.norm_var}
    if adv.estimator == "reinforce":
        knobs |= {"std_over": adv.std_over}
    if adv.estimator in ("reinforce", "gdpo", "rloo"):
        knobs |= {"group_size": config.train_data.responses_per_prompt}
    if critic is None:
        advantage_T = ADVANTAGES[adv.estimator](batch.with_(reward_T=reward_T), **knobs)
    else:
        with progress.phase("values of the critic", number, "sequences") as phase:
            value_T = critic.values(batch, phase.update)
        ahead_T = gae(batch.with_(reward_T=reward_T, value_T=value_T), gamma=adv.gamma, lamda=adv.lamda)
        batch = batch.with_(value_T=value_T, return_T=ahead_T + value_T)
        advantage_T = whitened(batch, ahead_T, **knobs)
    return batch.with_(advantage_T=advantage_T - cost_T)


def gdpo_parts(batch: TokenBatch, trajectories: Seq[Trajectory], config: RLConfig) -> dict[str, Tensor]:
    """Return the parts of the rewards and their weights; a penalty for length is one more part, with its own weight."""
    part_NP, weight_P = part_rewards(trajectories, config.reward.weights)
    if config.adv.overlong_buffer:
        cost_T = overlong(batch, config, penalty=1.0).double()
        cost_N = part_NP.new_zeros(len(trajectories)).index_add_(0, batch.trajectory_B[batch.sequence_T], cost_T)
        part_NP = torch.cat([part_NP, cost_N[:, None]], 1)
        weight_P = torch.cat([weight_P, weight_P.new_tensor([-config.adv.overlong_penalty])])
    return {"part_NP": part_NP, "weight_P": weight_P}


def overlong(batch: TokenBatch, config: RLConfig, penalty: float) -> Tensor:
    """Return what each response pays for its length, at its last token, [T]."""
    limit = config.rollout.train_sampling_params.max_new_tokens
    return overlong_penalty(batch, max_new_tokens=limit, buffer=config.adv.overlong_buffer, penalty=penalty)


class Clock:
    """Seconds of the parts of a step."""

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
