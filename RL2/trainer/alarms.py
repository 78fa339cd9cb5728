"""Signs that a run learns nothing or goes wrong: said once, with what to do or the step to go back to."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean

WINDOW = 5
"""Steps that are averaged, so that one odd batch is no alarm."""
LOW, HIGH = 1 / 4, 4
"""Bounds relative to the first steps: entropy or length below has collapsed, above is running away."""
FEW_NATS = 0.02
"""Entropy below this has collapsed, however low it began: nearly every token is certain (p_max is at 1)."""

NO_NATS = 1e-3
"""Entropy at or below which all samples of a prompt are alike."""

SATURATED = 0.995
"""Mean probability of the most likely token above this: what is sampled is nearly always that, and SPO has no loss."""

SEEN = (
    *("train/entropy", "train/length", "train/truncated", "train/score", "train/reward"),
    *("actor/p_max", "actor/grad_norm", "actor/tokens"),
)
"""Metrics that are looked at."""
PART = "/reward/"
"""Prefix, in names of metrics, of the parts of the reward."""
FEW = 3
"""Steps in a row without a gradient, or without the score of before, that are no chance."""
NO_GRADIENT = 1e-8
"""Norm at or below which a gradient is rounding."""
CONSTANT = 10
"""Steps in a row with one and the same score."""
MANY_CUT = 1 / 2
"""Share of truncated responses above which training is about what was cut off."""


class Alarms:
    """Checks of each step's metrics, in order; those of an interrupted run come first."""

    def __init__(
        self,
        num_tests: int,
        save_dir: str,
        before: Sequence[Mapping[str, float]] = (),
        num_train: int = 0,
        weights: Iterable[str] = (),
        is_rewarded: bool = True,
    ) -> None:
        """Take the numbers of responses of a test and of a step: they say how much scores move by chance.

        `weights`: the parts of the reward that have one in the configuration. `is_rewarded`: something judges
        responses, so that equal scores are news.
        """
        self.is_rewarded = is_rewarded
        self.num_tests, self.num_train, self.save_dir, self.weights = num_tests, num_train, save_dir, set(weights)
        self.parts: set[str] = set()
        """Parts of the reward that any response has had."""
        self.scores: dict[int, float] = {}
        """Test scores by step."""
        self.seen: dict[str, list[float]] = {name: [] for name in SEEN}
        self.worth: list[dict[str, float]] = []
        """Score and parts of the reward of each step; in self-play the rewards of roles move where the score cannot."""
        self.said: set[str] = set()
        for row in before:
            self.see(int(row["step"]), row)

    def see(self, step: int, metrics: Mapping[str, float]) -> list[str]:
        """Return the warnings after `step`, a line each; a warning is repeated only after its cause had gone."""
        if "test/score" in metrics:
            self.scores[step] = metrics["test/score"]
        self.parts |= {name.split(PART)[1] for name in metrics if PART in name}
        if "train/score" in metrics:
            worth = {name: x for name, x in metrics.items() if name.startswith(f"train{PART}")}
            self.worth.append(worth | {"score": metrics["train/score"]})
        for name, values in self.seen.items():
            if name in metrics:
                values.append(metrics[name])
        drifted = {
            "score": self._fallen(),
            "entropy": self._moved("entropy"),
            "length": self._moved("length"),
            "p_max": self._saturated(),
        }
        found = {name: text and f"{text}; {self._way_back()}" for name, text in drifted.items()} | {
            "gradient": self._without_gradient(),
            "truncated": self._cut(),
            "constant": self._constant() if self.is_rewarded and not self._without_gradient() else "",
            "certain": self._certain(),
            "broken": self._broken(),
            "weights": self._without_part(),
        }
        new = {name: text for name, text in found.items() if text and name not in self.said}
        self.said |= new.keys()
        # what has recovered may be said again
        self.said &= {name for name, text in found.items() if text}
        return [f"step {step}: WARNING: {text}" for text in new.values()]

    def _without_gradient(self) -> str:
        """Return a warning of steps without a gradient, with the most likely cause."""
        norms, rewards, tokens = (self.seen[name] for name in ("actor/grad_norm", "train/reward", "actor/tokens"))
        if len(norms) < FEW or max(norms[-FEW:]) > NO_GRADIENT:
            return ""
        if rewards and not any(rewards[-FEW:]):
            why = "no response has earned a reward"
            what = "check in samples.jsonl whether any should have; use easier rows or a model that solves some"
            if any(rewards):
                why, what = f"{why}, and earlier ones did", "the model may be broken; lower actor.lr"
        elif tokens and not any(tokens[-FEW:]):
            why = "no response was kept to train on"
            what = "see actor.train_on, actor.select and rollout.overlong_filtering"
        else:
            why = f"the rewards within each group are equal (mean {fmean(rewards[-FEW:]) if rewards else 0:.3g})"
            what = "raise train_data.responses_per_prompt, or use rows that are solved sometimes"
        return f"nothing was learnt in the last {FEW} steps, the gradient is 0: {why}; {what}"

    def _without_part(self) -> str:
        """Return a warning of weights of parts that no response has had; mostly the name is misspelt."""
        if not (idle := sorted(self.weights - self.parts)):
            return ""
        have = (
            f"parts are {', '.join(sorted(self.parts))}" if self.parts else "it has no parts: `step` returns a number"
        )
        return f"{', '.join(f'reward.weights.{name}' for name in idle)} weighs no part of any reward so far; {have}"

    def _cut(self) -> str:
        shares = self.seen["train/truncated"][-WINDOW:]
        if len(shares) < WINDOW or fmean(shares) <= MANY_CUT:
            return ""
        return (
            f"{fmean(shares):.0%} of the responses were cut off at a length limit; raise "
            "rollout.train_sampling_params.max_new_tokens, or ask for shorter answers"
        )

    def _constant(self) -> str:
        last = self.worth[-CONSTANT:]
        if len(last) < CONSTANT or any(each != last[0] for each in last):
            return ""
        score = last[0]["score"]
        return (
            f"the score of the responses has been {score:.3f} for {CONSTANT} steps: all are worth the same, and "
            "these rows, or this environment, teach nothing more"
        )

    def _certain(self) -> str:
        entropy = self.seen["train/entropy"][-WINDOW:]
        if len(entropy) < WINDOW or fmean(entropy) > NO_NATS:
            return ""
        return (
            f"the entropy is {fmean(entropy):.2g} nats: the samples of a prompt are nearly identical; raise "
            "rollout.train_sampling_params.temperature, or start from a model that is less certain"
        )

    def _broken(self) -> str:
        """Return a warning if the last steps score less than a tenth of the first ones, beyond chance."""
        scores = self.seen["train/score"]
        if len(scores) <= FEW or not self.num_train:
            return ""
        first, last = max(scores[: min(FEW, len(scores) - FEW)]), fmean(scores[-FEW:])
        chance = max(0.0, first * (1 - first)) / self.num_train
        if last > first / 10 or first <= 4 * math.sqrt(chance):
            return ""
        return (
            f"the responses scored {first:.3f} at first and {last:.3f} in the last {FEW} steps: the model may be "
            "broken; lower actor.lr"
        )

    def _fallen(self) -> str:
        """Return a warning if the newest score is below the best by more than chance (two standard errors)."""
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
            "trainer.load_ckpt_from=best resumes from the best checkpoint"
        )
