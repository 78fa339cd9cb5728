"""Claims of the thesis, judged by new runs: holds, does not hold, or cannot tell.

A claim holds if every estimate it depends on has a 95% interval over seeds on the claimed side of 0, and does not hold
if one lies on the other side. Intervals over seeds are Student's; for answered problems they are those of `compare`.
With few seeds they are wide, and "cannot tell" is the correct verdict.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any, Literal, NamedTuple

from RL2.tools.eval.compare import compare
from RL2.tools.eval.intervals import Estimate, student

Verdict = Literal["holds", "does not hold", "cannot tell"]
Scores = Mapping[str, float]

EDGE_STEPS = 10
"""Number of steps over which first and last values of noisy series are averaged."""


@dataclass(frozen=True)
class SeedRun:
    """Run of one method under one seed."""

    metrics: Sequence[Mapping[str, Any]]
    """Rows of metrics.jsonl."""
    before: Scores
    """Greedy score of each held-out problem before the run."""
    after: Scores


class Claim(NamedTuple):
    """A claim of the thesis with its verdict and the measurement behind it."""

    section: str
    text: str
    verdict: Verdict
    measured: str


def verdict(estimates: Sequence[Estimate]) -> Verdict:
    """Return the verdict on the claim that all `estimates` are above 0."""
    if any(estimate.high < 0 for estimate in estimates):
        return "does not hold"
    return "holds" if all(estimate.low > 0 for estimate in estimates) else "cannot tell"


def over_seeds(values: Sequence[float], confidence: float = 0.95) -> Estimate:
    """Return the mean with Student's interval; the interval of a single value is infinite."""
    mean = fmean(values)
    if len(values) < 2:
        return Estimate(mean, -math.inf, math.inf)
    half = student(confidence, len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return Estimate(mean, mean - half, mean + half)


def rise_together(section: str, title: str, runs: Sequence[SeedRun]) -> Claim:
    """Judge whether greedy accuracy and entropy both rise during training."""
    accuracy = _accuracy([run.before for run in runs], [run.after for run in runs])
    entropy = over_seeds([change(run, "train/entropy") for run in runs])
    return Claim(
        section,
        f"{title}: accuracy and entropy rise together",
        verdict([accuracy, entropy]),
        f"greedy accuracy {_points(accuracy)}; entropy {_nats(entropy)}",
    )


def rises_then_collapses(section: str, title: str, runs: Sequence[SeedRun]) -> Claim:
    """Judge whether test accuracy rises in the first half of the steps and ends below half of the best test."""
    curves = [by_step(run) for run in runs]
    half = max(curves[0]) / 2
    early = max((step for step in curves[0] if 0 < step <= half), key=lambda step: fmean(c[step] for c in curves))
    rise = over_seeds([curve[early] - curve[0] for curve in curves])
    fall = over_seeds([max(curve.values()) / 2 - curve[max(curve)] for curve in curves])
    ends = fmean(curve[max(curve)] for curve in curves)
    return Claim(
        section,
        f"{title} rises fast, then collapses",
        verdict([rise, fall]),
        f"test accuracy at step {early}, the best early one, {_points(rise)}; at the end {ends:.1%}",
    )


def fewer_tokens(section: str, title: str, runs: Sequence[SeedRun], baseline: Sequence[SeedRun], name: str) -> Claim:
    """Compare the tokens sampled until a test first reaches the lower of the two methods' best scores."""
    ratios = []
    for run, other in zip(runs, baseline, strict=True):
        mine, theirs = (sampled_until(each, step) for each, step in _at_equal_accuracy(run, other))
        # +1: both may begin at that score, without any training
        ratios.append(math.log((mine + 1) / (theirs + 1)))
    saved = over_seeds([-ratio for ratio in ratios])
    mean, low, high = (math.exp(-x) for x in (saved.value, saved.high, saved.low))
    return Claim(
        section,
        f"{title} needs fewer sampled tokens than {name} to equal accuracy",
        verdict([saved]),
        f"{mean:.2f} times as many ({low:.2f} to {high:.2f})",
    )


def shorter_answers(section: str, title: str, runs: Sequence[SeedRun], baseline: Sequence[SeedRun], name: str) -> Claim:
    """Compare the lengths of rollouts when a test first reaches the lower of the two methods' best scores."""
    saved = []
    for run, other in zip(runs, baseline, strict=True):
        mine, theirs = (length_at(each, step) for each, step in _at_equal_accuracy(run, other))
        saved.append(theirs - mine)
    estimate = over_seeds(saved)
    return Claim(
        section,
        f"{title} answers with fewer tokens than {name} at equal accuracy",
        verdict([estimate]),
        f"{_signed(-estimate.value, 2)} tokens a response ({_range(estimate, 2, -1)})",
    )


def loss_grows(section: str, title: str, runs: Sequence[SeedRun]) -> Claim:
    """Judge whether the loss grows during training."""
    loss = over_seeds([change(run, "actor/loss") for run in runs])
    return Claim(
        section,
        f"{title}: the loss grows",
        verdict([loss]),
        f"{_signed(loss.value, 5)} ({_range(loss, 5)})",
    )


def lowers_entropy(section: str, title: str, runs: Sequence[SeedRun], without: Sequence[SeedRun]) -> Claim:
    """Compare the entropy at the end with the same method without the penalty, seed by seed."""
    lower = over_seeds(
        [last(b, "train/entropy") - last(a, "train/entropy") for a, b in zip(runs, without, strict=True)]
    )
    accuracy = _accuracy([run.after for run in without], [run.after for run in runs])
    return Claim(
        section,
        f"{title}: lower entropy than without",
        verdict([lower]),
        f"entropy {_signed(-lower.value, 3)} nats ({_range(lower, 3, -1)}); accuracy {_points(accuracy)}",
    )


def more_accurate(section: str, title: str, runs: Sequence[SeedRun], baseline: Sequence[SeedRun], name: str) -> Claim:
    """Judge whether a method is more accurate than the baseline, greedily, at the end."""
    difference = _accuracy([run.after for run in baseline], [run.after for run in runs])
    return Claim(section, f"{title} is more accurate than {name}", verdict([difference]), _points(difference))


def better_likelihood(
    section: str, title: str, runs: Sequence[SeedRun], baseline: Sequence[SeedRun], name: str
) -> Claim:
    """Compare the held-out negative log-likelihood at the same budget of tokens."""
    saved = over_seeds(
        [
            list(by_step(b, "test/nll").values())[-1] - list(by_step(a, "test/nll").values())[-1]
            for a, b in zip(runs, baseline, strict=True)
        ]
    )
    return Claim(
        section,
        f"{title} predicts held-out tokens better than {name}, at equal tokens",
        verdict([saved]),
        f"negative log-likelihood {_signed(-saved.value, 4)} nats ({_range(saved, 4, -1)})",
    )


def by_step(run: SeedRun, key: str = "test/score") -> dict[int, float]:
    """Return step -> metric of the test after that step."""
    return {row["step"]: row[key] for row in run.metrics if key in row}


def values(run: SeedRun, key: str) -> list[float]:
    """Return a metric of all steps that have it."""
    return [row[key] for row in run.metrics if key in row]


def change(run: SeedRun, key: str) -> float:
    """Return the mean of the last steps minus that of the first steps."""
    return last(run, key) - fmean(values(run, key)[:EDGE_STEPS])


def last(run: SeedRun, key: str) -> float:
    """Return the mean of a metric over the last steps."""
    return fmean(values(run, key)[-EDGE_STEPS:])


def sampled_until(run: SeedRun, step: int) -> float:
    """Return the number of tokens of all rollouts before `step`."""
    return sum(row["train/tokens"] for row in run.metrics if "train/tokens" in row and row["step"] < step)


def length_at(run: SeedRun, step: int) -> float:
    """Return the mean length of the rollouts in ten steps from `step` on, or in the last ten."""
    lengths = [(row["step"], row["train/length"]) for row in run.metrics if "train/length" in row]
    start = min(step, lengths[-1][0] - EDGE_STEPS + 1)
    return fmean(length for at, length in lengths if start <= at < start + EDGE_STEPS)


def _at_equal_accuracy(*runs: SeedRun) -> Iterator[tuple[SeedRun, int]]:
    """Yield each run with the step at which a test first reaches the lowest of the runs' best scores."""
    level = min(max(by_step(run).values()) for run in runs)
    for run in runs:
        yield run, next(step for step, score in by_step(run).items() if score >= level)


def _accuracy(first: Sequence[Scores], second: Sequence[Scores]) -> Estimate:
    found = compare(first, second)
    if found.seeds == (1, 1):  # this interval covers the two runs, not their methods
        return Estimate(found.difference, -math.inf, math.inf)
    return Estimate(found.difference, found.low, found.high)


def _points(x: Estimate) -> str:
    return f"{_signed(100 * x.value, 1)} points ({_range(Estimate(*(100 * y for y in x)), 1)})"


def _nats(x: Estimate) -> str:
    return f"{_signed(x.value, 3)} nats ({_range(x, 3)})"


def _signed(x: float, digits: int) -> str:
    return f"{x:+.{digits}f}".replace("-", "\N{MINUS SIGN}")


def _range(x: Estimate, digits: int, sign: int = 1) -> str:
    if math.isinf(x.low):
        return "one seed, no interval"
    low, high = sorted((sign * x.low, sign * x.high))
    return f"{_signed(low, digits)} to {_signed(high, digits)}"
