"""Signs that a run is going wrong: said once, with the step to go back to."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean

WINDOW = 5
"""Steps that are averaged, so that one odd batch is no alarm."""
LOW, HIGH = 1 / 4, 4
"""Of what it was in the first steps: entropy or length below or above has collapsed or is running away."""
FEW_NATS = 0.02
"""Entropy below this has collapsed, however low it began: nearly every token is certain (p_max is at 1)."""

SATURATED = 0.995
"""Mean probability of the most likely token above this: what is sampled is nearly always that, and SPO has no loss."""


class Watch:
    """Sees each step's metrics in order, those of an interrupted run first."""

    def __init__(self, num_tests: int, save_dir: str, before: Sequence[Mapping[str, float]] = ()) -> None:
        """`num_tests`: responses of a test, which say how much its score moves by chance."""
        self.num_tests, self.save_dir = num_tests, save_dir
        self.scores: dict[int, float] = {}
        """Test scores by step."""
        self.seen: dict[str, list[float]] = {"train/entropy": [], "train/length": [], "actor/p_max": []}
        self.said: set[str] = set()
        for row in before:
            self.see(int(row["step"]), row)

    def see(self, step: int, metrics: Mapping[str, float]) -> list[str]:
        """What there is to warn of after `step`."""
        if "test/score" in metrics:
            self.scores[step] = metrics["test/score"]
        for name, values in self.seen.items():
            if name in metrics:
                values.append(metrics[name])
        found = {
            "score": self._fallen(),
            "entropy": self._moved("entropy"),
            "length": self._moved("length"),
            "p_max": self._saturated(),
        }
        new = {name: text for name, text in found.items() if text and name not in self.said}
        self.said |= new.keys()
        # what has recovered may be said again
        self.said &= {name for name, text in found.items() if text}
        return [f"step {step}: WARNING: {text}; {self._way_back()}" for text in new.values()]

    def _fallen(self) -> str:
        """The newest score is below the best by more than twice the standard error of their difference."""
        if len(self.scores) < 2:
            return ""
        best, newest = max(self.scores.values()), list(self.scores.values())[-1]
        chance = sum(max(0.0, p * (1 - p)) for p in (best, newest)) / self.num_tests
        if best - newest <= 2 * math.sqrt(chance) + 1e-9:
            return ""
        return f"the test score has fallen from {best:.3f} (step {self._best_step}) to {newest:.3f}"

    def _moved(self, name: str) -> str:
        values = self.seen[f"train/{name}"]
        if len(values) < 2 * WINDOW:
            return ""
        first, last = fmean(values[:WINDOW]), fmean(values[-WINDOW:])
        is_few = name == "entropy" and last < FEW_NATS <= first
        if is_few or last < LOW * first:
            return f"{name} has collapsed from {first:.3g} to {last:.3g}"
        return f"{name} is running away, from {first:.3g} to {last:.3g}" if last > HIGH * first else ""

    def _saturated(self) -> str:
        values = self.seen["actor/p_max"]
        if len(values) < 2 * WINDOW:
            return ""
        first, last = fmean(values[:WINDOW]), fmean(values[-WINDOW:])
        return f"p_max is saturated, {last:.4f} after {first:.4f}" if last > SATURATED >= first else ""

    @property
    def _best_step(self) -> int:
        return max(self.scores, key=lambda step: (self.scores[step], -step))

    def _way_back(self) -> str:
        if not self.scores:
            return "test the model (trainer.test_freq) to know which step was good"
        return (
            f"step {self._best_step} had the best test score: trainer.save_dir={self.save_dir} "
            "trainer.load_ckpt_from=best goes back to the best checkpoint"
        )
