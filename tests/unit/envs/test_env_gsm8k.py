from __future__ import annotations

import asyncio
import importlib.util
import time
from pathlib import Path
from typing import Any

import pytest

_spec = importlib.util.spec_from_file_location("gsm8k", Path(__file__).parents[3] / "envs" / "gsm8k.py")
assert _spec is not None
assert _spec.loader is not None
gsm8k = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(gsm8k)


def reward(action: str, gold: Any = "12") -> float:
    result = asyncio.run(gsm8k.step("q", action, {"answer": gold}))
    assert result["reward"] == result["score"]
    assert result["next_state"] is None
    assert result["done"] is True
    assert result["extra_info"] == {"answer": gold}
    return result["reward"]


@pytest.mark.parametrize(
    ("action", "gold"),
    [
        ("6*2=12\n#### 12", "12"),
        ("####12", "12"),
        ("####\n\n 12\nThat is 7 more.", "12"),
        ("#### 12.", "12"),
        ("#### 12.00", "12"),
        ("#### 012", "12"),
        ("#### +12", "12"),
        ("#### 12", 12),
        ("#### 12", "$12.0"),
        ("#### $12", "12"),
        ("#### **12** apples", "12"),
        ("#### \\boxed{12}", "12"),
        ("#### **$1,200.00** dollars", "1200"),
        ("#### 1,234,567", "1,234,567"),
        ("#### 50%", "50"),
        ("#### 50\\%", "50"),
        ("#### 1{,}200", "1200"),
        ("#### $1{,}234{,}567.5$", "1234567.5"),
        ("#### 1\\,200", "1200"),
        ("#### 1\\;200", "1200"),
        ("#### 1,\\!200", "1200"),
        ("#### 1 200", "1200"),
        ("#### 12 345 678 apples", "12345678"),
        ("#### 1\N{NO-BREAK SPACE}200", "1200"),
        ("#### 1\N{NARROW NO-BREAK SPACE}200", "1200"),
        ("#### 1200", "1{,}200"),
        ("#### .5", "0.5"),
        ("#### -$3", "-3"),
        ("#### $-3", "-3"),
        ("#### -**3**", "-3"),
        ("#### \N{MINUS SIGN}3", "-3"),
        ("#### -0", "0"),
        ("#### 5\nno, wait\n#### 12", "12"),
        ("#### 5</think>Right.\n#### 12", "12"),
        ("<think>#### 5</think>a</think>#### 12", "12"),
    ],
)
def test_right(action: str, gold: Any) -> None:
    assert reward(action, gold) == 1.0


@pytest.mark.parametrize(
    "action",
    [
        "",
        "12",
        "### 12",
        "####",
        "#### twelve",
        "#### 312",
        "#### 123",
        "#### 1 2",
        "#### 12 0",
        "#### 1 200 12",
        "#### 1{,}2",
        "#### 0 012",
        "#### 12.01",
        "#### 1.2",
        "#### .12",
        "#### -12",
        "#### - 12",
        "#### -$12",
        "#### \N{MINUS SIGN}12",
        "#### \N{EN DASH}12",
        "#### 12/5",
        "#### 5/12",
        "#### 12 or 13",
        "#### 12 12",
        "#### 12e3",
        "#### 12,00",
        "#### 1,2",
        "#### 0,012",
        "#### 12.5.3",
        "#### 6*2=12",
        "#### 12²",
        "#### 12½",
        "#### ١٢",
        "#### 12 ٣",
        "#### \N{FULLWIDTH DIGIT ONE}",
        "#### 12\r13",
        "#### 12\u202813",
        "#### 12 ####",
        "#### 12\n#### 13",
        "#### 12\n####",
        "#### 12</think>",
        "#### 12</think>So 12.",
    ],
)
def test_wrong(action: str) -> None:
    assert reward(action) == 0.0


@pytest.mark.parametrize("gold", ["", "twelve", "1/2", "12 13", None])
def test_a_gold_answer_that_is_no_number_is_an_error(gold: Any) -> None:
    with pytest.raises(ValueError, match="is not a number"):
        reward("#### 12", gold)


@pytest.mark.parametrize("unit", ["1", "*", "#", "1,11", ",111", ".", "$-", " ", "1.", "</think>", "####", "-", "\n"])
def test_a_megabyte_is_graded_at_once(unit: str) -> None:
    # the slowest takes 0.06 s; a quadratic one would take minutes
    start = time.process_time()
    assert reward("#### 1" + unit * (1_000_000 // len(unit))) == 0.0
    assert time.process_time() - start < 2


RAW = {"question": "How many?", "answer": "48/2 = <<48/2=24>>24 and <<24*50=1200>>$1,200\n#### 1,200"}


def test_example_makes_a_chat_of_a_raw_row() -> None:
    row = gsm8k.example(RAW)
    assert row["extra_info"] == {"answer": "1,200"}
    assert row["response"] == "48/2 = 24 and $1,200\n#### 1,200"
    (message,) = row["messages"]
    assert message["role"] == "user"
    assert message["content"].startswith("How many?\n")
    assert "####" in message["content"]
    assert reward(row["response"], row["extra_info"]["answer"]) == 1.0


def test_example_leaves_finished_rows_alone() -> None:
    for row in ({"prompt": "q", "extra_info": {}}, gsm8k.example(RAW)):
        assert gsm8k.example(row) is row
    with pytest.raises(ValueError, match="no number after '####'"):
        gsm8k.example({"question": "q", "answer": "12"})
