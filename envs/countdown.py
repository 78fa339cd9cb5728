"""Countdown: reach a target with given numbers, each used exactly once, with + - * / and parentheses.

The expression is between <answer> and </answer>. A separate parser computes it in exact fractions; text of the model is
never executed. There is no partial reward, so only true solutions count as correct.
"""

from __future__ import annotations

import json
from fractions import Fraction
from typing import Any

from .arithmetic import evaluate
from .gsm8k import behind_reasoning

PROMPT = """\
Write an expression that equals {target}, with the numbers {nums}, each used exactly once. \
Allowed are + - * / and parentheses. Reason step by step, \
then give the expression between <answer> and </answer>, for example <answer>(1 + 2) / 3</answer>."""


async def step(state: str, action: str, extra_info: dict[str, Any]) -> dict[str, Any]:
    target, nums = task(extra_info)
    try:
        value, used = evaluate(answer(action, state))
        reward = float(value == Fraction(target) and sorted(used) == sorted(map(Fraction, nums)))
    except ValueError:  # not an expression
        reward = 0.0
    return {"next_state": None, "reward": reward, "score": reward, "done": True, "extra_info": extra_info}


def example(row: dict[str, Any]) -> dict[str, Any]:
    """Convert a raw row {"target", "nums"}, with or without its own prompt; a row with `extra_info` stays unchanged."""
    if row.get("extra_info") is not None or row.get("reward_model") is not None:
        return row
    target, nums = task(row)
    extra_info = {"target": target, "nums": nums}
    if "messages" in row or "prompt" in row:
        return row | {"extra_info": extra_info}
    prompt = PROMPT.format(target=target, nums=", ".join(map(str, nums)))
    return {"messages": [{"role": "user", "content": prompt}], "extra_info": extra_info}


def task(row: dict[str, Any]) -> tuple[Any, list[Any]]:
    """Return the target and the numbers, which some data sets call `numbers`."""
    nums = row["numbers"] if "numbers" in row else row["nums"]
    return row["target"], json.loads(nums) if isinstance(nums, str) else nums  # CSV


def vote(action: str) -> str:
    """Return the answer, for majority votes."""
    return answer(action)


def answer(text: str, state: str = "") -> str:
    """Return the text of the last pair of answer tags after the reasoning; empty if there is none."""
    _, mark, inside = behind_reasoning(text, state).rpartition("<answer>")
    inside, end, _ = inside.partition("</answer>")
    return inside.strip() if mark and end else ""
