"""Warnings of a run that goes wrong: when they come, when they do not, and that they come once."""

from __future__ import annotations

from random import Random

from RL2.trainer.watch import Watch


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
    watch = Watch(num_tests, "ckpts/x")
    return [text for row in of for text in watch.see(int(row["step"]), row)]


def test_a_score_that_rises_and_falls_names_the_step_to_go_back_to() -> None:
    (text,) = warnings(rows(scores=[0.2, 0.5, 0.9, 0.85, 0.1, 0.05]))
    assert text == (
        "step 3: WARNING: the test score has fallen from 0.900 (step 2) to 0.850; "
        "step 2 had the best test score: trainer.save_dir=ckpts/x trainer.load_ckpt_from=best goes back to the best "
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
    watch = Watch(500, "ckpts/x", history)
    assert not watch.see(2, {"test/score": 0.1})
    assert watch.see(3, {"test/score": 0.9}) == []
    assert len(watch.see(4, {"test/score": 0.1})) == 1
