"""Rules for the settings of advantages: what the estimator does not read, and what it cannot work with."""

from __future__ import annotations

from RL2.batch.registry import KEY, NAMED, BoundEstimator, configured
from RL2.config.here import check_critic_here
from RL2.config.programs import RLConfig
from RL2.config.rollout import Branch
from RL2.config.rules import check_limit
from RL2.config.trainer import Rae
from RL2.errors import ConfigError
from RL2.objectives.registry import find


def check_estimator(config: RLConfig) -> None:
    """Raise ConfigError for an estimator that cannot be found, and for the first rule that its settings break."""
    bound = configured(config.adv)
    for rule in RULES:
        rule(config, bound)


def critic_holds_every_sequence(config: RLConfig, bound: BoundEstimator) -> None:
    """Refuse a critic whose microbatches are too small for the longest sequence."""
    if bound.needs_critic:
        for name in ("max_length_per_device", "max_inference_length_per_device"):
            check_limit(f"critic.{name}", getattr(config.critic, name), "critic", config.critic.sp_size, config.actor)


def critic_runs_here(config: RLConfig, bound: BoundEstimator) -> None:
    """Refuse a critic that lacks packages or processes on this machine."""
    if bound.needs_critic:
        check_critic_here(config)


def normalisation_is_read(config: RLConfig, bound: BoundEstimator) -> None:
    """Refuse `adv.norm_var` and `adv.global_norm` with an estimator that does not read them."""
    idle = [f"adv.{name}" for name in ("norm_var", "global_norm") if name not in bound.estimator.settings]
    if any(getattr(config.adv, key.removeprefix("adv.")) for key in idle):
        have = "have" if len(idle) > 1 else "has"
        raise ConfigError(f"{' and '.join(idle)} {have} no effect with {KEY}={bound.name}")


def knobs_are_read(config: RLConfig, bound: BoundEstimator) -> None:
    """Refuse the other knobs with a key of their own where the estimator does not read them."""
    for name in ("std_over", "gamma", "lamda"):
        value = getattr(config.adv, name)
        if value != NAMED[name] and name not in bound.estimator.settings:
            raise ConfigError(f"adv.{name}={value} has no effect with {KEY}={bound.name}")


def decay_is_read(config: RLConfig, bound: BoundEstimator) -> None:
    """Refuse `adv.rae.decay` with an estimator that reads no running means."""
    if config.adv.rae != Rae() and "means" not in bound.estimator.reads:
        raise ConfigError(f"adv.rae.decay={config.adv.rae.decay:g} has no effect with {KEY}={bound.name}")


def greedy_responses_are_of_these_weights(config: RLConfig, bound: BoundEstimator) -> None:
    """Refuse greedy responses beside rollouts of older weights, and with agents and opponents."""
    rollout = config.rollout
    if not bound.needs_greedy:
        return
    if rollout.is_async:
        raise ConfigError(
            f"{KEY}={bound.name} compares with a greedy response of the same weights, and rollouts run ahead of "
            "training; set rollout.max_staleness=0 and rollout.partial_rollout=0"
        )
    if rollout.agent is not None or rollout.opponents:
        raise ConfigError(
            f"{KEY}={bound.name} does not work with rollout.agent and rollout.opponents yet: it is untried which "
            "conversation of an episode the greedy one belongs to"
        )


def freezing_needs_a_critic(config: RLConfig, bound: BoundEstimator) -> None:
    """Refuse `actor.freeze_steps`, in which only the critic learns, without a critic."""
    if config.actor.freeze_steps and not bound.needs_critic:
        raise ConfigError(f"actor.freeze_steps={config.actor.freeze_steps} has no effect with {KEY}={bound.name}")


def std_over_changes_the_deviation(config: RLConfig, bound: BoundEstimator) -> None:
    """Refuse `adv.std_over` where nothing is divided, or where the deviation is the same without it."""
    adv = config.adv
    if adv.std_over is None:
        return
    if not adv.norm_var:
        raise ConfigError(f"adv.std_over={adv.std_over} has no effect with adv.norm_var=false")
    if adv.std_over == "rollout" and (adv.global_norm or config.train_data.responses_per_prompt == 1):
        raise ConfigError("adv.std_over=rollout has no effect: the mean is over the whole rollout already")


