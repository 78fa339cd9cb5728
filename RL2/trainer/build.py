"""Everything that the loop of reinforcement learning uses, made stage by stage from the configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from RL2.agents.make import make_agent
from RL2.agents.roles import RolePlayer
from RL2.agents.session import Policy
from RL2.batch.registry import configured as estimator_of
from RL2.batch.role_means import RoleMeans
from RL2.config.model import Teacher as TeacherConfig
from RL2.config.programs import RLConfig
from RL2.config.rollout import Rollout
from RL2.config.values import START
from RL2.credit.branches import Branching
from RL2.data.curriculum import Curriculum
from RL2.data.cursor import Cursor
from RL2.data.prompts import largest_token_id
from RL2.data.template import Template
from RL2.data.tool_calls import ResponseParser
from RL2.engines.base import Engine
from RL2.engines.make import make_engine
from RL2.errors import ConfigError, naming
from RL2.io.report import Report
from RL2.models.policy import configured_tokenizer, max_length, positions, refuse_unknown_tokens, stop_tokens
from RL2.objectives.registry import needs_reference
from RL2.rollout.continuation import decode
from RL2.rollout.environment import Environment, load_environment, without_rewards, without_script
from RL2.rollout.episodes import Episodes, EpisodeSetting, Player
from RL2.rollout.hints import ChosenTeachers, Hints
from RL2.rollout.scheduler import Scheduler
from RL2.trainer.alarms import Alarms
from RL2.trainer.annotate import annotate
from RL2.trainer.announce import describe_engine, describe_model, describe_plan
from RL2.trainer.evaluator import Evaluator, decisive
from RL2.trainer.inputs import of_prompts
from RL2.trainer.opponents import Opponents, refuse_other_roles
from RL2.trainer.run import Run, number_of_steps
from RL2.trainer.tasks import Load, TestTasks, first_rows, reader, test_tasks, train_tasks
from RL2.trainer.teacher_tokens import refuse_another_tokenizer
from RL2.trainer.token_log import TokenLog
from RL2.types import Prompt, TokenBatch, Trajectory
from RL2.workers.actor import Actor, AdapterFreeReference, RefActor, Reference
from RL2.workers.critic import Critic
from RL2.workers.entropy_coef import EntropyCoef
from RL2.workers.teacher import FrozenTeacher, SeveralTeachers, make_teacher
from RL2.workers.worker import Teacher, Worker


@dataclass(frozen=True)
class Tasks:
    """Prompts to train and test on, with their environments."""

    environment: Environment
    prompts: Seq[Prompt]
    tests: list[TestTasks]

    @property
    def environments(self) -> set[Environment]:
        return {self.environment, *(each.environment for each in self.tests)}

    @property
    def largest_token_ids(self) -> list[int]:
        """Return the largest token id of each source of prompts."""
        return [largest_token_id(prompts) for prompts in (self.prompts, *(each.prompts for each in self.tests))]


@dataclass(frozen=True)
class Models:
    """The policy, and the models that its configuration asks for beside it."""

    actor: Actor
    """The policy, with its teacher."""
    reference: Reference | None
    critic: Critic | None

    @property
    def teachers(self) -> list[FrozenTeacher]:
        """Return the teachers with weights of their own."""
        teacher = self.actor.teacher
        found = teacher.teachers if isinstance(teacher, SeveralTeachers) else [teacher]
        return [one for one in found if isinstance(one, FrozenTeacher)]

    @property
    def readers(self) -> dict[str, PreTrainedModel]:
        """Return the models that read the sampled tokens, by the key that names them."""
        found = {"actor.model_name": self.actor.lm}
        if isinstance(self.reference, RefActor):
            found["ref_actor.model_name"] = self.reference.lm
        found |= {teacher.key: teacher.lm for teacher in self.teachers}
        if self.critic is not None:
            found["critic.model_name"] = self.critic.lm
        return found


@dataclass(frozen=True)
class Position:
    """The state of a run beside its models, as a checkpoint keeps it."""

    scheduler: Scheduler
    role_means: RoleMeans
    entropy_coef: EntropyCoef

    def state_dict(self) -> dict[str, Any]:
        return self.scheduler.state_dict() | self.role_means.state_dict() | self.entropy_coef.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scheduler.load_state_dict(state)
        self.role_means.load_state_dict(state)
        self.entropy_coef.load_state_dict(state)


@dataclass(frozen=True)
class Parts:
    """The parts of a run. The run closes them when it ends, however it ends."""

    tokenizer: PreTrainedTokenizerBase
    actor: Actor
    reference: Reference | None
    critic: Critic | None
    readers: dict[str, PreTrainedModel]
    """Models that read the sampled tokens, by the key that names them."""
    engine: Engine
    opponents: Opponents
    scheduler: Scheduler
    branching: Branching | None
    """Continuations of the responses; None without an estimator that reads them."""
    position: Position
    evaluator: Evaluator
    annotate: Callable[[TokenBatch, Seq[Trajectory]], TokenBatch]
    """Function that adds log-probabilities, values and advantages to a batch."""
    report: Report
    token_log: TokenLog
    alarms: Alarms
    first_step: int
    last_step: int
    """Step at which only the test remains."""


def build(config: RLConfig, run: Run) -> Parts:
    """Make the parts of a run, resume it, and say what it is going to do (collective)."""
    progress = run.progress
    tokenizer = configured_tokenizer(config.actor, "actor")
    refuse_another_tokenizer(config.teacher, config.actor.model_name, tokenizer)
    template = Template(tokenizer)
    with naming("actor.model_name"):
        # the last token of a sequence is only a label and takes no position
        longest = min(config.actor.max_length + 1, max_length(config.actor.model_name))
    notes: list[str] = []
    load = reader(template, longest, notes, run.listing(), progress)
    tasks = load_tasks(config, load, run.closing)
    if estimator_of(config.adv).needs_greedy and tasks.environment.roles:
        raise ConfigError(f"adv.estimator={config.adv.estimator} does not work with environments that have ROLES yet")
    progress.say(*notes)
    tested = {each.settings.key: of_prompts(each.prompts) for each in tasks.tests}
    run.know_rows({"train_data": of_prompts(tasks.prompts), "test_data": of_prompts([])} | tested)
    cursor = make_cursor(len(tasks.prompts), config)
    num_steps = 0 if config.trainer.eval_only else number_of_steps(config.trainer, cursor)

    with progress.phase("loading the models"):
        models = load_models(config, run, num_steps)
    actor, critic = models.actor, models.critic
    named: dict[str, object] = {"actor": actor, "ref_actor": models.reference, "critic": critic}
    named |= {teacher.key.removesuffix(".model_name"): teacher for teacher in models.teachers}
    progress.say(*(describe_model(name, worker) for name, worker in named.items() if isinstance(worker, Worker)))
    with naming("actor.model_name"):
        ends = stop_tokens(actor.lm, tokenizer, template)
    for key, lm in models.readers.items():
        with naming(key):
            refuse_unknown_tokens(lm, [*tasks.largest_token_ids, *ends])

    with progress.phase("starting the engine"):
        engine = make_engine(
            config.rollout,
            actor,
            lambda ids: decode(tokenizer, ids),
            longest,
            run.save_dir,
            config.actor.moe.reads_engine,
        )
    run.closing.callback(engine.close)
    progress.say(describe_engine(config))
    with progress.phase("loading the opponents"):
        opponents = Opponents(config, actor, longest)
    run.closing.callback(opponents.close)
    player, tests = make_players(config.rollout, tasks, engine, template, longest, opponents)
    setting = EpisodeSetting(engine, tasks.environment, tokenizer, config.rollout.max_turns, longest, template, player)
    episodes = Episodes(setting, ends, run.processes, config.rollout.is_async)
    scheduler = Scheduler(tasks.prompts, cursor, episodes, config, num_steps)
    run.closing.callback(scheduler.close)  # a thread may be at work
    branching = Branching(config, tasks.prompts, episodes) if estimator_of(config.adv).needs_branches else None
    role_means = RoleMeans(config.adv.rae.decay)
    position = Position(scheduler, role_means, actor.entropy_coef)

    report = run.report(num_steps)
    run.closing.callback(report.close)
    report.first_rows(first_rows(tasks.prompts, tokenizer))
    token_log = TokenLog(config, actor, tokenizer, report)
    first_step = run.resume(actor, position, report, critic)
    refuse_lost_reference(config, first_step)
    report.say(describe_plan(config, first_step, num_steps))
    evaluator = Evaluator(config, tests, episodes, report, token_log)
    num_tests = max(1, sum(each.num_responses for each in decisive(tests, config)))
    num_train = config.train_data.prompts_per_rollout * config.train_data.responses_per_prompt
    weights = config.reward.weights
    is_rewarded = config.rollout.env_path is not None or config.rollout.agent is not None
    alarms = Alarms(num_tests, config.trainer.save_dir, report.rows(), num_train, weights, is_rewarded)
    report.begin(first_step)
    return Parts(
        tokenizer=tokenizer,
        actor=actor,
        reference=models.reference,
        critic=critic,
        readers=models.readers,
        engine=engine,
        opponents=opponents,
        scheduler=scheduler,
        branching=branching,
        position=position,
        evaluator=evaluator,
        annotate=partial(
            annotate,
            config=config,
            actor=actor,
            reference=models.reference,
            critic=critic,
            role_means=role_means,
            progress=progress,
            hints=make_hints(config, tasks, models, template, run),
            chosen=ChosenTeachers(tasks.prompts, config.teacher) if config.teacher.models else None,
        ),
        report=report,
        token_log=token_log,
        alarms=alarms,
        first_step=first_step,
        last_step=first_step if config.trainer.eval_only else max(first_step, num_steps),
    )


def refuse_lost_reference(config: RLConfig, step: int) -> None:
    """Raise ConfigError if a run would go on at a step whose reference is that of an earlier one."""
    every = config.ref_actor.sync_every
    if every is not None and step % every:
        raise ConfigError(
            f"the checkpoint of step {step} is between two refreshes of the reference (ref_actor.sync_every={every}), "
            "which it does not hold; resume from a checkpoint of a multiple of that with trainer.load_ckpt_from"
        )


def make_players(
    rollout: Rollout, tasks: Tasks, engine: Engine, template: Template, max_length: int, opponents: Opponents
) -> tuple[Player | None, list[TestTasks]]:
    """Return what plays the episodes of training, and the tests with what plays theirs.

    It is None where engine and environment take turns. `max_length` is in tokens.
    """
    if rollout.agent is None and not any(environment.roles for environment in tasks.environments):
        return None, tasks.tests
    policy = Policy(engine, template.tokenizer, template, ResponseParser(template), max_length)
    agent = make_agent(rollout, "rollout.agent", policy)

    def player(environment: Environment, named: Mapping[str, str]) -> Player | None:
        return RolePlayer(policy, opponents.of(named)) if environment.roles else agent

    tests = [replace(each, player=player(each.environment, each.settings.opponents)) for each in tasks.tests]
    return player(tasks.environment, rollout.opponents), tests


def load_tasks(config: RLConfig, read: Load, closing: ExitStack) -> Tasks:
    """Return the prompts that a run trains and tests on; `closing` closes their environments."""
    rollout = config.rollout
    if rollout.env_path is None and rollout.agent is None:
        environment = without_rewards()
    elif rollout.env_path is None:
        environment = without_script(config.reward.weights)
    else:
        environment = load_environment(rollout.env_path, rollout.env_timeout_s, config.reward.weights, with_roles=True)
    closing.callback(environment.close)
    if environment.roles and rollout.agent is not None:
        raise ConfigError(f"rollout.agent={rollout.agent}: {environment.path} has roles, and plays its episodes itself")
    if environment.roles and estimator_of(config.adv).needs_branches:
        raise ConfigError(
            f"adv.estimator={config.adv.estimator}: {environment.path} has roles and plays its episodes itself, so "
            "they cannot be continued from a place within them"
        )
    refuse_other_roles(rollout.opponents, environment, "rollout.opponents")
    prompts, tests = train_tasks(config, environment, read), test_tasks(config, environment, read)
    tasks = Tasks(environment, prompts, tests)
    for test in tests:
        refuse_other_roles(test.settings.opponents, test.environment, f"{test.settings.key}.opponents")
    for each in tasks.environments - {environment}:
        closing.callback(each.close)
    return tasks


def make_hints(config: RLConfig, tasks: Tasks, models: Models, template: Template, run: Run) -> Hints | None:
    """Return the hints for the teacher, if it gets any. Raise ConfigError if the script has none."""
    if not config.teacher.hint:
        return None
    if not tasks.environment.has_hint:
        raise ConfigError(f"teacher.hint=true, and {tasks.environment.path} has no `def hint(extra_info)`")
    readers = [teacher.lm for teacher in models.teachers] or [models.actor.lm]
    longest = min(positions(lm.config) for lm in readers) + 1
    return Hints(tasks.prompts, tasks.environment, template, run.processes, longest)


def make_cursor(num_prompts: int, config: RLConfig) -> Cursor:
    """Return the order in which rows are drawn."""
    data, seed = config.train_data, config.trainer.seed
    if data.curriculum == "none":
        return Cursor(num_prompts, data.prompts_per_rollout, seed)
    return Curriculum(num_prompts, data.prompts_per_rollout, seed, data.curriculum)


def load_models(config: RLConfig, run: Run, num_steps: int) -> Models:
    """Load the policy, and the reference and critic that its configuration asks for."""
    critic, ref_actor, updates = None, None, actor_updates(config, num_steps)
    actor = Actor(config.actor, run.processes, updates, run.save_dir, config.logprob_gap_limit)
    if config.actor.kl.is_exact:
        actor.teacher = reference_as_teacher(config, actor)
    elif needs_reference(config.actor):
        ref_actor = make_reference(config, actor)
    if config.teacher.is_on:
        actor.teacher = make_teacher(config.teacher, actor, config.actor.temperature)
    if estimator_of(config.adv).needs_critic:
        critic = Critic(config.critic, run.processes, num_steps * config.critic.update_per_rollout, run.save_dir)
    return Models(actor, ref_actor, critic)


def actor_updates(config: RLConfig, num_steps: int) -> int:
    """Return the number of optimizer steps of the actor. Raises ConfigError if `num_steps` leaves it none."""
    frozen = config.actor.freeze_steps
    if frozen >= num_steps > 0:
        raise ConfigError(f"actor.freeze_steps={frozen} leaves none of the {num_steps} steps to the actor")
    return (num_steps - frozen) * config.actor.update_per_rollout


def reference_as_teacher(config: RLConfig, actor: Actor) -> Teacher:
    """Return the reference of an exact KL divergence, which runs in the update."""
    reference = config.ref_actor
    name = START if reference.model_name == config.actor.model_name else reference.model_name
    settings = TeacherConfig(model_name=name, dequantize=reference.dequantize)
    return make_teacher(settings, actor, config.actor.temperature, "ref_actor")


def make_reference(config: RLConfig, actor: Actor) -> Reference:
    """Return the reference policy; under LoRA the actor itself, without its adapters."""
    if actor.has_adapters and config.ref_actor.model_name == config.actor.model_name:
        return AdapterFreeReference(config.ref_actor, actor)
    return RefActor(config.ref_actor, config.actor, actor.mesh, actor.processes)
