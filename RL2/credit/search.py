"""Search for the tokens of one answer that decided its reward: where to sample next, and what is known so far.

A *place* is a prefix of the answer: its first `at` sampled tokens, and with `token` that token in place of the next.
V(place) is the mean reward of the policy's continuations from it, and the advantage of token t is V(t + 1) - V(t). This
module knows no models: it says from which places to sample, and is told the continuations.

Shapes: T sampled tokens of the answer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from math import prod
from typing import NamedTuple

from RL2.credit.intervals import mean_interval

FIRST = 16
"""Number of continuations of the first sample of a place; each later sample is half of those that the place has."""
ENOUGH = 8
"""Number of continuations from which on a place has an interval of its own."""
LONG_SINCE = 256
"""Continuations at both ends of a stretch after which it is split although its change is not known to differ from 0."""
OTHER = -1
"""In place of a token: any but the answer's own. Such a place is not sampled itself."""


class Place(NamedTuple):
    """A prefix of the answer."""

    at: int
    """Number of sampled tokens of the answer."""
    token: int | None = None
    """Token that follows them in place of the answer's own, or `OTHER`; None: none."""


class Bounds(NamedTuple):
    """An estimate with its interval."""

    value: float
    low: float
    high: float

    @property
    def is_decided(self) -> bool:
        """True if the interval excludes 0."""
        return self.low > 0 or self.high < 0

    @property
    def size(self) -> float:
        """Largest absolute value in the interval."""
        return max(abs(self.low), abs(self.high))


@dataclass(frozen=True)
class Answer:
    """A sampled answer, and the chances of its tokens under the policy that continues it."""

    tokens: tuple[int, ...]
    """The T sampled tokens."""
    chance_T: tuple[tuple[float, float], ...]
    """Limits of the probability of each under the policy; 0 and 1 if nothing is known."""
    reward: float
    """Reward of the whole answer, in [0, 1]."""
    other_T: tuple[int | None, ...] = ()
    """The alternative to each token: the most likely token, or where that was sampled the runner-up. Empty: none."""


