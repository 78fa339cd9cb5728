"""Warnings of a run that goes wrong: when they come, when they do not, and that they come once."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import pytest

from RL2.trainer.alarms import Alarms


def rows(
    scores: list[float] | None = None, entropy: list[float] | None = None, length: list[float] | None = None
) -> list[dict[str, float]]:
    count = max(len(values) for values in (scores or [], entropy or [], length or []))
    named = {"test/score": scores, "train/entropy": entropy, "train/length": length}
    return [
        {"step": step} | {name: values[step] for name, values in named.items() if values is not None}
        for step in range(count)
    ]


def warnings(of: list[dict[str, float]], num_tests: int = 500) -> list[str]:
    watch = Alarms(num_tests, "ckpts/x")
    return [text for row in of for text in watch.see(int(row["step"]), row)]


def test_a_score_that_rises_and_falls_names_the_step_to_go_back_to() -> None:
    (text,) = warnings(rows(scores=[0.2, 0.5, 0.9, 0.85, 0.1, 0.05]))
    assert text == (
        "step 3: WARNING: the test score has fallen from 0.900 (step 2) to 0.850; "
        "step 2 had the best test score: trainer.save_dir=ckpts/x trainer.load_ckpt_from=best resumes from the best "
        "checkpoint"
    )


def test_chance_is_no_alarm() -> None:
    draw, alarms = Random(0), 0
    for _ in range(200):
        scores = [sum(draw.random() < 0.6 for _ in range(200)) / 200 for _ in range(4)]
        alarms += bool(warnings(rows(scores=scores), num_tests=200))
    assert alarms < 30


def test_what_recovered_may_be_warned_of_again() -> None:
    assert len(warnings(rows(scores=[0.9, 0.1, 0.1, 0.9, 0.1]))) == 2


def test_entropy_and_length() -> None:
    steady = [1.0 + 0.1 * (n % 3) for n in range(30)]
    assert not warnings(rows(entropy=steady, length=[100 * x for x in steady]))
    falling = [0.5 * 0.9**n for n in range(30)]
    (text,) = warnings(rows(entropy=falling))
    assert "entropy has collapsed from 0.41 to" in text
    assert "test the model (trainer.test_freq)" in text
    (text,) = warnings(rows(length=[50 * 1.1**n for n in range(30)]))
    assert "length is running away, from 61.1 to" in text
    (text,) = warnings(rows(entropy=[0.03] * 10 + [0.015] * 10))
    assert "entropy has collapsed from 0.03 to" in text


def test_a_resumed_run_does_not_repeat_itself() -> None:
    history = rows(scores=[0.9, 0.1])
    watch = Alarms(500, "ckpts/x", history)
    assert not watch.see(2, {"test/score": 0.1})
    assert watch.see(3, {"test/score": 0.9}) == []
    assert len(watch.see(4, {"test/score": 0.1})) == 1


HEALTHY = {
    "train/score": 0.4,
    "train/reward": 0.4,
    "train/entropy": 0.5,
    "train/length": 60.0,
    "train/truncated": 0.02,
    "actor/grad_norm": 0.7,
    "actor/tokens": 900.0,
}


def course(steps: int, seed: int = 0, **changes: Callable[[int], float]) -> list[dict[str, float]]:
    """The metrics of a run of noise around `HEALTHY`, with some of them (_ for /) as functions of the step."""
    draw = Random(seed)
    made = []
    for step in range(steps):
        row = {name: value * draw.uniform(0.8, 1.2) for name, value in HEALTHY.items()}
        row["train/reward"] = row["train/score"] = sum(draw.random() < 0.3 + 0.01 * step for _ in range(64)) / 64
        made.append({"step": step} | row | {name.replace("_", "/", 1): of(step) for name, of in changes.items()})
    return made


def said(of: list[dict[str, float]]) -> list[str]:
    watch = Alarms(500, "ckpts/x", num_train=64)
    return [text for row in of for text in watch.see(int(row["step"]), row)]


SICK: dict[str, tuple[dict[str, Callable[[int], float]], str]] = {
    "no reward": (
        {"train_score": lambda n: 0.0, "train_reward": lambda n: 0.0, "actor_grad_norm": lambda n: 0.0},
        "the gradient is 0: no response has earned a reward",
    ),
    "no reward, later": (
        {"train_reward": lambda n: float(n < 9), "actor_grad_norm": lambda n: float(n < 9)},
        "no response has earned a reward, and earlier ones did; the model may be broken; lower actor.lr",
    ),
    "nothing kept": (
        {"actor_grad_norm": lambda n: 0.0, "actor_tokens": lambda n: 0.0},
        "the gradient is 0: no response was kept to train on",
    ),
    "equal rewards": (
        {"actor_grad_norm": lambda n: 1e-10, "train_reward": lambda n: 0.25},
        "the rewards within each group are equal (mean 0.25)",
    ),
    "all cut": ({"train_truncated": lambda n: 1.0}, "100% of the responses were cut off"),
    "most cut, later": ({"train_truncated": lambda n: min(1.0, n / 15)}, "of the responses were cut off"),
    "constant reward": ({"train_score": lambda n: 0.5}, "has been 0.500 for 10 steps"),
    "all solved": ({"train_score": lambda n: 1.0}, "has been 1.000 for 10 steps"),
    "no entropy": ({"train_entropy": lambda n: 1e-5}, "the entropy is 1e-05 nats"),
    "entropy collapses": ({"train_entropy": lambda n: 0.5 * 0.7**n}, "entropy has collapsed"),
    "length runs away": ({"train_length": lambda n: 60 * 1.3**n}, "length is running away"),
    "rate too high": ({"train_score": lambda n: 0.4 * (n == 0)}, "scored 0.400 at first and 0.000"),
    "broken later": ({"train_score": lambda n: 0.3 if n < 8 else 0.0}, "the model may be broken; lower actor.lr"),
}


@pytest.mark.parametrize("case", SICK)
def test_a_sick_run_is_warned_of_within_twenty_steps_and_once(case: str) -> None:
    changes, text = SICK[case]
    found = [line for line in said(course(20, **changes)) if text in line]
    assert len(found) == 1, said(course(20, **changes))
    assert found[0].startswith("step ") and "\n" not in found[0]


def test_a_healthy_run_is_not_warned_of() -> None:
    for seed in range(100):
        assert said(course(60, seed)) == []


def test_low_scores_of_a_few_responses_are_no_alarm() -> None:
    for seed in range(100):
        draw = Random(seed)
        scores = [sum(draw.random() < 0.05 for _ in range(64)) / 64 for _ in range(60)]
        assert not [line for line in said(course(60, seed, train_score=scores.__getitem__)) if "broken" in line]


def test_a_step_without_a_gradient_now_and_then_is_none() -> None:
    assert said(course(60, actor_grad_norm=lambda n: float(n % 3 > 0))) == []


def test_equal_scores_of_self_play_are_no_alarm_while_roles_differ() -> None:
    rows = [row | {"train/score": 0.0, "train/reward/first": 0.1 * row["step"]} for row in course(20)]
    assert not [line for line in said(rows) if "worth the same" in line]
