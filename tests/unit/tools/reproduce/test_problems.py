"""The demo's word problems, its demonstrator and its tokenizer."""

from __future__ import annotations

import json
import re
from pathlib import Path
from random import Random

import pytest

from RL2.tools.reproduce.model import build_tokenizer
from RL2.tools.reproduce.problems import LARGEST, Demonstrator, Problem, Step, draw_problems, misread, write_data

CAREFUL = Demonstrator(traps=0.0, slip=0.0)


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def problems() -> list[Problem]:
    return draw_problems(Random(1), 2000, held_out=False)


def test_a_careful_demonstrator_is_always_right(problems: list[Problem]) -> None:
    for problem in problems:
        *lines, last = CAREFUL.solve(problem, Random(0)).split("\n")
        value = problem.start
        for line, step in zip(lines, problem.steps, strict=True):
            left, right = line.split("=")
            assert left == f"{value}{step.operation}{step.x}"
            value = int(right)
            assert value == eval(left)
        assert last == f"#### {value}" == f"#### {problem.answer}"


def test_every_number_is_in_range_and_stands_in_the_question(problems: list[Problem]) -> None:
    for problem in problems:
        assert 1 <= len(problem.steps) <= 3
        assert all(1 <= value <= LARGEST for value in problem.values)
        said = [int(digits) for digits in re.findall(r"\d+", problem.question)]
        assert said == [problem.start, *(step.x for step in problem.steps)]


def test_the_careless_demonstrator_errs_where_the_wording_traps_him() -> None:
    plain = Problem("", 12, (Step("+", 7, 0.0),), format_trap=0.0)
    trapped = Problem("", 12, (Step("+", 7, 0.65),), format_trap=0.85)
    rng, demonstrator = Random(0), Demonstrator(slip=0.0)
    assert {demonstrator.solve(plain, rng) for _ in range(200)} == {"12+7=19\n#### 19"}
    solutions = [demonstrator.solve(trapped, rng) for _ in range(2000)]
    assert sum("12-7=5" in s for s in solutions) / 2000 == pytest.approx(0.65, abs=0.04)
    assert sum("Answer: " in s for s in solutions) / 2000 == pytest.approx(0.85, abs=0.03)


def test_a_misreading_stays_believable() -> None:
    assert misread(12, "+", 7) == "-"
    assert misread(5, "+", 7) == "+"  # 5 - 7 would be negative
    assert misread(28, "-", 7) == "-"  # 28 + 7 would be too large


def test_held_out_problems_share_no_calculation_with_the_others(tmp_path: Path) -> None:
    rng = Random(0)
    seen = {problem.calculation for problem in draw_problems(rng, 3000, held_out=False)}
    held = {problem.calculation for problem in draw_problems(rng, 500, held_out=True)}
    assert not seen & held

    # and the files keep to it: no question of the test stands among the others
    write_data(tmp_path, 0, warmup_rows=500, train_rows=500, test_rows=64)
    assert not {row["messages"][0]["content"] for row in read(tmp_path / "test.jsonl")} & {
        row["messages"][0]["content"] for name in ("warmup", "train") for row in read(tmp_path / f"{name}.jsonl")
    }


def test_same_seed_same_data(tmp_path: Path) -> None:
    for folder, seed in (("a", 3), ("b", 3), ("c", 4)):
        write_data(tmp_path / folder, seed, warmup_rows=50, train_rows=50, test_rows=20)
    for name in ("warmup.jsonl", "train.jsonl", "test.jsonl"):
        a, b, c = ((tmp_path / folder / name).read_text() for folder in "abc")
        assert a == b != c


def test_rows_are_what_the_programs_read(tmp_path: Path) -> None:
    texts = write_data(tmp_path, 0, warmup_rows=20, train_rows=30, test_rows=10)
    warmup, train, test = (read(tmp_path / f"{name}.jsonl") for name in ("warmup", "train", "test"))
    assert (len(warmup), len(train), len(test), len(texts)) == (20, 30, 10, 40)
    assert [message["role"] for message in warmup[0]["messages"]] == ["user", "assistant"]
    assert [message["role"] for message in train[0]["messages"]] == ["user"]
    assert all(1 <= int(row["extra_info"]["answer"]) <= LARGEST for row in train + test)


def test_the_tokenizer_gives_texts_back_and_keeps_prompts_short(problems: list[Problem]) -> None:
    rng, demonstrator = Random(0), Demonstrator()
    solutions = [demonstrator.solve(problem, rng) for problem in problems]
    tokenizer = build_tokenizer([problem.question for problem in problems] + solutions)
    for text in [problems[0].question, solutions[0], "Größe: 10³ 🙂\n\t<b>"]:
        assert tokenizer.decode(tokenizer.encode(text)) == text

    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": problem.question}], add_generation_prompt=True, return_dict=False
        )
        for problem in problems[:300]
    ]
    assert 30 <= sum(map(len, prompts)) / len(prompts) <= 40
    assert max(map(len, prompts)) <= 48
    assert max(len(tokenizer.encode(solution)) + 1 for solution in solutions) <= 36
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.decode(prompts[0]).startswith("<|im_start|>user\n")
    assert tokenizer.decode(prompts[0]).endswith("<|im_end|>\n<|im_start|>assistant\n")
