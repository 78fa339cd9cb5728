"""Drafts of the next tokens, and when they pay.

A token is a function of the request's seed, its position and the distribution, so a draft is right or wrong: one pass
over several positions tells, and the tokens are those of single steps. Whether to draft depends on measured times. It
changes how fast tokens come, not which.

Shapes: R rows (requests that run), K tokens of a draft.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np

from RL2.engines.embedded.history import LEVELS, History, Trail

MAX_DRAFT = 16
"""Most tokens of a draft."""
STREAKS = (1, 2, 4, 8, 16)
"""Numbers of right guesses in a row from which on the next one is counted apart."""
MEMORY = 2000.0
"""Number of guesses over which the share of right ones is taken."""
WORTH = 1.05
"""Least expected speed-up for which drafts are verified."""
TRIALS = 4
"""Verifications after which their measured cost is used."""
PATIENCE = 16
"""Steps without a draft that pays, after which guesses pause."""
PAUSE, LONGEST_PAUSE = 64, 1024
"""Steps of the first pause, and of the longest: each is twice as long as the one before."""
REFRESH = 64
"""One in so many steps is made without drafts, to measure its time."""

_PLACES_K = np.arange(MAX_DRAFT)
_BINS = np.searchsorted(STREAKS, np.arange(STREAKS[-1] + 1), side="right")
"""Number of the bin of each streak, in which guesses are counted together."""

MOST_ENDED = 64
"""Ended requests that wait to be kept together."""

Mode = Literal["auto", "always", "off"]


class Draftable(Protocol):
    """A request for which tokens can be guessed."""

    prompt: list[int]
    tokens: list[int]
    trail: Trail | None

    @property
    def length(self) -> int: ...

    @property
    def limit(self) -> int: ...


class Accuracy:
    """The probability that a guess is right, by the level of its context and the number of right ones before."""

    def __init__(self) -> None:
        self.right, self.all = (np.full((len(LEVELS) + 1, len(STREAKS) + 1), x) for x in (1.0, 2.0))
        self.all[-1] = np.inf  # no context: never right

    def chain(self, level_R: np.ndarray, streak_R: np.ndarray) -> np.ndarray:
        """Return the probability that all tokens of a draft up to each are right, [R, K]."""
        bin_RK = _BINS[np.minimum(streak_R[:, None] + _PLACES_K, STREAKS[-1])]
        return (self.right / self.all)[level_R[:, None], bin_RK].cumprod(1)

    def count(self, level_R: np.ndarray, streak_R: np.ndarray, right_R: np.ndarray, tried_R: np.ndarray) -> None:
        """Count guesses: in each row `right_R` of the first `tried_R` were right, all before the first wrong one."""
        row = np.repeat(np.arange(len(tried_R)), tried_R)
        if not len(row):
            return
        k = np.arange(len(row)) - np.repeat(tried_R.cumsum() - tried_R, tried_R)
        at = level_R[row], _BINS[np.minimum(streak_R[row] + k, STREAKS[-1])]
        np.add.at(self.all, at, 1.0)
        np.add.at(self.right, at, (k < right_R[row]).astype(float))
        decay = np.minimum(1.0, MEMORY / self.all)
        self.right *= decay
        self.all[:-1] *= decay[:-1]


@dataclass
class Cost:
    """Measured times of passes for one number of rows, rounded to a power of two."""

    plain_s: float = 0.0
    """Time of a pass without drafts; 0: not measured."""
    num_verified: int = 0
    sums: np.ndarray = field(default_factory=lambda: np.diag([0.1, 0.1]))
    products: np.ndarray = field(default_factory=lambda: np.zeros(2))
    """Decayed sums for a regression of a verification's extra time, in passes, on 1 and drafted tokens per row."""

    def note_plain(self, seconds: float) -> None:
        seconds = min(seconds, 3 * self.plain_s) if self.plain_s else seconds  # another program may have run
        self.plain_s += (seconds - self.plain_s) * (0.2 if self.plain_s else 1.0)

    def note_verified(self, seconds: float, drafted_per_row: float) -> None:
        self.num_verified += 1
        if self.num_verified == 1:  # memory, and a program that is compiled
            return
        extra = min(seconds / self.plain_s, 20.0) - 1
        x = np.array([1.0, drafted_per_row])
        self.sums = 0.97 * self.sums + np.outer(x, x)
        self.products = 0.97 * self.products + x * extra

    @property
    def extra(self) -> tuple[float, float]:
        """Extra time of a verification, in passes: a fixed part, and a part per drafted token of a row."""
        if self.num_verified <= TRIALS:
            return 0.0, 0.1
        fixed, each = np.linalg.solve(self.sums, self.products)
        return max(0.0, float(fixed)), max(0.01, float(each))


@dataclass
class Drafts:
    """Guessed tokens of R requests."""

    token_RK: np.ndarray
    """Guesses; -1: none."""
    level_R: np.ndarray
    streak_R: np.ndarray
    count_R: np.ndarray
    """Number of guesses to verify."""
    seconds: float
    """Time that guessing took."""

    def tokens(self) -> list[list[int]]:
        """Return the tokens to verify for each request."""
        return [row[:count] for row, count in zip(self.token_RK.tolist(), self.count_R.tolist(), strict=True)]

    def drop(self) -> None:
        """Leave all guesses unverified."""
        self.count_R[:] = 0


