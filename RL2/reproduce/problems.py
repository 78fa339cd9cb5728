"""Grade-school word problems in the format of GSM8K, and a careless person who solves them.

    Ben has 12 apples. He buys 7 more. A friend takes 5. How many apples are left?

    12+7=19
    19-5=14
    #### 14

What makes the data worth learning from is how the demonstrator errs. His mistakes hang on the wording: he reads "He
buys 7 more" right and "A friend adds 7" mostly wrong, and forgets the answer format after some questions more than
after others. A model that imitates him knows the right habit as a minority habit, so a reward has something to promote.
Correct demonstrations would leave only slips in arithmetic, and those take more practice, not reward.
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
"""No number in a problem or in a right solution is larger."""

HELD_OUT = 10
"""One calculation in so many is kept for the test."""

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
    text: str
    trap: float
    """How often the demonstrator goes wrong at it."""


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
    operation: str
    x: int
    trap: float
    """How often its operation is misread."""


@dataclass(frozen=True)
class Problem:
    question: str
    start: int
    steps: tuple[Step, ...]
    format_trap: float
    """How often the answer format is forgotten."""

    @property
    def values(self) -> list[int]:
        """The number at the start and after each step."""
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
        """Decided by the calculation alone, so that no other wording of a test problem is ever trained on."""
        digest = hashlib.blake2b(self.calculation.encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") % HELD_OUT == 0


def compute(a: int, operation: str, b: int) -> int:
    return {"+": a + b, "-": a - b, "*": a * b}[operation]


@dataclass(frozen=True)
class Demonstrator:
    """Someone who writes solutions."""

    traps: float = 1.0
    """Scales how often a phrase traps him; 0: never."""
    slip: float = 0.02
    """Chance of a wrong result in one line."""

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


def misread(value: int, operation: str, x: int) -> str:
    """The operation he sees instead, unless its result would be too odd to believe."""
    seen = {"+": "-", "-": "+", "*": "+"}[operation]
    return seen if 0 <= compute(value, seen, x) <= LARGEST else operation


def draw_problem(rng: Random, counts: Sequence[int] = (1, 2, 3), weights: Sequence[float] = (0.3, 0.4, 0.3)) -> Problem:
    """A problem of so many steps as `counts` says, each number as often as `weights` says."""
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
    """A start and `count` steps whose every result lies between 1 and `LARGEST`."""
    while True:
        start = value = rng.randint(3, LARGEST * 2 // 3)
        steps: list[tuple[str, int]] = []
        while len(steps) < count:
            operation = rng.choices("+-*", (4, 4, 1.5))[0]
            largest = {"+": LARGEST - value, "-": value - 1, "*": min(5, LARGEST // value)}[operation]
            if largest < 2:
                break  # nothing fits here: begin anew, since another draw of the same step would favour small numbers
            x = rng.randint(2, largest)
            steps.append((operation, x))
            value = compute(value, operation, x)
        else:
            return start, steps


def draw_problems(
    rng: Random, count: int, *, held_out: bool, draw: Callable[[Random], Problem] = draw_problem
) -> list[Problem]:
    problems: list[Problem] = []
    while len(problems) < count:
        problem = draw(rng)
        if problem.held_out == held_out:
            problems.append(problem)
    return problems


def write_data(
    folder: Path, seed: int, *, warmup_rows: int = 32_000, train_rows: int = 20_480, test_rows: int = 512
) -> list[str]:
    """Write warmup.jsonl (demonstrations), train.jsonl and test.jsonl (questions and answers).

    Returns the texts of the warm-up, for the tokenizer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # a generator of its own for each file: changing the size of one leaves the others as they are
    warmup = draw_problems(Random(f"{seed} warm-up"), warmup_rows, held_out=False)
    train = draw_problems(Random(f"{seed} train"), train_rows, held_out=False)
    test = draw_problems(Random(f"{seed} test"), test_rows, held_out=True)

    pairs = write_demonstrations(folder / "warmup.jsonl", warmup, Random(f"{seed} demonstrator"))
    write_rows(folder / "train.jsonl", map(_row, train))
    write_rows(folder / "test.jsonl", map(_row, test))
    return [text for pair in pairs for text in pair]


def write_demonstrations(file: Path, problems: Sequence[Problem], rng: Random) -> list[tuple[str, str]]:
    """A careless solution of each problem; returns the questions with them."""
    demonstrator = Demonstrator()
    pairs = [(problem.question, demonstrator.solve(problem, rng)) for problem in problems]
    write_rows(file, ({"messages": [_user(q), {"role": "assistant", "content": a}]} for q, a in pairs))
    return pairs


def _row(problem: Problem) -> dict[str, Any]:
    return {"messages": [_user(problem.question)], "extra_info": {"answer": str(problem.answer)}}


def _user(question: str) -> dict[str, str]:
    return {"role": "user", "content": question}


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
