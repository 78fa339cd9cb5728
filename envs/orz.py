r"""Mathematics with any kind of answer, as in Open-Reasoner-Zero: in \boxed{ } or <answer> </answer>.

The library math-verify compares answers as mathematics (pip install 'rl2-spo[math]'). It may not terminate on a model's
text, so it runs in processes that are killed after a time limit; the trajectory is then unscored.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from typing import Any

from .gsm8k import SEPARATOR, behind_reasoning
from .workers import Workers

if importlib.util.find_spec("math_verify") is None:
    raise ModuleNotFoundError("it needs math-verify: pip install 'rl2-spo[math]'")

INSTRUCTION = "\nReason step by step. Give the final answer within \\boxed{}."
PERCENT = re.compile(r"\s*\\?%\s*$")
LONGEST = 500
"""Limit in characters of an answer; longer text is not an answer."""

grade = Workers(__file__, "make_grader", limit_s=5)


async def step(state: str, action: str, extra_info: dict[str, Any]) -> dict[str, Any]:
    given = answer(action, state)
    reward = 0.0
    if given and len(given) <= LONGEST:
        reward = float(await grade(str(extra_info["answer"]), given))
    return {"next_state": None, "reward": reward, "score": reward, "done": True, "extra_info": extra_info}


def example(row: dict[str, Any]) -> dict[str, Any]:
    """Convert a raw row {"question" or "problem", "answer"} to a chat, or keep its own prompt with "answer" or "label".

    Rows of the original data set, [{"value": question}, {"ground_truth": {"value": answer}}], have the columns "0" and
    "1". The answer may also be boxed in a "solution" (MATH), or in the columns of SVAMP and AQuA. A row with
    `extra_info` or `reward_model` stays unchanged.
    """
    if row.get("extra_info") is not None or row.get("reward_model") is not None:
        return row
    row = {key: value for key, value in row.items() if value is not None}
    if "Body" in row and "Question" in row:
        row = {"question": f"{row['Body']} {row['Question']}", "answer": row["Answer"]}
    if "options" in row and "correct" in row:
        row = {"question": "\n".join([row["question"], *row["options"]]), "answer": row["correct"]}
    if "answer" not in row and "label" in row:
        row["answer"] = row["label"]
    if "answer" not in row and "solution" in row:
        row["answer"] = boxed(row["solution"])
        if not row["answer"]:
            raise ValueError("the solution has nothing boxed")
    # some data sets repeat the question and its solution as `messages`
    if "prompt" in row or ("messages" in row and "problem" not in row and "question" not in row):
        return row | {"extra_info": {"answer": str(row["answer"])}}
    if "0" in row:
        question, gold = row["0"]["value"], row["1"]["ground_truth"]["value"]
    else:
        question, gold = row["question"] if "question" in row else row["problem"], row["answer"]
        gold = str(gold).rpartition("####")[2].strip()  # GSM8K
    return {"messages": [{"role": "user", "content": question + INSTRUCTION}], "extra_info": {"answer": str(gold)}}


def vote(action: str) -> str:
    """Return the answer, for majority votes."""
    return answer(action)


def answer(text: str, state: str = "") -> str:
    """Return the last answer after the reasoning: the boxed part of the answer tags, or their text; empty if absent."""
    text = behind_reasoning(text, state)
    _, mark, inside = text.rpartition("<answer>")
    if mark:
        text, end, _ = inside.partition("</answer>")
        return (boxed(text) or text.strip()) if end else ""
    return boxed(text)


def boxed(text: str) -> str:
    r"""Return the content of the last \boxed{ }."""
    inside = text.rpartition("\\boxed{")[2]
    depth = 1
    for i, character in enumerate(inside):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return inside[:i].strip()
    return ""


def make_grader() -> Callable[[str, str], bool]:
    """Return the grader that runs in the workers.

    A response that is not mathematics is wrong; an answer of the data set that is not mathematics raises ValueError.
    """
    from math_verify import LatexExtractionConfig, parse, verify

    def parsed(text: str) -> list[Any]:
        # parse the whole answer, without searching for a number in it; the worker limits the time
        return parse(f"\\boxed{{{text}}}", [LatexExtractionConfig()], parsing_timeout=None)

    def is_correct(gold: str, given: str) -> bool:
        gold, given = SEPARATOR.sub(",", gold), SEPARATOR.sub(",", given)
        reference = parsed(gold)
        if not reference:
            raise ValueError(f"the answer {gold!r} of the data set cannot be read")
        if bool(PERCENT.search(gold)) == bool(PERCENT.search(given)):
            return verify(reference, parsed(given), timeout_seconds=None)
        # 50% equals 0.5, and the 50 of a question that asks for per cent
        bare, percent = (given, gold) if PERCENT.search(gold) else (gold, given)
        value = PERCENT.sub("", percent)
        forms = (value, f"\\frac{{{value}}}{{100}}")
        return any(verify(parsed(bare), parsed(form), timeout_seconds=None) for form in forms)

    is_correct("1", "1")  # parsers are built on first use
    return is_correct
