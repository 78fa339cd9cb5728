"""Refuse settings of the loss and of the advantages that have no effect.

Before a run, each term of the loss that is switched on is tried on a small synthetic batch: V logits for each of T
tokens stand in for a model. A term whose gradient is exactly zero there, and a setting that changes nothing, would have
no effect in training either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from RL2.batch.packing import pack
from RL2.batch.registry import configured as estimator_of
from RL2.config.functions import function_of
from RL2.config.model import Actor, Masks
from RL2.config.model import Teacher as TeacherConfig
from RL2.config.programs import DPOConfig, RLConfig, SFTConfig
from RL2.config.values import EMA, START
from RL2.errors import ConfigError
from RL2.objectives.loss import total_loss, wanted_stats, with_weights
from RL2.objectives.registry import BoundObjective, bind, configured, needs_reference, preference
from RL2.ops.teacher_stats import Teacher, teacher_stats
from RL2.ops.token_stats import token_stats
from RL2.trainer.estimator_rules import check_estimator
from RL2.types import TEACHER_MENU, Sequence, StatsRequest, TokenBatch, TokenStats, Trajectory

NUM_TRAJECTORIES, LONGEST = 32, 16


def refuse_unused_settings(config: RLConfig) -> None:
    """Raise ConfigError, with the reason, for a setting of the loss or of the advantages that has no effect.

    Raise it also for a function of one's own that cannot be found.
    """
    check_estimator(config)
    if config.rollout.filter is not None:
        function_of("rollout.filter", config.rollout.filter)
    # masks may leave out all of a synthetic batch
    actor, objective = replace(config.actor, masks=Masks()), configured(config.actor)
    if config.ref_actor.sync_every is not None and not needs_reference(actor):
        raise ConfigError(f"ref_actor.sync_every={config.ref_actor.sync_every} has no effect: no reference is loaded")
    check_teacher(config.teacher, objective)
    logits_TV, batch = synthetic_batch(vocabulary=64 + 2 * objective.top_k)

    def gradient(actor: Actor) -> Tensor:
        return loss_gradient(logits_TV, batch, actor, objective)

    bare = without_terms(actor)
    if not gradient(replace(bare, select=replace(bare.select, not_mode=False))).any():
        knobs = "".join(f" {knob}={value}" for knob, value in objective.knobs.items())
        raise ConfigError(f"actor.objective={actor.objective}{knobs} trains nothing: its gradient is exactly zero")
    whole = gradient(actor)
    refuse_own_teacher(
        config.teacher,
        objective,
        logits_TV,
        actor.temperature,
        lambda own: loss_gradient(logits_TV, batch, actor, objective, own),
    )
    for setting, off in terms(actor):
        if torch.equal(whole, gradient(off)):
            raise ConfigError(f"{setting} has no effect: the gradient is the same without it")

    needs_rewards = reads_advantages(objective)
    if needs_rewards and config.rollout.env_path is None and config.rollout.agent is None:
        raise ConfigError(
            f"actor.objective={actor.objective} reads advantages, which come from rewards; pass rollout.env_path=..."
        )
    if not needs_rewards:
        for setting in advantage_settings(config):
            raise ConfigError(f"{setting} has no effect: actor.objective={actor.objective} reads no advantages")


def check_teacher(teacher: TeacherConfig, objective: BoundObjective) -> None:
    """Raise ConfigError for an objective without the teacher that it needs, and for a teacher that nothing reads."""
    if objective.needs_teacher and not teacher.is_on:
        read = ", ".join(name for name in TEACHER_MENU if name in objective.fields)
        raise ConfigError(
            f"actor.objective={objective.name} reads {read} of a teacher, and there is none; pass "
            "teacher.model_name=..."
        )
    if teacher.is_on and not objective.needs_teacher:
        given = "teacher.models" if teacher.models else f"teacher.model_name={teacher.model_name}"
        raise ConfigError(f"{given} has no effect: actor.objective={objective.name} reads no teacher")


def refuse_own_teacher(
    teacher: TeacherConfig,
    objective: BoundObjective,
    logits_TV: Tensor,
    temperature: float,
    gradient_of: Callable[[Teacher], Tensor],
) -> None:
    """Raise ConfigError if the teacher begins as the policy, and the gradient is 0 there."""
    if teacher.model_name not in (START, EMA) or teacher.hint:
        return
    own = Teacher(logits_TV, torch.eye(logits_TV.shape[1]), teacher.temperature or temperature)
    if not gradient_of(own).any():
        raise ConfigError(
            f"teacher.model_name={teacher.model_name} trains nothing: the policy begins as its teacher, where "
            f"actor.objective={objective.name} has no gradient; add another objective, as in "
            f"actor.objective=ppo+{objective.name}, set teacher.hint=true, or name another teacher"
        )


def check_preference(config: DPOConfig) -> None:
    """Raise ConfigError for a loss of `dpo` that cannot be used, and for a reference that it does not read."""
    loss, reference = preference(config.actor), config.ref_actor.model_name
    if not loss.objective.reference and reference != config.actor.model_name:
        raise ConfigError(f"ref_actor.model_name={reference} has no effect: actor.loss={loss.name} reads no reference")


def refuse_advantage_objectives(config: SFTConfig) -> None:
    """Raise ConfigError for an objective that reads advantages, which rows of data do not have, or lacks a teacher."""
    actor = config.actor
    objective = bind(actor.objective, actor.objective_args)
    check_teacher(config.teacher, objective)
    if config.teacher.hint or config.teacher.models:
        raise ConfigError(
            "teacher.hint and teacher.models need an environment and the extra_info of rows, which sft does not read; "
            "use the program distill"
        )
    logits_TV, batch = synthetic_batch(vocabulary=64 + 2 * objective.top_k)
    refuse_own_teacher(
        config.teacher,
        objective,
        logits_TV,
        1.0,
        lambda own: gradient(logits_TV, batch, objective.request(), lambda s: objective.loss(s, batch)[0].sum(), own),
    )
    if reads_advantages(objective):
        raise ConfigError(
            f"actor.objective={actor.objective} reads advantages, and rows of data have none; "
            "choose sft, rank_jsd or another objective that reads none"
        )


def reads_advantages(objective: BoundObjective) -> bool:
    """Return whether the gradient of the objective depends on the advantages."""
    logits_TV, batch = synthetic_batch(vocabulary=64 + 2 * objective.top_k)
    assert batch.advantage_T is not None

    def of(batch: TokenBatch) -> Tensor:
        return gradient(logits_TV, batch, objective.request(), lambda stats: objective.loss(stats, batch)[0].sum())

    return not torch.equal(of(batch), of(batch.with_(advantage_T=batch.advantage_T.flip(0))))


def without_terms(actor: Actor) -> Actor:
    """Return a configuration with the objective alone."""
    return replace(
        actor,
        tis_coef=0.0,
        tis_level="token",
        tis_mode="truncate",
        tis_low=0.0,
        masks=Masks(),
        kl=replace(actor.kl, coef=0.0),
        entropy=replace(actor.entropy, coef=0.0),
    )


def terms(actor: Actor) -> Iterator[tuple[str, Actor]]:
    """Yield each setting of the loss that is switched on, and the configuration without it."""
    alone = without_terms(actor)
    if actor.tis_coef > 0:
        off = replace(actor, tis_coef=0.0, tis_level="token", tis_mode="truncate", tis_low=0.0)
        yield f"actor.tis_coef={actor.tis_coef:g}", off
    if actor.kl.coef > 0 and actor.kl.type == "loss":
        yield f"actor.kl.coef={actor.kl.coef:g}", replace(actor, kl=alone.kl)
    if actor.entropy.coef != 0:
        yield f"actor.entropy.coef={actor.entropy.coef:g}", replace(actor, entropy=alone.entropy)
    # without selection `kept` may keep all; the average is then the one over all
    free = replace(actor, average_over="all") if actor.train_on == "all" else actor
    if actor.select.not_mode:
        yield "actor.select.not_mode=true", replace(free, select=replace(actor.select, not_mode=False))
    if actor.select.entropy_quantile > 0:
        setting = f"actor.select.entropy_quantile={actor.select.entropy_quantile:g}"
        yield setting, replace(free, select=replace(actor.select, entropy_quantile=0.0))


def advantage_settings(config: RLConfig) -> Iterator[str]:
    """Yield the settings that act on advantages alone."""
    adv = config.adv
    if ":" in adv.estimator or {"values", "parts", "branches"} & set(estimator_of(adv).estimator.reads):
        yield f"adv.estimator={adv.estimator}"
    if adv.global_norm:
        yield "adv.global_norm=true"
    if adv.norm_var:
        yield "adv.norm_var=true"
    if adv.overlong_buffer:
        yield f"adv.overlong_buffer={adv.overlong_buffer}"
    if config.actor.kl.coef > 0 and config.actor.kl.type != "loss":
        yield f"actor.kl.type={config.actor.kl.type}"


def loss_gradient(
    logits_TV: Tensor, batch: TokenBatch, actor: Actor, objective: BoundObjective, teacher: Teacher | None = None
) -> Tensor:
    """Return the gradient of the loss with respect to the logits, [T, V]."""
    if actor.kl.coef == 0 and not objective.objective.reference:
        batch = replace(batch, ref_logp_T=None)
    weighted = with_weights(batch, actor)

    def loss(stats: TokenStats) -> Tensor:
        assert weighted.weight_T is not None
        return (total_loss(stats, weighted, actor, objective)[0] * weighted.weight_T).sum()

    return gradient(logits_TV, batch, wanted_stats(actor, objective), loss, teacher)


def gradient(
    logits_TV: Tensor,
    batch: TokenBatch,
    request: StatsRequest,
    loss: Callable[[TokenStats], Tensor],
    teacher: Teacher | None = None,
) -> Tensor:
    """Return the gradient of `loss` with respect to the logits, [T, V].

    `loss` is called with the statistics of `request`. `teacher` is by default one that differs from the policy.
    """
    leaf_TV, identity_VV = logits_TV.clone().requires_grad_(), torch.eye(logits_TV.shape[1])
    how: dict[str, Any] = {"temperature": request.temperature, "fields": request.fields, "top_k": request.top_k}
    if request.needs_teacher:
        teacher = teacher or Teacher(synthetic_teacher(logits_TV), identity_VV, request.temperature)
        stats = teacher_stats(leaf_TV, identity_VV, batch.labels_T, teacher, beta=request.beta, **how)
    else:
        stats = token_stats(leaf_TV, identity_VV, batch.labels_T, **how)
    found = loss(stats)
    if not found.requires_grad:
        return torch.zeros_like(leaf_TV)
    (gradient_TV,) = torch.autograd.grad(found, leaf_TV, allow_unused=True, materialize_grads=True)
    return gradient_TV


def synthetic_teacher(logits_TV: Tensor) -> Tensor:
    """Return the logits of a teacher that differs from the policy, [T, V]."""
    return logits_TV + torch.randn(logits_TV.shape, generator=torch.Generator().manual_seed(1))


def synthetic_batch(vocabulary: int) -> tuple[Tensor, TokenBatch]:
    """Return logits, [T, V], and a batch of actions in groups of four.

    Rewards are 0 and 1. The old policy, the engine and the reference each differ a little from the policy.
    """
    g = torch.Generator().manual_seed(0)
    lengths = [1 + 5 * n % LONGEST for n in range(NUM_TRAJECTORIES)]
    logits_TV = torch.randn(sum(lengths), vocabulary, generator=g) * torch.linspace(0.5, 6, sum(lengths))[:, None]
    labels_T = torch.multinomial(logits_TV.softmax(-1), 1, generator=g)[:, 0]
    trajectories = []
    for n, (length, ids) in enumerate(zip(lengths, labels_T.split(lengths), strict=True)):
        rewards = [0.0] * length + [float(n % 3 != 0)]
        sequence = Sequence([0, *ids.tolist()], [False] + [True] * length, [0.0] * (length + 1), rewards)
        trajectories.append(Trajectory(row=n // 4, group=n // 4, sample=n % 4, sequences=[sequence]))
    batch = pack(trajectories)
    stats = token_stats(logits_TV, torch.eye(vocabulary), labels_T, fields=("logp", "max_logp", "entropy"))

    def nearby(scale: float) -> Tensor:
        return stats.logp + scale * torch.randn(stats.logp.shape, generator=g)

    return logits_TV, batch.with_(
        engine_logp_T=nearby(0.5),
        old_logp_T=nearby(0.1),
        ref_logp_T=nearby(0.3),
        old_entropy_T=stats.entropy,
        off_mode_T=stats.logp < stats.max_logp,
        advantage_T=torch.randn(batch.num_sequences, generator=g)[batch.sequence_T],
    )
