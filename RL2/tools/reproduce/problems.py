"""Grade-school word problems in the format of GSM8K, with solutions by a careless demonstrator.

    Ben has 12 apples. He buys 7 more. A friend takes 5. How many apples are left?

    12+7=19
    19-5=14
    #### 14

The errors of the demonstrator make the data useful for learning from reward. His mistakes depend on the wording: he
usually reads "He buys 7 more" correctly and "A friend adds 7" incorrectly, and forgets the answer format more often
after some questions than after others. A model that imitates him knows the right behaviour as a minority behaviour,
which a reward can promote. Correct demonstrations would leave only errors in arithmetic, which need more practice, not
reward.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

LARGEST = 30
"""Largest number in a problem or in a right solution."""

HELD_OUT = 10
"""Denominator of the share of calculations that is reserved for the test."""

NAMES = {
    "He": "Tom Ben Sam Jack Noah Max Leo Adam Omar Luke",
    "She": "Anna Mia Lily Emma Zoe Ella Ruby Nora Ivy Jane",
}
PEOPLE = [(name, pronoun) for pronoun, names in NAMES.items() for name in names.split()]
OBJECTS = (
    *("apples", "pens", "books", "coins", "cards", "marbles", "shells", "stamps"),
    *("cookies", "pears", "balls", "stickers", "eggs", "plums", "toys", "beads"),
)
OPENINGS = ("{name} has {x} {objects}.", "{name} starts with {x} {objects}.", "{name} finds {x} {objects}.")


class Phrase(NamedTuple):
    """A sentence of a problem."""

    text: str
    trap: float
    """Probability that the demonstrator misreads the phrase."""


EVENTS = {
    "+": (
        Phrase("{pronoun} buys {x} more.", 0.0),
        Phrase("{pronoun} finds {x} more.", 0.1),
        Phrase("{pronoun} gets {x}.", 0.3),
        Phrase("A friend adds {x}.", 0.65),
    ),
    "-": (
        Phrase("{pronoun} gives away {x}.", 0.0),
        Phrase("{pronoun} loses {x}.", 0.1),
        Phrase("{pronoun} sells {x}.", 0.3),
        Phrase("A friend takes {x}.", 0.65),
    ),
    "*": (
        Phrase("The number grows {x} times.", 0.0),
        Phrase("{pronoun} makes it {x} times as many.", 0.3),
    ),
}
QUESTIONS = (
    Phrase("How many {objects} does {name} have?", 0.1),
    Phrase("How many {objects} are there now?", 0.3),
    Phrase("How many {objects} are left?", 0.4),
    Phrase("Count the {objects} now.", 0.65),
    Phrase("What is the number of {objects}?", 0.85),
)


class Step(NamedTuple):
    """One step of a calculation."""

    operation: str
    x: int
    trap: float
    """Probability that the operation is misread."""


@dataclass(frozen=True)
class Problem:
    """A word problem with its calculation."""

    question: str
    start: int
    steps: tuple[Step, ...]
    format_trap: float
    """Probability that the answer format is forgotten."""

    @property
    def values(self) -> list[int]:
        """Number at the start and after each step."""
        values = [self.start]
        for step in self.steps:
            values.append(compute(values[-1], step.operation, step.x))
        return values

    @property
    def answer(self) -> int:
        return self.values[-1]

    @property
    def calculation(self) -> str:
        return str(self.start) + "".join(f"{step.operation}{step.x}" for step in self.steps)

    @property
    def held_out(self) -> bool:
        """True if the problem is for the test; depends only on the calculation, so no rewording of it is trained on."""
        digest = hashlib.blake2b(self.calculation.encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") % HELD_OUT == 0


def compute(a: int, operation: str, b: int) -> int:
    """Return the result of `a operation b`."""
    return {"+": a + b, "-": a - b, "*": a * b}[operation]


@dataclass(frozen=True)
class Demonstrator:
    """Simulated person who writes solutions."""

    traps: float = 1.0
    """Factor on the probability of misreading a phrase; 0 disables it."""
    slip: float = 0.02
    """Probability of a wrong result in one line."""

    def solve(self, problem: Problem, rng: Random) -> str:
        lines, value = [], problem.start
        for step in problem.steps:
            operation = step.operation
            if rng.random() < self.traps * step.trap:
                operation = misread(value, operation, step.x)
            result = compute(value, operation, step.x)
            if rng.random() < self.slip:
                result = max(0, result + rng.choice((-10, -2, -1, 1, 2, 10)))
            lines.append(f"{value}{operation}{step.x}={result}")
            value = result
        forgets = rng.random() < self.traps * problem.format_trap
        return "\n".join([*lines, f"Answer: {value}" if forgets else f"#### {value}"])


CARELESS = Demonstrator()
CAREFUL = Demonstrator(traps=0.0, slip=0.0)
"""Demonstrator whose solutions are all right."""


def misread(value: int, operation: str, x: int) -> str:
    """Return the operation that is read by mistake, unless its result would be implausible."""
    seen = {"+": "-", "-": "+", "*": "+"}[operation]
    return seen if 0 <= compute(value, seen, x) <= LARGEST else operation


def draw_problem(rng: Random, counts: Sequence[int] = (1, 2, 3), weights: Sequence[float] = (0.3, 0.4, 0.3)) -> Problem:
    """Draw a problem; its number of steps is one of `counts`, with probabilities `weights`."""
    count = rng.choices(counts, weights)[0]
    start, steps = _draw_calculation(rng, count)
    name, pronoun = rng.choice(PEOPLE)
    words = {"name": name, "pronoun": pronoun, "objects": rng.choice(OBJECTS)}

    sentences = [rng.choice(OPENINGS).format(x=start, **words)]
    traps = []
    for operation, x in steps:
        event = rng.choice(EVENTS[operation])
        sentences.append(event.text.format(x=x, **words))
        traps.append(event.trap)
    asked = rng.choice(QUESTIONS)
    sentences.append(asked.text.format(**words))
    return Problem(
        question=" ".join(sentences),
        start=start,
        steps=tuple(Step(operation, x, trap) for (operation, x), trap in zip(steps, traps, strict=True)),
        format_trap=asked.trap,
    )


def _draw_calculation(rng: Random, count: int) -> tuple[int, list[tuple[str, int]]]:
    """Draw a start and `count` steps with all results between 1 and `LARGEST`."""
    while True:
        start = value = rng.randint(3, LARGEST * 2 // 3)
        steps: list[tuple[str, int]] = []
        while len(steps) < count:
            operation = rng.choices("+-*", (4, 4, 1.5))[0]
            largest = {"+": LARGEST - value, "-": value - 1, "*": min(5, LARGEST // value)}[operation]
            if largest < 2:
                break  # nothing fits: start again, since redrawing only this step would favour small numbers
            x = rng.randint(2, largest)
            steps.append((operation, x))
            value = compute(value, operation, x)
        else:
            return start, steps


def draw_problems(
    rng: Random, count: int, *, held_out: bool, draw: Callable[[Random], Problem] = draw_problem
) -> list[Problem]:
    """Draw `count` problems, all held out for the test or none."""
    problems: list[Problem] = []
    while len(problems) < count:
        problem = draw(rng)
        if problem.held_out == held_out:
            problems.append(problem)
    return problems


def write_data(
    folder: Path,
    seed: int,
    *,
    warmup_rows: int = 32_000,
    train_rows: int = 20_480,
    test_rows: int = 512,
    draw: Callable[[Random], Problem] = draw_problem,
) -> list[str]:
    """Write warmup.jsonl (demonstrations), train.jsonl and test.jsonl (questions and answers), drawn by `draw`.

    Return the texts of the warm-up, for the tokenizer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # one generator per file, so that the size of one does not change the others
    warmup = draw_problems(Random(f"{seed} warm-up"), warmup_rows, held_out=False, draw=draw)
    train = draw_problems(Random(f"{seed} train"), train_rows, held_out=False, draw=draw)
    test = draw_problems(Random(f"{seed} test"), test_rows, held_out=True, draw=draw)

    pairs = write_demonstrations(folder / "warmup.jsonl", warmup, Random(f"{seed} demonstrator"))
    write_rows(folder / "train.jsonl", map(_row, train))
    write_rows(folder / "test.jsonl", map(_row, test))
    return [text for pair in pairs for text in pair]


def write_demonstrations(
    file: Path, problems: Sequence[Problem], rng: Random, demonstrator: Demonstrator = CARELESS
) -> list[tuple[str, str]]:
    """Write the demonstrator's solution of each problem; return pairs of question and solution."""
    pairs = [(problem.question, demonstrator.solve(problem, rng)) for problem in problems]
    write_rows(file, ({"messages": [_user(q), {"role": "assistant", "content": a}]} for q, a in pairs))
    return pairs


def _row(problem: Problem) -> dict[str, Any]:
    return {"messages": [_user(problem.question)], "extra_info": {"answer": str(problem.answer)}}


def _user(question: str) -> dict[str, str]:
    return {"role": "user", "content": question}


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows as JSON lines."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
