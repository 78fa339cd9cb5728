"""Better, worse, or cannot tell: how often that is right."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from RL2.errors import ConfigError
from RL2.tools.eval.compare import compare, student
from RL2.tools.eval.evaluate import compared


@pytest.mark.parametrize(
    ("freedom", "expected"),
    [(1, 12.7062), (2, 4.30265), (3, 3.18245), (5, 2.57058), (10, 2.22814), (200, 1.97190), (1e9, 1.95996)],
)
def test_students_quantiles_are_those_of_the_tables(freedom: float, expected: float) -> None:
    assert student(0.95, freedom) == pytest.approx(expected, rel=1e-4)


def runs(rng: np.random.Generator, ability_P: np.ndarray, number: int, spread: float, samples: int = 1) -> list:
    """Return the scores of `number` runs of a method; each differs from its siblings by `spread`, in log-odds."""
    odds_P = np.log(np.clip(ability_P, 0.01, 0.99) / np.clip(1 - ability_P, 0.01, 0.99))
    made = []
    for _ in range(number):
        chance_P = 1 / (1 + np.exp(-odds_P - rng.normal(0, spread)))
        scores = rng.binomial(samples, chance_P) / samples
        made.append({f"{p}": float(score) for p, score in enumerate(scores)})
    return made


def false_verdicts(first: int, second: int, problems: int, spread: float, number: int) -> float:
    """Return the share of `number` comparisons of a method with itself that find a difference.

    Problems differ in difficulty, alike for all runs, so the scores of two runs are correlated.
    """
    rng, found = np.random.default_rng(3), 0
    for _ in range(number):
        ability_P = rng.beta(2, 1, problems)
        comparison = compare(*(runs(rng, ability_P, size, spread, 2) for size in (first, second)))
        found += comparison.verdict != "cannot tell"
    print(f"{first}:{second}, {problems} problems, spread {spread}: {found / number:.1%}")
    return found / number


@pytest.mark.parametrize(("first", "second", "spread"), [(1, 1, 0.0), (4, 1, 0.5), (3, 3, 0.5)])
def test_a_method_rarely_differs_from_itself(first: int, second: int, spread: float) -> None:
    """At 5% of 100, 9 or more come by chance in 6 of 100 tests; one that took seeds as known would find 20 to 40."""
    assert false_verdicts(first, second, 40, spread, 100) <= 0.09


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "second", "spread"),
    [(1, 1, 0.0), (1, 3, 0.1), (1, 3, 0.3), (1, 3, 1.0), (3, 3, 0.1), (3, 3, 0.3), (2, 4, 0.3)],
)
def test_a_method_rarely_differs_from_itself_in_many_comparisons(first: int, second: int, spread: float) -> None:
    """Two single runs are of equal models: the verdict on such is about the runs, and those of a spread differ."""
    assert false_verdicts(first, second, 100, spread, 500) <= 0.05


@pytest.mark.parametrize("gained", [5, 6])
def test_few_problems_that_all_improve(gained: int) -> None:
    """The exact test of signs finds a difference from six on; what would go unseen is then no 0.000."""
    before, after = ({f"{p}": score for p in range(gained)} for score in (0.0, 1.0))
    comparison = compare([before], [after])
    assert comparison.verdict == ("better" if gained == 6 else "cannot tell")
    assert comparison.smallest == 1
    same = compare([after], [after])
    assert same.verdict == "cannot tell"
    assert 0.5 < same.smallest <= 1


def test_what_is_said_of_single_runs() -> None:
    rng, ability_P = np.random.default_rng(4), np.full(20, 0.5)
    one, two, three = (runs(rng, ability_P, number, 0.0) for number in (1, 2, 3))
    assert "between these two runs (other seeds" in compare(one, one).words
    assert "over 1 and 3 runs (the single run's method is assumed to vary" in compare(one, three).words
    assert "over 2 and 3 runs;" in compare(two, three).words


def test_one_run_borrows_the_spread_of_the_others() -> None:
    """Three runs at 0.4, 0.5 and 0.6 tell nothing of one at 0.62: its method's seeds may spread as much."""
    three = [{f"{p}": float(p < share * 1000) for p in range(1000)} for share in (0.4, 0.5, 0.6)]
    one = [{f"{p}": float(p < 620) for p in range(1000)}]
    comparison = compare(three, one)
    # the spread is 0.1, Student's t of 2 degrees of freedom 4.303
    assert comparison.high - comparison.difference > 4.302 * 0.1 * (1 / 3 + 1) ** 0.5
    assert comparison.verdict == compare(one, three).verdict == "cannot tell"


