"""Claims are judged as they should be, on runs whose outcome is known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from RL2.config.load import load
from RL2.tools.eval.intervals import Estimate
from RL2.tools.reproduce import claims
from RL2.tools.reproduce.claims import SeedRun, over_seeds, verdict
from RL2.tools.reproduce.thesis import ALL, gpu_commands

Of = Callable[[int], float]
"""A value of each step."""
STEPS = 40
PROBLEMS = 100


def run(
    seed: int,
    *,
    score: Of = lambda step: 0.5,
    entropy: Of = lambda step: 0.1,
    loss: Of = lambda step: 0.1,
    length: Of = lambda step: 20.0,
    nll: float = 1.0,
) -> SeedRun:
    """Tests every ten steps; what a run measures differs a little from seed to seed."""
    rows: list[dict[str, Any]] = []
    for step in range(STEPS + 1):
        row: dict[str, Any] = {"step": step}
        if step % 10 == 0:
            row |= {"test/score": score(step), "test/nll": nll + seed * 1e-3}
        if step < STEPS:
            row["train/entropy"] = entropy(step) + seed * 1e-4 * step
            row["actor/loss"] = loss(step) + seed * 1e-4 * step
            row |= {"train/length": length(step) + seed * 0.1, "train/tokens": 1000.0 + seed}
        rows.append(row)

    def answers(share: float) -> dict[str, float]:
        return {str(n): float(n < round(share * PROBLEMS)) for n in range(PROBLEMS)}

    return SeedRun(rows, answers(score(0)), answers(score(STEPS)))


def three(**changes: Any) -> list[SeedRun]:
    return [run(seed, **changes) for seed in range(3)]


def rising(step: int) -> float:
    return 0.2 + 0.6 * step / STEPS


def falling(step: int) -> float:
    return 0.8 - 0.6 * step / STEPS


def peaked(step: int) -> float:
    return {0: 0.5, 10: 0.9, 20: 0.4, 30: 0.1, 40: 0.1}[step]


def test_a_verdict_takes_all_intervals() -> None:
    above, below, around = Estimate(2, 1, 3), Estimate(-2, -3, -1), Estimate(0.5, -1, 2)
    assert verdict([above, above]) == "holds"
    assert verdict([above, around]) == "cannot tell"
    assert verdict([around, below]) == "does not hold"


def test_the_interval_over_seeds_is_students() -> None:
    # t of 2 degrees of freedom at 95% is 4.3027; the standard error of 1, 2, 3 is 1 / sqrt(3)
    assert over_seeds([1.0, 2.0, 3.0]) == pytest.approx((2, 2 - 4.3027 / 3**0.5, 2 + 4.3027 / 3**0.5), abs=1e-3)
    assert verdict([over_seeds([5.0])]) == "cannot tell"


@pytest.mark.parametrize(
    ("score", "entropy", "expected"),
    [(rising, rising, "holds"), (rising, falling, "does not hold"), (lambda step: 0.5, rising, "cannot tell")],
)
def test_accuracy_and_entropy(score: Of, entropy: Of, expected: str) -> None:
    assert claims.rise_together("3.1", "x", three(score=score, entropy=entropy)).verdict == expected


@pytest.mark.parametrize(
    ("score", "expected"), [(peaked, "holds"), (falling, "does not hold"), (rising, "does not hold")]
)
def test_rise_and_collapse(score: Of, expected: str) -> None:
    found = claims.rises_then_collapses("3.3", "x", three(score=score))
    assert found.verdict == expected
    if score is peaked:
        assert found.measured.startswith("test accuracy at step 10, the best early one, +40.0 points")


@pytest.mark.parametrize(("loss", "expected"), [(rising, "holds"), (falling, "does not hold")])
def test_the_loss(loss: Of, expected: str) -> None:
    assert claims.loss_grows("3.1", "x", three(loss=loss)).verdict == expected


def test_tokens_to_equal_accuracy() -> None:
    """The faster one needs 10 steps for what the other reaches in 30; both sample alike."""
    fast, slow = (
        three(score=lambda step: 0.2 + 0.6 * min(step, 10) / 10),
        three(score=lambda s: 0.2 + 0.02 * min(s, 30)),
    )
    found = claims.fewer_tokens("3.1", "x", fast, slow, "y")
    assert (found.verdict, found.measured) == ("holds", "0.33 times as many (0.33 to 0.33)")
    assert claims.fewer_tokens("3.1", "x", slow, fast, "y").verdict == "does not hold"
    assert claims.fewer_tokens("3.1", "x", fast, fast, "y").verdict == "cannot tell"


def test_length_at_equal_accuracy() -> None:
    """Lengths count where both are equally good, not at the end."""
    brief = three(score=rising, length=lambda step: 10 if step < 20 else 90)
    long = three(score=lambda step: 0.2 + 0.3 * min(step, 10) / 10, length=lambda step: 20 + step % 3)
    found = claims.shorter_answers("3.1", "x", long, brief, "y")
    assert found.verdict == "holds", "long reaches its best, 0.5, at step 10; brief passes that at step 20"
    assert claims.shorter_answers("3.1", "x", brief, long, "y").verdict == "does not hold"


def test_what_the_later_sections_are_asked() -> None:
    low, high = three(entropy=lambda step: 0.05), three(entropy=lambda step: 0.2, score=rising)
    assert claims.lowers_entropy("4.2", "x", low, high).verdict == "holds"
    assert claims.lowers_entropy("4.2", "x", high, low).verdict == "does not hold"
    assert claims.more_accurate("4.3", "x", high, low, "y").verdict == "holds"
    assert (
        claims.better_likelihood("4.4", "x", three(nll=0.9), [run(s * 2, nll=1.0) for s in range(3)], "y").verdict
        == "holds"
    )


def test_the_commands_for_gpus_are_right() -> None:
    """Every one passes the door of its program; every method is judged and compared."""
    commands = list(gpu_commands(num_seeds=2, nproc=4))
    trained = [command.split() for command in commands if command.startswith("torchrun")]
    for words in trained:
        assert words[:3] == ["torchrun", "--nproc_per_node=4", "-m"]
        load(words[3].removeprefix("RL2.trainer."), words[4:])
    assert len(trained) == 2 * len(ALL)
    assert sum(command.startswith("rl2 eval") for command in commands) == 2 * (len(ALL) - 3)
    assert commands[-1].startswith("rl2 compare dr_grpo=$(echo ckpts/thesis/dr_grpo-0/evals/*),$(echo")