class Speculation:
    """Drafts for the requests of an engine, and what they came to."""

    def __init__(self, mode: Mode, clock: Callable[[], float]) -> None:
        """Make drafts where that pays (auto) or wherever anything is known (always); `clock` returns seconds."""
        self.mode, self.clock = mode, clock
        self.history: History | None = None
        self.accuracy = Accuracy()
        self.costs: dict[int, Cost] = {}
        self.overhead_s = 0.0
        """Time of a step that guessing takes."""
        self.steps = self.idle_steps = self.pause_left = 0
        self.next_pause = PAUSE
        self.counts: Counter[str] = Counter()
        self.ended: list[Draftable] = []
        """Requests that have ended, whose last tokens are not in the history yet."""

    def drafts(self, requests: Sequence[Draftable]) -> Drafts | None:
        """Return drafts for the requests, or None if nothing is guessed in this step."""
        if self.pause_left:
            self.pause_left -= 1
            return None
        begun = self.clock()
        self.history = self.history or History()
        trails = self._caught_up(self.history, [*requests, *self.ended])[: len(requests)]
        self.ended.clear()
        token_RK, level_R = self.history.continuations(trails, MAX_DRAFT)
        streak_R = np.array([trail.streak for trail in trails])
        chain_RK = self.accuracy.chain(level_R, streak_R)
        room_R = np.array([request.limit - request.length - 1 for request in requests])
        chain_RK[(token_RK < 0) | (room_R[:, None] <= _PLACES_K)] = 0
        count_R = (chain_RK > 0).sum(1) if self.mode == "always" else self._paying(chain_RK)
        return Drafts(token_RK, level_R, streak_R, count_R, self.clock() - begun)

    def keep(self, request: Draftable) -> None:
        """Keep the tokens of a request that ends, as drafts for others."""
        self.ended.append(request)
        if len(self.ended) >= MOST_ENDED:  # many at once cost little
            self.history = self.history or History()
            self._caught_up(self.history, self.ended)
            self.ended.clear()

    def _caught_up(self, history: History, requests: Sequence[Draftable]) -> list[Trail]:
        """Return the trails of requests, with all of their tokens in the history."""
        trails = []
        for request in requests:
            if request.trail is None:
                request.trail = history.follow(request.prompt)
            trails.append(request.trail)
        news = [
            request.tokens[trail.length - len(request.prompt) :]
            for request, trail in zip(requests, trails, strict=True)
        ]
        history.extend(trails, news)
        return trails

    def _paying(self, chain_RK: np.ndarray) -> np.ndarray:
        """Return how many tokens of each draft to verify: those that make the request faster, or none."""
        num_rows = len(chain_RK)
        cost = self._cost(num_rows)
        self.steps += 1
        count_R = np.zeros(num_rows, dtype=np.int64)
        if not cost.plain_s or self.steps % REFRESH == 0:
            return count_R
        fixed, each = cost.extra
        fixed += self.overhead_s / cost.plain_s
        speed = 1.0
        for _ in range(2):  # a guess is worth the time that a token takes, at the speed with drafts
            kept_RK = chain_RK > min(0.9, each * speed)
            gained, drafted = chain_RK[kept_RK].sum() / num_rows, kept_RK.sum() / num_rows
            speed = max(1.0, (1 + gained) / (1 + fixed + each * drafted))
        if speed >= WORTH:
            self.idle_steps, self.next_pause = 0, PAUSE
            return kept_RK.sum(1)
        self.idle_steps += 1
        if self.idle_steps >= PATIENCE:
            self.pause_left, self.next_pause = self.next_pause, min(LONGEST_PAUSE, 2 * self.next_pause)
            self.idle_steps = 0
        return count_R

    def _cost(self, num_rows: int) -> Cost:
        return self.costs.setdefault(num_rows.bit_length(), Cost())

    def learn(
        self, requests: Sequence[Draftable], drafts: Drafts | None, counts: Sequence[int], seconds: float
    ) -> None:
        """Note what a pass came to: how many tokens each request got, and its time in seconds."""
        self.counts["sampled"] += sum(counts)
        if drafts is None:
            return
        begun = self.clock()
        num_rows = len(counts)  # a request may have gone back to the queue
        guess_RK, level_R, streak_R = drafts.token_RK[:num_rows], drafts.level_R[:num_rows], drafts.streak_R[:num_rows]
        count_R, got_R = drafts.count_R[:num_rows], np.array(counts)
        # all tokens but the last equal the draft; the last may equal the next guess
        last_R = np.array([request.tokens[-1] for request in requests])
        at_R = np.minimum(got_R, MAX_DRAFT) - 1
        is_right_R = (guess_RK[np.arange(num_rows), at_R] == last_R) | (got_R > MAX_DRAFT)
        tried_R = np.minimum(got_R, (guess_RK >= 0).sum(1))
        right_R = np.minimum(got_R - 1 + is_right_R, tried_R)
        self.accuracy.count(level_R, streak_R, right_R, tried_R)
        for request, streak, right, tried in zip(
            requests, streak_R.tolist(), right_R.tolist(), tried_R.tolist(), strict=True
        ):
            assert request.trail is not None
            request.trail.streak = streak + right if right == tried else 0
        cost, drafted = self._cost(num_rows), int(count_R.sum())
        if drafted == 0:
            cost.note_plain(seconds)
        elif cost.plain_s:
            cost.note_verified(seconds, drafted / num_rows)
        self.counts["drafted"] += drafted
        self.counts["accepted"] += int((got_R - 1).sum())
        self.counts["verified"] += drafted > 0
        self.overhead_s += 0.1 * (drafts.seconds + self.clock() - begun - self.overhead_s)

    def metrics(self) -> dict[str, float]:
        """Return the metrics since the last call."""
        counts, self.counts = self.counts, Counter()
        if not counts["sampled"]:
            return {}
        return {
            "engine/drafted": counts["drafted"],
            "engine/accepted": counts["accepted"],
            "engine/accepted_share": counts["accepted"] / counts["sampled"],
        }
