"""The test scores of a run: which model is the best, and when it is time to stop."""

from __future__ import annotations

from collections.abc import Iterable


class Scores:
    """Test scores, oldest first; the same on every process, so that all decide alike."""

    def __init__(self, scores: Iterable[float] = ()) -> None:
        self.scores = list(scores)

    def add(self, score: float) -> None:
        self.scores.append(score)

    @property
    def newest_is_best(self) -> bool:
        """Return whether the newest score is above all others; of equal ones the oldest is the best."""
        *before, newest = self.scores
        return not before or newest > max(before)

    @property
    def fell_twice(self) -> bool:
        """Return whether the score fell in each of the last two tests."""
        if len(self.scores) < 3:
            return False
        first, second, third = self.scores[-3:]
        return first > second > third
