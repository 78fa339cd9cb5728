"""Countdown: make a target out of given numbers, each used exactly once, with + - * / and parentheses.

The expression stands in <answer> </answer>. It is computed in exact fractions by a parser of its own: no text of the
model is ever run. There is no partial reward, so that only true solutions count as correct.
"""

from __future__ import annotations

import json
from fractions import Fraction
from typing import Any

from .arithmetic import evaluate

PROMPT = """\
Write an expression that equals {target}, with the numbers {nums}, each used exactly once. \
Allowed are + - * / and parentheses. Reason step by step, \
then give the expression between <answer> and </answer>, for example <answer>(1 + 2) / 3</answer>."""


async def step(state: str, action: str, extra_info: dict[str, Any]) -> dict[str, Any]:
    target, nums = Fraction(extra_info["target"]), sorted(Fraction(number) for number in extra_info["nums"])
    try:
        value, used = evaluate(answer(action))
        reward = float(value == target and sorted(used) == nums)
    except ValueError:  # no expression
        reward = 0.0
    return {"next_state": None, "reward": reward, "score": reward, "done": True, "extra_info": extra_info}


def example(row: dict[str, Any]) -> dict[str, Any]:
    """A raw row {"target", "nums"} as a chat; rows in the library's own formats stay as they are."""
    if "messages" in row or "prompt" in row:
        return row
    target, nums = row["target"], row["nums"]
    nums = json.loads(nums) if isinstance(nums, str) else nums  # CSV
    prompt = PROMPT.format(target=target, nums=", ".join(map(str, nums)))
    return {"messages": [{"role": "user", "content": prompt}], "extra_info": {"target": target, "nums": nums}}


def answer(text: str) -> str:
    """What stands in the last pair of answer tags behind the reasoning; empty if there is none."""
    _, mark, inside = text.rpartition("</think>")[2].rpartition("<answer>")
    inside, end, _ = inside.partition("</answer>")
    return inside.strip() if mark and end else ""