def no_kl_among_parts(config: RLConfig, bound: BoundEstimator) -> None:
    """Refuse a KL divergence in the reward with an estimator that reads the parts of the reward."""
    kl = config.actor.kl
    if "parts" in bound.estimator.reads and kl.coef > 0 and kl.type == "reward":
        raise ConfigError(
            f"actor.kl.type=reward with {KEY}={bound.name}: parts of a reward are normalised one by one, and the KL "
            "divergence is not one of them; set actor.kl.type=advantage or loss"
        )


def responses_are_compared_with_others(config: RLConfig, bound: BoundEstimator) -> None:
    """Refuse a rollout of one response with an estimator that subtracts a baseline of other responses."""
    data = config.train_data
    if bound.estimator.baseline and data.prompts_per_rollout * data.responses_per_prompt == 1:
        raise ConfigError(
            f"{KEY}={bound.name} compares a response with others, and a step has only one; raise "
            "train_data.responses_per_prompt or train_data.prompts_per_rollout"
        )


def branches_are_read(config: RLConfig, bound: BoundEstimator) -> None:
    """Refuse `rollout.branch` with an estimator that reads no branches."""
    if config.rollout.branch != Branch() and not bound.needs_branches:
        raise ConfigError(f"rollout.branch has no effect with {KEY}={bound.name}; set {KEY}=branch")


def branches_can_be_sampled(config: RLConfig, bound: BoundEstimator) -> None:
    """Refuse rollouts that cannot be continued, and rewards that continuations would not have."""
    if not bound.needs_branches:
        return
    rollout, kl = config.rollout, config.actor.kl
    reasons = {
        f"rollout.engine={rollout.engine}: it was tried with embedded only": rollout.engine != "embedded",
        f"rollout.max_staleness={rollout.max_staleness}: older weights sampled the responses, and the values would be "
        "those of the present ones": rollout.max_staleness > 0,
        "rollout.agent: an agent cannot be started in the middle of an episode": rollout.agent is not None,
        "rollout.train_sampling_params.stop: a stop string may begin before the place, where the engine does not look "
        "for it": bool(rollout.train_sampling_params.stop),
        "train_data.responses_per_prompt=1: the value of a prompt is the mean of its other "
        "responses": config.train_data.responses_per_prompt == 1,
        f"adv.overlong_buffer={config.adv.overlong_buffer}: the values have no penalty for length; set it to "
        "0": config.adv.overlong_buffer > 0,
        "actor.kl.type=reward: the values have no KL divergence; set it to advantage or loss": kl.coef > 0
        and kl.type == "reward",
        "actor.moe.replay=engine: continuations have no record of experts": config.actor.moe.reads_engine,
        "rollout.branch.places=turns and rollout.max_turns=1: there is no end of a turn within a "
        "response": rollout.branch.places == "turns" and rollout.max_turns == 1,
    }
    for reason, holds in reasons.items():
        if holds:
            raise ConfigError(f"{KEY}={bound.name} does not go with {reason}")


def trees_are_weighed(config: RLConfig, bound: BoundEstimator) -> None:
    """Refuse averages and terms in which the tokens of a tree would not have their shares."""
    if not (bound.needs_branches and config.rollout.branch.train):
        return
    actor = config.actor
    select = actor.select
    reasons = {
        "actor.avg_level=sequence: a tree has no length; set it to constant or token": actor.avg_level == "sequence",
        "actor.imitation.coef": actor.imitation.coef > 0,
        "actor.observations.coef": actor.observations.coef > 0,
        "actor.select.entropy_quantile, second_moment and covariance_share, which count tokens": select.entropy_quantile
        > 0
        or select.is_joint,
        "a teacher": config.teacher.is_on,
        f"actor.objective={actor.objective}, which compares the tokens of a step": find(actor.objective).covariance,
        f"actor.update_per_rollout={actor.update_per_rollout}, which may cut a tree": actor.update_per_rollout > 1,
    }
    for reason, holds in reasons.items():
        if holds:
            raise ConfigError(f"rollout.branch.train=true does not go with {reason}")


RULES = (
    critic_holds_every_sequence,
    critic_runs_here,
    normalisation_is_read,
    knobs_are_read,
    decay_is_read,
    greedy_responses_are_of_these_weights,
    freezing_needs_a_critic,
    std_over_changes_the_deviation,
    no_kl_among_parts,
    responses_are_compared_with_others,
    branches_are_read,
    branches_can_be_sampled,
    trees_are_weighed,
)