@dataclass
class Search:
    """Samples of one answer. Intervals of all its values and advantages hold together with probability 1 - `alpha`."""

    answer: Answer
    alpha: float = 0.05
    precision: float = 0.05
    """Largest absolute advantage that counts as none."""
    looks_at_all: bool = True
    """False: bisect towards the tokens where the value changes."""
    counts: dict[Place, Counter[float | None]] = field(default_factory=dict)
    """Number of continuations of each place by their reward; None: unscored."""
    order: dict[Place, int] = field(default_factory=dict)
    """Number of each place in the order in which they got `ENOUGH` continuations, from 1."""
    opened: list[int] = field(default_factory=list)
    """Places of the answer that are sampled, in order."""

    def __post_init__(self) -> None:
        length = len(self.answer.tokens)
        self._doubt = list(accumulate((1 - low for low, _ in self.answer.chance_T), initial=0.0))
        if self.looks_at_all:
            # a token that is all but certain cannot change the value by more than `precision`
            firsts = {t for t, (low, _) in enumerate(self.answer.chance_T) if 1 - low > self.precision}
            self.opened = sorted({0, length} | firsts | {t + 1 for t in firsts})
        else:
            self.opened = sorted({0, length})

    def add(self, place: Place, tokens: Sequence[int], reward: float | None) -> Place | None:
        """Take a continuation from `place`: the tokens sampled after it, and the reward of the whole, in [0, 1].

        Each further place that its tokens go through has a sample too: given that the policy took the next token of the
        answer, the rest is a continuation from there. So is that of an alternative. Return the alternative that it
        took or began with, if any.
        """
        self._count(place, reward)
        if place.token is not None:
            return place
        for at, token in enumerate(tokens, place.at):
            if at == len(self.answer.tokens):
                break
            if token != self.answer.tokens[at]:
                self._count(Place(at, OTHER), reward)
                if not self.answer.other_T or token != self.answer.other_T[at]:
                    break
                self._count(Place(at, token), reward)
                return Place(at, token)
            if at + 1 < len(self.answer.tokens):
                self._count(Place(at + 1), reward)
        return None

    def _count(self, place: Place, reward: float | None) -> None:
        counter = self.counts.setdefault(place, Counter())
        counter[reward] += 1
        if place not in self.order and counter.total() >= ENOUGH:
            self.order[place] = len(self.order) + 1

    def number(self, place: Place) -> int:
        """Return how many continuations `place` has."""
        return self.counts[place].total() if place in self.counts else 0

    def value(self, place: Place) -> Bounds:
        """Return the value of a place from its own continuations alone.

        An unscored continuation counts as the lowest reward for the lower end and as the highest for the upper one.
        """
        if place.token is None and place.at == len(self.answer.tokens):
            return Bounds(self.answer.reward, self.answer.reward, self.answer.reward)
        counts = self.counts.get(place, Counter[float | None]())
        scored = {reward: number for reward, number in counts.items() if reward is not None}
        number = sum(scored.values())
        mean = sum(reward * count for reward, count in scored.items()) / number if number else 0.5
        if place not in self.order:
            return Bounds(mean, 0.0, 1.0)
        unscored = counts[None]
        # half of it shares alike among the places that there are, half favours those that are looked at first
        k, places = self.order[place], 3 * len(self.answer.tokens)
        alpha = self.alpha * (0.5 / places + 0.5 / (k * (k + 1)))
        if not unscored:
            return Bounds(mean, *mean_interval(scored, alpha))
        low = mean_interval(Counter(scored) + Counter({0.0: unscored}), alpha / 2)[0]
        high = mean_interval(Counter(scored) + Counter({1.0: unscored}), alpha / 2)[1]
        return Bounds(mean, low, high)

    def values(self) -> list[Bounds]:
        """Return the values of all T + 1 places of the answer.

        V(t) = p V(t + 1) + (1 - p) V(any other token), with p the chance of token t, so what is known of one place
        bounds its neighbours. The estimate of a place without continuations lies between those of its neighbours, in
        proportion to 1 - p.
        """
        own = [self.value(Place(t)) for t in range(len(self.answer.tokens) + 1)]
        low, high = [bounds.low for bounds in own], [bounds.high for bounds in own]
        for t, (other, chances) in reversed(list(enumerate(self._others()))):
            low[t] = max(low[t], min(p * low[t + 1] + (1 - p) * other.low for p in chances))
            high[t] = min(high[t], max(p * high[t + 1] + (1 - p) * other.high for p in chances))
        for t, (other, chances) in enumerate(self._others()):
            if chances[0] > 0:
                low[t + 1] = max(low[t + 1], min((low[t] - (1 - p) * other.high) / p for p in chances))
                high[t + 1] = min(high[t + 1], max((high[t] - (1 - p) * other.low) / p for p in chances))
        known = [t for t in range(len(own)) if t == len(own) - 1 or self.number(Place(t))]
        estimates = [bounds.value for bounds in own]
        for a, b in pairwise([known[0] if known else 0, *known]):
            span = self._doubt[b] - self._doubt[a]
            for t in range(a + 1, b):
                share = (self._doubt[t] - self._doubt[a]) / span if span > 0 else (t - a) / (b - a)
                estimates[t] = estimates[a] + share * (estimates[b] - estimates[a])
        return [Bounds(min(max(value, a), b), a, b) for value, a, b in zip(estimates, low, high, strict=True)]

    def _others(self) -> list[tuple[Bounds, tuple[float, float]]]:
        """Return for each token the value of any other in its place, and the limits of its chance."""
        return [(self.value(Place(t, OTHER)), chances) for t, chances in enumerate(self.answer.chance_T)]

    def advantages(self, values: Sequence[Bounds] | None = None) -> list[Bounds]:
        """Return V(t + 1) - V(t) of each token."""
        values = values or self.values()
        return [self._change(values, t, t + 1) for t in range(len(self.answer.tokens))]

    def alternative(self, t: int, values: Sequence[Bounds]) -> Bounds | None:
        """Return the advantage of the alternative to token t, V(alternative) - V(t); None if it was never sampled."""
        place = Place(t, self.answer.other_T[t] if self.answer.other_T else None)
        if place.token is None or not self.number(place):
            return None
        its = self.value(place)
        low, high = its.low - values[t].high, its.high - values[t].low
        return Bounds(min(max(its.value - values[t].value, low), high), low, high)

    def _change(self, values: Sequence[Bounds], a: int, b: int) -> Bounds:
        """Return V(b) - V(a). With P the chance of the tokens between, it is (1 - P) (V(b) - V(any other way))."""
        other = self.value(Place(a, OTHER)) if b == a + 1 else Bounds(0.5, 0.0, 1.0)
        least, most = (prod(chances[end] for chances in self.answer.chance_T[a:b]) for end in (0, 1))
        lows = [(1 - p) * (values[b].low - other.high) for p in (least, most)]
        highs = [(1 - p) * (values[b].high - other.low) for p in (least, most)]
        low, high = max(min(lows), values[b].low - values[a].high), min(max(highs), values[b].high - values[a].low)
        low, high = min(low, high), max(low, high)  # they cross only where an interval has failed, or by rounding
        return Bounds(min(max(values[b].value - values[a].value, low), high), low, high)

    def next(self, number: int) -> list[tuple[Place, int]]:
        """Return up to `number` places to continue from, the most promising first, and how many times each.

        Empty if every token is decided: its interval excludes 0, or is within `precision` of it.
        """
        values = self.values()
        open_: list[tuple[float, Place]] = []
        self._split(values)
        for a, b in pairwise(self.opened):
            change = self._change(values, a, b)
            if change.size <= self.precision:
                continue
            if b == a + 1 and change.is_decided:
                open_ += self._wanted_alternative(a, values)
                continue
            open_.append((change.size, self._wider(a, b)))
        chosen: dict[Place, None] = dict.fromkeys(place for _, place in sorted(open_, key=lambda one: -one[0]))
        return [(place, max(FIRST, self.number(place) // 2)) for place in list(chosen)[:number]]

    def _wider(self, a: int, b: int) -> Place:
        """Return the end of a stretch that is known less well. A continuation from `a` may also tell of other ways."""
        first = Place(a, OTHER) if b == a + 1 and self.answer.chance_T[a][0] > 0 else Place(a)
        widths = [bounds.high - bounds.low for bounds in map(self.value, (first, Place(b)))]
        return Place(a) if widths[0] >= widths[1] else Place(b)

    def _split(self, values: Sequence[Bounds]) -> None:
        """Open a place within each stretch whose value changes, where half of the doubt about its tokens lies."""
        more = []
        for a, b in pairwise(self.opened):
            change = self._change(values, a, b)
            sampled = min((self.number(Place(t)) for t in (a, b) if t < len(self.answer.tokens)), default=0)
            if b > a + 1 and change.size > self.precision and (change.is_decided or sampled >= LONG_SINCE):
                half = (self._doubt[a] + self._doubt[b]) / 2
                more.append(min(range(a + 1, b), key=lambda t: abs(self._doubt[t] - half)))
        self.opened = sorted({*self.opened, *more})

    def _wanted_alternative(self, t: int, values: Sequence[Bounds]) -> list[tuple[float, Place]]:
        """Return the alternative to a decided token until it has as many continuations as the token, or is decided."""
        place = Place(t, self.answer.other_T[t] if self.answer.other_T else None)
        known = self.alternative(t, values)
        enough = max(self.number(Place(t)), self.number(Place(t + 1)))
        if place.token is None or (known is not None and known.is_decided) or self.number(place) >= enough:
            return []
        return [(0.0, place)]
