"""The answers of a kept step with their searches, and what is reported of each.

Shapes: N actions of an answer, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from RL2.credit.continuations import Diverged, continuation
from RL2.credit.search import Answer, Bounds, Place, Search
from RL2.ops.token_stats import reference_stats
from RL2.tools.credit.kept import KeptAnswer, KeptStep
from RL2.tools.credit.pulls import Objectives, log_probabilities
from RL2.trainer.token_log import TokenTexts
from RL2.types import TokenStats

EXAMPLES = 2
"""Number of continuations that are kept of each alternative."""
SLACK = 1e-5
"""Least relative error of a probability; it is more if trainer and engine differ by more."""
ROUNDING = 1e-6
"""Relative difference of two rewards that counts as rounding."""


@dataclass
class Case:
    """An answer with its search."""

    kept: KeptAnswer
    search: Search
    stats: TokenStats
    """Statistics of its tokens under the kept weights, [N]."""
    fault: str
    """Reason why it cannot be continued; empty if it can."""
    asked: dict[Place, int] = field(default_factory=dict)
    """Number of continuations that were asked for from each place."""
    examples: dict[Place, list[dict[str, Any]]] = field(default_factory=dict)
    """Some continuations of alternatives."""


def make_case(one: KeptAnswer, kept: KeptStep, rewards: tuple[float, float], precision: float, whole: int) -> Case:
    """Return an answer with an empty search. Up to `whole` tokens, all of them are looked at.

    `rewards` are the least and the largest reward; within the search they are 0 and 1.
    """
    part = kept.batch.sequences([one.sequence])
    actions = part.positions(part.action_T)
    logp_NV, temperature = log_probabilities(kept.actor, part), kept.actor.request.temperature
    fields = ("logp", "max_logp", "entropy", "rank", "top_logp", "top_id")
    top_k = min(2, logp_NV.shape[1])
    stats = reference_stats(logp_NV, actions.labels_T, fields, top_k)
    # the policy that continues samples at its own temperature
    sampled = reference_stats(logp_NV * temperature / kept.sampling.temperature, actions.labels_T, ("logp",))
    assert actions.engine_logp_T is not None
    gap_N = (sampled.logp - actions.engine_logp_T).abs()
    if actions.age_T is not None:  # older weights sampled the others
        gap_N = gap_N[actions.age_T == 0]
    slack = max([SLACK, *gap_N.tolist()])
    is_cut = kept.sampling.top_p < 1 or kept.sampling.top_k > 0 or kept.sampling.min_p > 0
    limits_N = zip((sampled.logp - slack).exp().tolist(), (sampled.logp + slack).exp().tolist(), strict=True)
    tokens = actions.labels_T.tolist()
    low, high = rewards
    answer = Answer(
        tokens=tuple(tokens),
        # top_p, top_k and min_p make tokens more likely than the model does
        chance_T=tuple((0.0, 1.0) if is_cut else (least, min(1.0, most)) for least, most in limits_N),
        reward=(one.reward - low) / (high - low),
        other_T=tuple(
            next((other for other in ids if other != token), None)
            for token, ids in zip(tokens, stats.top_id.tolist(), strict=True)
        ),
    )
    fits = low <= one.reward <= high
    fault = "" if fits else f"its reward {one.reward:g} is outside --rewards {low:g},{high:g}"
    search = Search(answer, precision=precision / (high - low), looks_at_all=len(tokens) <= whole)
    return Case(one, search, stats, fault)


async def find_faults(cases: Sequence[Case], kept: KeptStep) -> None:
    """Note why answers cannot be replayed, by replaying each to its end."""
    for case in cases:
        if case.fault:
            continue
        place, before = Place(len(case.search.answer.tokens)), case.kept.reward
        try:
            again = await continuation(case.kept.recorded, place, kept.setting, kept.sampling, seed=0)
        except Diverged as error:
            case.fault = str(error)
            continue
        if again.reward is None:
            case.fault = "its environment gives no reward this time"
        elif abs(again.reward - before) > ROUNDING * max(1, abs(before)):
            case.fault = f"its environment gives the reward {again.reward:g} now, and {before:g} in the run"


def pairs_of(case: Case, rewards: tuple[float, float]) -> list[dict[str, Any]]:
    """Return a pair of single tokens for each token of which it is known whether its alternative is better.

    That is where the intervals of the values with the one and with the other have no point in common. A pair has the
    tokens before both, and the estimates of both values.
    """
    search, recorded, (low, high) = case.search, case.kept.recorded, rewards
    values, found = search.values(), list[dict[str, Any]]()
    place_N = [place for place, sampled in enumerate(recorded.sampled) if sampled]
    for t, (token, other) in enumerate(zip(search.answer.tokens, search.answer.other_T, strict=True)):
        if other is None:
            continue
        sides = [(values[t + 1], token), (search.value(Place(t, other)), other)]
        (worse, rejected), (better, chosen) = sorted(sides, key=lambda side: side[0].value)
        if worse.high < better.low:
            found.append(
                {
                    "prompt_ids": recorded.token_ids[: place_N[t]],
                    "chosen_ids": [chosen],
                    "rejected_ids": [rejected],
                    "chosen_value": low + better.value * (high - low),
                    "rejected_value": low + worse.value * (high - low),
                    "row": case.kept.row,
                    "sample": case.kept.sample,
                    "at": t,
                }
            )
    return found


def result_of(case: Case, kept: KeptStep, objectives: Objectives, rewards: tuple[float, float]) -> dict[str, Any]:
    """Return what is reported of an answer; bounds are [estimate, low, high] in the scale of the rewards."""
    search, one = case.search, case.kept
    low, high = rewards
    values = search.values()
    texts = TokenTexts(kept.setting.tokenizer)

    def scaled(bounds: Bounds, shift: float = 0.0) -> list[float]:
        return [round(shift + x * (high - low), 6) for x in bounds]

    alternatives = []
    for t, token in enumerate(search.answer.other_T):
        if token is not None and (bounds := search.alternative(t, values)) is not None:
            place = Place(t, token)
            alternatives.append(
                {
                    "at": t,
                    "text": texts[token],
                    "advantage": scaled(bounds),
                    "number": search.number(place),
                    "examples": case.examples.get(place, []),
                }
            )
    return {
        "row": one.row,
        "sample": one.sample,
        "group": one.recorded.group,
        "reward": one.reward,
        "token_ids": one.recorded.token_ids,
        "tokens": [texts[token] for token in search.answer.tokens],
        "value": [scaled(bounds, low) for bounds in values],
        "number": [search.number(Place(t)) for t in range(len(values))],
        "advantage": [scaled(bounds) for bounds in search.advantages(values)],
        "alternatives": alternatives,
        "logp": case.stats.logp.tolist(),
        "entropy": case.stats.entropy.tolist(),
        "rank": case.stats.rank.long().tolist(),
        "pulls": objectives.pulls(kept.actor, one.sequence),
    }
