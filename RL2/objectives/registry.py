"""Every objective by name, or from a file, with its knobs set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from RL2.config import functions
from RL2.config.load import ARGS
from RL2.config.model import Actor, DPOActor
from RL2.errors import ConfigError
from RL2.objectives.distillation import forward_kl, gkd, iw_opd, opd, opd_sampled
from RL2.objectives.entropy_control import kl_cov
from RL2.objectives.likelihood import dft
from RL2.objectives.objective import Gradient, Loss, Objective
from RL2.objectives.policy_gradient import cispo, gspo, ppo, reinforce, sapo
from RL2.objectives.preference import (
    apo_down,
    apo_zero,
    bco_pair,
    dpo,
    exo_pair,
    hinge,
    ipo,
    nca_pair,
    pivotal,
    robust,
    sigmoid_norm,
)
from RL2.objectives.rank import rank_jsd, rank_kl
from RL2.objectives.reference_free import cpo, orpo, simpo
from RL2.objectives.sequence_level import a2po, gmpo, luspo, vespo
from RL2.objectives.spo import binary_jsd, cross_entropy, spo, spo_0p5
from RL2.objectives.sums import Term, split, total
from RL2.objectives.trust_region import dppo, dro, importance_sampling
from RL2.objectives.unpaired import apo_zero_unpaired, bco, kto
from RL2.types import StatsRequest, TokenBatch, TokenStats

OBJECTIVES: dict[str, Objective] = {
    "sft": cross_entropy,
    "positive_ce": cross_entropy,
    "spo": spo,
    "spo_0p5": spo_0p5,
    "binary_jsd": binary_jsd,
    "rank_jsd": rank_jsd,
    "rank_kl": rank_kl,
    "reinforce": reinforce,
    "ppo": ppo,
    "gspo": gspo,
    "cispo": cispo,
    "sapo": sapo,
    "importance_sampling": importance_sampling,
    "dppo": dppo,
    "dro": dro,
    "gmpo": gmpo,
    "luspo": luspo,
    "vespo": vespo,
    "a2po": a2po,
    "dft": dft,
    "kl_cov": kl_cov,
}

TEACHER_OBJECTIVES: dict[str, Objective] = {
    "opd": opd,
    "opd_sampled": opd_sampled,
    "iw_opd": iw_opd,
    "gkd": gkd,
    "forward_kl": forward_kl,
}
"""Objectives that need a teacher."""

PREFERENCES: dict[str, Objective] = {
    "sigmoid": dpo,
    "ipo": ipo,
    "sigmoid_norm": sigmoid_norm,
    "hinge": hinge,
    "robust": robust,
    "exo_pair": exo_pair,
    "nca_pair": nca_pair,
    "bco_pair": bco_pair,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "pivotal": pivotal,
    "cpo": cpo,
    "simpo": simpo,
    "orpo": orpo,
    "kto": kto,
    "apo_zero_unpaired": apo_zero_unpaired,
    "bco": bco,
}
"""Losses of the program `dpo`, the values of actor.loss."""

ALL = OBJECTIVES | TEACHER_OBJECTIVES | PREFERENCES

KEY = "actor.objective"

DECLARATION = "@needs('logp', ...) of RL2.objectives.objective"

NAMED = {"clip": "actor.clip", "detach_target": "actor.path.detach_target", "region": "actor.path.region"}
"""Knobs with a key of their own; the others are set by actor.objective_args."""

LOSS = "actor.loss"


@dataclass(frozen=True)
class BoundObjective:
    """An objective with its knobs set."""

    name: str
    objective: Objective
    knobs: dict[str, Any]
    """Every knob with its value."""

    def loss(self, stats: TokenStats, batch: TokenBatch) -> Loss:
        """Return the loss of each token and the metrics."""
        return self.objective(stats, batch, **self.knobs)

    @property
    def fields(self) -> tuple[str, ...]:
        """The statistics that it reads."""
        return self.objective.needs

    @property
    def needs_teacher(self) -> bool:
        """True if it reads a statistic of a teacher."""
        return self.objective.needs_teacher

    @property
    def top_k(self) -> int:
        """K of the statistics in `types.TOP`; 0 if it reads none of them."""
        return 0 if self.objective.top_k is None else self.knobs[self.objective.top_k]

    @property
    def beta(self) -> float:
        """beta of `jsd`; 0.5 if it does not read it."""
        return 0.5 if self.objective.beta is None else self.knobs[self.objective.beta]

    def request(self, temperature: float = 1.0) -> StatsRequest:
        """Return the statistics of an update: those that it reads, `logp` to compare with the engine, and `entropy`."""
        fields = tuple(dict.fromkeys((*self.fields, "logp", "entropy")))
        return StatsRequest(fields, self.top_k, temperature, beta=self.beta)

    @property
    def gradient(self) -> Gradient | None:
        """Closed form of its gradient, if there is one."""
        return self.objective.gradient

    def check(self, vocabulary: int) -> None:
        """Raise ConfigError if the objective reads more tokens than the vocabulary of the model has."""
        if self.top_k > vocabulary:
            raise ConfigError(
                f"{KEY}={self.name} looks at {self.top_k} tokens, and actor.model_name has {vocabulary}; "
                f"lower {ARGS}.{self.objective.top_k}"
            )


def find(name: str, key: str = KEY) -> Objective:
    """Return the objective of this name, of `path.py:function`, or the sum of several: "ppo+0.5*opd".

    `key` is what `name` is the value of. Raise ConfigError if there is none.
    """
    try:
        terms = [(1.0, name)] if Path(name.rpartition(":")[0]).is_file() else split(name)
    except ValueError as error:
        raise ConfigError(f"{key}={name}: {error} is no term of a sum; write ppo+0.5*opd") from error
    found = [Term(weight, one, functions.find(key, one, ALL, Objective, DECLARATION)) for weight, one in terms]
    return found[0].objective if terms == [(1.0, name)] else total(key, name, found)


def bind(name: str, given: Mapping[str, Any]) -> BoundObjective:
    """Return the objective `name` with the `given` knobs; the others keep their defaults.

    Raise ConfigError for an objective that does not exist, a knob that it does not have or that has no value, and a
    value that does not fit the knob's annotation.
    """
    objective = find(name)
    _refuse_preferences(KEY, name, objective)
    keys = {knob: NAMED.get(knob, f"{ARGS}.{knob}") for knob in (*objective.knobs, *given)}
    return BoundObjective(name, objective, functions.knob_values(KEY, name, objective, given, keys))


def bound(objective: str | Objective, knobs: Mapping[str, Any]) -> BoundObjective:
    """Return an objective with its knobs set, both given in Python. Raise ConfigError as `bind` does."""
    if isinstance(objective, str):
        name, found = objective, find(objective, "objective")
    else:
        name, found = functions.argument("objective", objective, ALL, Objective, DECLARATION)
    _refuse_preferences("objective", name, found)
    keys = {knob: knob for knob in (*found.knobs, *knobs)}
    return BoundObjective(name, found, functions.knob_values("objective", name, found, knobs, keys))


def _refuse_preferences(key: str, name: str, objective: Objective) -> None:
    """Raise ConfigError for a loss of preferences where sampled tokens or demonstrations train."""
    if objective.trains_on != "rollout":
        what = {"pairs": "pairs of responses", "labels": "responses with a label"}[objective.trains_on]
        raise ConfigError(f"{key}={name} trains on {what}; use the program dpo with {LOSS}={name}")


def preference(actor: DPOActor) -> BoundObjective:
    """Return the loss of `dpo` with its knobs set.

    Raise ConfigError for a loss that does not exist or that does not train on preferences, for a knob that it does not
    have, and for `reference_free` where it has no effect or no meaning.
    """
    objective = functions.find(LOSS, actor.loss, PREFERENCES, Objective, DECLARATION)
    if objective.trains_on == "rollout":
        raise ConfigError(f"{LOSS}={actor.loss} does not train on preferences; declare it with trains_on='pairs'")
    if actor.reference_free and not objective.reference:
        raise ConfigError(f"actor.reference_free=true has no effect: {LOSS}={actor.loss} reads no reference")
    if actor.reference_free and objective.trains_on == "labels":
        raise ConfigError(f"{LOSS}={actor.loss} compares with a reference; remove actor.reference_free=true")
    given = dict(actor.loss_args)
    if actor.beta is not None:
        given["beta"] = actor.beta
    if actor.label_smoothing > 0:
        given["label_smoothing"] = actor.label_smoothing
    own = {"beta": "actor.beta", "label_smoothing": "actor.label_smoothing"}
    keys = {knob: own.get(knob, f"actor.loss_args.{knob}") for knob in (*objective.knobs, *given)}
    knobs = functions.knob_values(LOSS, actor.loss, objective, given, keys)
    return BoundObjective(actor.loss, objective, knobs)


def configured(actor: Actor) -> BoundObjective:
    """Return the objective of a configuration."""
    named = {"clip": actor.clip, "detach_target": actor.path.detach_target, "region": actor.path.region}
    return bind(actor.objective, {knob: x for knob, x in named.items() if x is not None} | actor.objective_args)


def reads_old_policy(actor: Actor) -> bool:
    """Return whether the objective or the selection of tokens reads the policy before the update."""
    return actor.select.reads_old_policy or find(actor.objective).covariance


def needs_reference(actor: Actor) -> bool:
    """Return whether a configuration needs a reference policy: for the KL divergence, or because the objective does."""
    return actor.kl.coef > 0 or find(actor.objective).reference