def test_a_large_difference_is_found_and_a_small_one_is_admitted_to_be_hidden() -> None:
    rng = np.random.default_rng(4)
    found = {0.15: 0, 0.0: 0}
    for _ in range(80):
        ability_P = rng.uniform(0.2, 0.8, 300)
        for gain in found:
            comparison = compare(runs(rng, ability_P, 2, 0.01), runs(rng, ability_P + gain, 2, 0.01))
            found[gain] += comparison.verdict == "better"
    assert found[0.15] > 40
    assert found[0.0] < 8
    comparison = compare(runs(rng, ability_P, 1, 0.0), runs(rng, ability_P, 1, 0.0))
    assert "a difference below" in comparison.words


@pytest.mark.slow
def test_the_smallest_difference_is_found_in_four_of_five() -> None:
    rng, found, said = np.random.default_rng(5), 0, []
    for _ in range(400):
        ability_P = rng.uniform(0.2, 0.7, 200)
        said.append(compare(runs(rng, ability_P, 1, 0), runs(rng, ability_P, 1, 0)).smallest)
    for _ in range(400):
        ability_P = rng.uniform(0.2, 0.7, 200)
        found += (
            compare(runs(rng, ability_P, 1, 0), runs(rng, ability_P + float(np.mean(said)), 1, 0)).verdict == "better"
        )
    assert 0.72 <= found / 400 <= 0.88


def test_runs_of_other_problems_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="fewer than two problems"):
        compare([{"1": 1.0, "2": 0.0}], [{"3": 1.0, "2": 0.0}])


def evaluation(folder: Path, scores: dict[int, float], **question: str) -> str:
    """Write a folder as `rl2 eval` leaves it, with the greedy score of each row."""
    folder.mkdir()
    (folder / "question.json").write_text(json.dumps({"data": "d", "env": "e.py"} | question))
    record = {"sample": -1, "answer": None, "tokens": 3, "truncated": False}
    lines = [json.dumps(record | {"row": row, "score": score}) for row, score in scores.items()]
    (folder / "records.jsonl").write_text("".join(line + "\n" for line in lines))
    return f"{folder.name}={folder}"


@pytest.mark.parametrize("key", ["data", "env"])
def test_rows_of_other_data_or_another_environment_are_not_paired(key: str, tmp_path: Path) -> None:
    scores = dict.fromkeys(range(8), 1.0)
    for name, text in (("one", "1"), ("copy", "1"), ("other", "2")):
        (tmp_path / name).write_text(text)
    base, copy, other = (
        evaluation(tmp_path / f"of_{name}", scores, **{key: str(tmp_path / name)}) for name in ("one", "copy", "other")
    )
    assert "cannot tell" in compared([base, copy], "greedy")[1]
    with pytest.raises(ConfigError, match=rf"of_other has {key}=.*other and .*of_one has {key}=.*one; compare"):
        compared([base, copy, other], "greedy")
    (tmp_path / "of_copy" / "question.json").write_text("[")
    with pytest.raises(ConfigError, match=r"question\.json is damaged"):
        compared([base, copy], "greedy")


def test_problems_that_only_some_runs_have_are_counted(tmp_path: Path) -> None:
    base = evaluation(tmp_path / "a", dict.fromkeys(range(10), 1.0))
    fewer = evaluation(tmp_path / "b", dict.fromkeys(range(2, 11), 1.0))
    line = compared([base, fewer], "greedy")[1]
    assert "on 8 problems" in line
    assert "3 problems have no score in some of these runs, so the difference excludes them" in line
    assert "leaves them out" not in compared([base, base.replace("a=", "c=", 1)], "greedy")[1]
