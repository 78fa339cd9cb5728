"""Arithmetic that models write is computed exactly or refused; Countdown rewards true solutions only."""

from __future__ import annotations

import asyncio
import time
from fractions import Fraction
from typing import Any

import pytest

from envs import arithmetic, countdown


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", 1),
        (" 1 + 2*3 ", 7),
        ("(1+2)*3", 9),
        ("2-3-4", -5),
        ("8/4/2", 1),
        ("1/3*3", 1),
        ("-(2+3)*-4", 20),
        ("--3", 3),
        ("0.1+0.2", Fraction(3, 10)),
        ("007", 7),
        ("6÷2", 3),
        ("2\u00d73", 6),
        ("2\N{MINUS SIGN}3", -1),
        ("(" * 20 + "1" + ")" * 20, 1),
        ("9" * 200, 10**200 - 1),
    ],
)
def test_an_expression_is_computed_exactly(text: str, value: Any) -> None:
    assert arithmetic.evaluate(text)[0] == value


def test_the_numbers_of_an_expression_are_told() -> None:
    assert arithmetic.evaluate("3*(12-3)/-5")[1] == [3, 12, 3, 5]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a number is missing at the end"),
        ("1+", "a number is missing at the end"),
        ("*1", r"a number is missing before '\*'"),
        ("2**3", r"a number is missing before '\*'"),
        ("7//2", "a number is missing before '/'"),
        ("1 2", "'2' is out of place"),
        ("(1)(2)", r"'\(' is out of place"),
        ("1)", r"'\)' is out of place"),
        ("(1", "a parenthesis is not closed"),
        ("()", r"a number is missing before '\)'"),
        ("1/0", "division by zero"),
        ("1/(2-2)", "division by zero"),
        ("2^3", r"'\^' does not belong"),
        ("1e9", "'e' does not belong"),
        ("0x10", "'x' does not belong"),
        ("1_000", "'_' does not belong"),
        ("1,000", "',' does not belong"),
        ("1.", r"'\.' does not belong"),
        (".5", r"'\.' does not belong"),
        ("1.2.3", r"'\.' does not belong"),
        ("5!", "'!' does not belong"),
        ("x", "'x' does not belong"),
        ("__import__('os')", "'_' does not belong"),
        ("\u0661\u0662", "does not belong"),
        ("\N{FULLWIDTH DIGIT ONE}", "does not belong"),
        ("2\u00b2", "does not belong"),
        ("(" * 21 + "1" + ")" * 21, "nested at most 20 deep"),
        ("-" * 22 + "1", "nested at most 20 deep"),
        ("1" * 201, "at most 200 characters"),
    ],
)
def test_what_is_no_expression_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        arithmetic.evaluate(text)


def reward(action: str, target: Any = 98, nums: Any = (44, 19, 35)) -> float:
    extra_info = {"target": target, "nums": list(nums)}
    result = asyncio.run(countdown.step("q", action, extra_info))
    assert result["reward"] == result["score"]
    assert (result["next_state"], result["done"], result["extra_info"]) == (None, True, extra_info)
    return result["reward"]


@pytest.mark.parametrize(
    ("action", "target", "nums"),
    [
        ("<answer>44+19+35</answer>", 98, (44, 19, 35)),
        ("<answer> (35 + 19)\n+ 44 </answer>\n", 98, (44, 19, 35)),
        ("<think><answer>1</answer></think><answer>35+44+19</answer>", 98, (44, 19, 35)),
        ("<answer>1</answer> no: <answer>35+44+19</answer>", 98, (44, 19, 35)),
        ("<answer>8/(3-8/3)</answer>", 24, (3, 3, 8, 8)),
        ("<answer>5</answer>", 5, (5,)),
    ],
)
def test_a_solution(action: str, target: int, nums: tuple[int, ...]) -> None:
    assert reward(action, target, nums) == 1.0


@pytest.mark.parametrize(
    "action",
    [
        "",
        "44+19+35",
        "<answer></answer>",
        "<answer>98</answer>",
        "<answer>44+19+34</answer>",
        "<answer>44+35+19+19-19</answer>",
        "<answer>44+54</answer>",
        "<answer>44+19+35+0</answer>",
        "<answer>44+19+3*5</answer>",
        "<answer>44+19+35 = 98</answer>",
        "<answer>44+19+35",
        "44+19+35</answer>",
        "<answer>44+19+35</answer><answer>",
        "<answer>44+19+35</answer></think>",
        "<answer>44+19+35</answer><answer>1</answer>",
        "<answer>max(44+19+35,0)</answer>",
        "<answer>44+19+35#</answer>",
    ],
)
def test_no_solution(action: str) -> None:
    assert reward(action) == 0.0


def test_a_row_that_says_no_task_is_an_error() -> None:
    with pytest.raises(KeyError, match="nums"):
        asyncio.run(countdown.step("q", "<answer>1</answer>", {}))


@pytest.mark.parametrize("unit", ["<answer>", "</answer>", "(", "1+", "9", "</think>", "-"])
def test_a_megabyte_is_graded_at_once(unit: str) -> None:
    start = time.process_time()
    assert reward("<answer>" + unit * (1_000_000 // len(unit)) + "</answer>") == 0.0
    assert time.process_time() - start < 2


def test_example_makes_a_chat_of_a_raw_row() -> None:
    row = countdown.example({"target": 98, "nums": [44, 19, 35]})
    assert row["extra_info"] == {"target": 98, "nums": [44, 19, 35]}
    (message,) = row["messages"]
    assert "98" in message["content"] and "44, 19, 35" in message["content"] and "<answer>" in message["content"]
    assert countdown.example({"target": "98", "nums": "[44, 19, 35]"})["extra_info"]["nums"] == [44, 19, 35]
    assert countdown.example(row) is row
    own = countdown.example({"prompt": "q", "target": 98, "numbers": [44, 19, 35]})
    assert (own["prompt"], own["extra_info"]) == ("q", row["extra_info"])
    assert asyncio.run(countdown.step("q", "<answer>44+19+35</answer>", {"target": 98, "numbers": [44, 19, 35]}))[
        "reward"
    ]
