"""Word problems with a calculator: the model writes <calc>12*7</calc> and reads <result>84</result>.

Let responses stop at '</calc>' (rollout.train_sampling_params.stop) and allow several turns (rollout.max_turns). The
answer is a number after `####`, graded as in gsm8k.py, and rows have the same format. Without rows, `reset` generates
problems.
"""

from __future__ import annotations

import random
import re
from decimal import Context, Decimal
from fractions import Fraction
from typing import Any

from .arithmetic import evaluate
from .gsm8k import example as gsm8k_example
from .gsm8k import step as gsm8k_step

CALL = re.compile(r"</calc>[^\w<]*$")
"""Pattern of the end of a call; a stop string may end inside a token such as `>.`."""
INSTRUCTION = """
To compute something, write it as <calc>12*7</calc>; the result follows. End with '#### ' and the answer as a number."""


async def step(state: str, action: str, extra_info: dict[str, Any]) -> dict[str, Any]:
    if not CALL.search(action):
        return await gsm8k_step(state, action, extra_info)
    next_state = f"{state}{action}<result>{calculate(action)}</result>"
    return {"next_state": next_state, "reward": 0.0, "score": 0.0, "done": False, "extra_info": extra_info}


async def reset(extra_info: dict[str, Any]) -> list[dict[str, Any]]:
    question, extra_info["answer"] = problem(extra_info["seed"])
    return [{"role": "user", "content": question + INSTRUCTION}]


def example(row: dict[str, Any]) -> dict[str, Any]:
    """Convert a raw row {"question", "answer"} to a chat; rows in the library's own formats stay unchanged."""
    if "messages" in row or "prompt" in row:
        return row
    extra_info = gsm8k_example(row)["extra_info"]
    return {"messages": [{"role": "user", "content": row["question"] + INSTRUCTION}], "extra_info": extra_info}


def problem(seed: int) -> tuple[str, str]:
    """Return a question that is hard to compute mentally, and its answer."""
    numbers = random.Random(seed)
    boxes, pieces, lost = (numbers.randint(11, 99) for _ in range(3))
    question = f"A shop has {boxes} boxes of {pieces} pieces each and sells {lost} pieces. How many pieces are left?"
    return question, str(boxes * pieces - lost)


def calculate(action: str) -> str:
    """Return the result of the last call in the form in which the model reads it."""
    _, mark, expression = CALL.sub("", action).rpartition("<calc>")
    if not mark:
        return "error: write <calc>expression</calc>"
    try:
        return decimal(evaluate(expression)[0])
    except ValueError as error:
        return f"error: {error}"


def decimal(value: Fraction) -> str:
    """Format integers exactly and other numbers to ten digits."""
    if value.denominator == 1:
        return str(value.numerator)
    context = Context(prec=10)
    return f"{context.divide(Decimal(value.numerator), Decimal(value.denominator)).normalize(context):f}"
