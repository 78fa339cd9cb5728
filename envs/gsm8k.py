"""GSM8K: grade-school mathematics with a number as the answer, written after `####`.

An answer counts only if it is the correct *number*: 312 is not 12, 12.0 and $12 are.
"""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Any

INSTRUCTION = "\nReason step by step. End with '#### ' and the answer as a number."

# thousands separators count only where they are well-formed: "12,00" leaves digits over and is no number
NUMBER = re.compile(r"(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+")
SEPARATOR = re.compile(r"(?<=[0-9])(?:\{,\}|\\[,; !]|,\\!|[ \u00a0\u2009\u202f])(?=[0-9]{3}(?![0-9]))")
"""Separators of thousands in LaTeX, 1{,}000 and 1\\,000, and in many languages, 1 000."""
ANNOTATION = re.compile(r"<<[^<>]*>>")
"""The calculator annotations of the data set, as in 48/2=<<48/2=24>>24."""


async def step(state: str, action: str, extra_info: dict[str, Any]) -> dict[str, Any]:
    gold = number(str(extra_info["answer"]))
    if gold is None:
        raise ValueError(f"the answer {extra_info['answer']!r} of the data set is not a number")
    reward = float(number(answer(action, state)) == gold)
    return {"next_state": None, "reward": reward, "score": reward, "done": True, "extra_info": extra_info}


def example(row: dict[str, Any]) -> dict[str, Any]:
    """Convert a raw row {"question", "answer"}, or one of SVAMP, to a chat; other rows stay unchanged."""
    if row.get("messages") is not None or row.get("prompt") is not None:
        return row
    if "Body" in row and "Question" in row:
        content = f"{row['Body']} {row['Question']}{INSTRUCTION}"
        return {"messages": [{"role": "user", "content": content}], "extra_info": {"answer": str(row["Answer"])}}
    mark, gold = row["answer"].rpartition("####")[1:]
    if not mark or number(gold) is None:
        raise ValueError(f"no number after '####' in the answer {row['answer']!r}")
    return {
        "messages": [{"role": "user", "content": row["question"] + INSTRUCTION}],
        "response": ANNOTATION.sub("", row["answer"]),
        "extra_info": {"answer": gold.strip()},
    }


def vote(action: str) -> str:
    """Return the answer in a canonical form for majority votes: equal numbers are equal."""
    value = number(answer(action))
    return "" if value is None else f"{value.normalize():f}"


def answer(text: str, state: str = "") -> str:
    """Return the first line after the last `####` that follows the reasoning; empty if there is none."""
    _, mark, after = behind_reasoning(text, state).rpartition("####")
    return after.lstrip().partition("\n")[0] if mark else ""


def behind_reasoning(action: str, state: str = "") -> str:
    """Return the part of `action` after its reasoning; empty if the reasoning is never closed."""
    return "" if is_unclosed(action, state) else action.rpartition("</think>")[2]


def is_unclosed(action: str, state: str = "") -> bool:
    """Return whether `action` never closes reasoning that it or `state` opened.

    Chat templates of some models end the prompt, here `state`, with <think>.
    """
    if state.rstrip().endswith("<think>"):
        action = f"<think>{action}"
    return "<think>" in action.rpartition("</think>")[2]


def number(line: str) -> Decimal | None:
    """Return the only number on a line; None if there is none, a second one, or any other digit."""
    line = SEPARATOR.sub(",", line)
    found = NUMBER.search(line)
    if found is None:
        return None
    before, after = line[: found.start()], line[found.end() :]
    if any(character.isnumeric() for character in before + after):
        return None
    # a sign may stand before the currency or the bold marks: -$12, -**12**
    negative = before.rstrip(" \t$*\\(").endswith(("-", "\N{MINUS SIGN}", "\N{EN DASH}"))
    value = Decimal(found[0].replace(",", ""))
    return value.copy_negate() if negative else value
