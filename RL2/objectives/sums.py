"""Sums of objectives: `ppo+0.5*opd` is an objective, whose loss is the loss of ppo and half of that of opd."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from RL2.errors import ConfigError
from RL2.objectives.objective import Loss, Objective
from RL2.types import TokenBatch, TokenStats


@dataclass(frozen=True)
class Term:
    """One objective of a sum, and the factor of its loss."""

    weight: float
    name: str
    objective: Objective

    def own(self, knobs: dict[str, Any]) -> dict[str, Any]:
        """Return those of `knobs` that it reads."""
        return {knob: value for knob, value in knobs.items() if knob in self.objective.knobs}


@dataclass(frozen=True)
class Sum(Objective):
    """A weighted sum of objectives. It reads what each of them reads, and has the knobs of all."""

    terms: tuple[Term, ...] = ()

    @property
    def parameters(self) -> dict[str, inspect.Parameter]:
        first, *others = (dict(term.objective.parameters) for term in self.terms)
        for other in others:
            first |= {name: p for name, p in other.items() if p.kind is p.KEYWORD_ONLY}
        return first

    @property
    def hints(self) -> dict[str, Any]:
        return {name: hint for term in self.terms for name, hint in term.objective.hints.items()}


def split(name: str) -> list[tuple[float, str]]:
    """Return weight and name of each term of "0.5*opd+ppo"; a name alone is one term of weight 1.

    Raise ValueError if a weight is not a number above 0, or a name is missing.
    """
    found = []
    for term in name.split("+"):
        weight, star, rest = term.partition("*")
        number, rest = (float(weight), rest) if star else (1.0, term)
        if not 0 < number < float("inf") or not rest.strip():
            raise ValueError(term)
        found.append((number, rest.strip()))
    return found


def total(key: str, name: str, terms: list[Term]) -> Sum:
    """Return the sum of `terms`, which `name` lists, the value of `key`.

    Raise ConfigError if terms share a knob with different defaults, read statistics with different K or beta, or train
    on preferences.
    """
    if unfit := next((term.name for term in terms if term.objective.trains_on != "rollout"), None):
        raise ConfigError(f"{key}={name}: {unfit} trains on preferences, which have no terms; use it alone in dpo")
    seen: dict[str, tuple[str, Any]] = {}
    for term in terms:
        for knob, parameter in term.objective.knobs.items():
            other, default = seen.setdefault(knob, (term.name, parameter.default))
            if default != parameter.default:
                raise ConfigError(
                    f"{key}={name}: {other} and {term.name} both read {knob}, with the defaults {default} and "
                    f"{parameter.default}; write the sum as a function of your own"
                )
    top_k, beta = (_shared(key, name, terms, attribute) for attribute in ("top_k", "beta"))

    def loss(stats: TokenStats, batch: TokenBatch, **knobs: Any) -> Loss:
        return _loss(terms, stats, batch, knobs)

    needs = tuple(dict.fromkeys(field for term in terms for field in term.objective.needs))
    return Sum(
        loss,
        needs,
        top_k,
        _gradient(terms),
        beta,
        reference=any(term.objective.reference for term in terms),
        covariance=any(term.objective.covariance for term in terms),
        terms=tuple(terms),
    )


def _shared(key: str, name: str, terms: list[Term], attribute: str) -> str | None:
    """Return the knob that `attribute` names in all terms that have one."""
    knobs = dict.fromkeys(knob for term in terms if (knob := getattr(term.objective, attribute)) is not None)
    if len(knobs) > 1:
        raise ConfigError(f"{key}={name}: {' and '.join(knobs)} would be two values of {attribute}, and a sum has one")
    return next(iter(knobs), None)


def _loss(terms: list[Term], stats: TokenStats, batch: TokenBatch, knobs: dict[str, Any]) -> Loss:
    """Return the weighted sum of the losses, and the metrics of all terms with the loss of each before its weight."""
    losses, metrics = [], dict[str, Tensor]()
    for term in terms:
        loss_T, own = term.objective(stats, batch, **term.own(knobs))
        losses.append(term.weight * loss_T)
        label = term.name.rpartition(":")[2]
        own = own | {f"loss_{label}": loss_T.detach()}
        metrics |= {f"{label}_{metric}" if metric in metrics else metric: value for metric, value in own.items()}
    return sum(losses[1:], losses[0]), metrics


def _gradient(terms: list[Term]) -> Callable[..., Tensor] | None:
    """Return the closed form of the gradient, if each term has one."""
    if any(term.objective.gradient is None for term in terms):
        return None
    taught = any(term.objective.needs_teacher for term in terms)

    def gradient(p_TV: Tensor, *others: Any, **knobs: Any) -> Tensor:
        *q_TV, batch = others  # q only if a term reads a teacher
        assert len(q_TV) == taught
        parts = []
        for term in terms:
            formula = term.objective.gradient
            assert formula is not None
            own = q_TV if term.objective.needs_teacher else []
            parts.append(term.weight * formula(p_TV, *own, batch, **term.own(knobs)))
        return sum(parts[1:], parts[0])

    return gradient
