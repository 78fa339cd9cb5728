"""Judge environment: a language model grades the response by a rubric, on any OpenAI-compatible server.

    JUDGE_URL=http://127.0.0.1:8000/v1  the server; requests go to {JUDGE_URL}/chat/completions
    JUDGE_MODEL=NAME
    JUDGE_RUBRIC="..."       the rubric, or a file with it; a .json file {"name": "rubric", ...} has several criteria
    JUDGE_SCALE=1-10         lowest and highest mark; reward and score are between 0 and 1
    JUDGE_REWARD=mean        over several criteria; "parts": a dict with a part for each
    JUDGE_REPEATS=1          number of times each criterion is judged
    JUDGE_COMBINE=mean       over the repeats; "majority": the most frequent mark
    JUDGE_TEMPERATURE=       default 0 for one repeat and 1 for several
    JUDGE_MAX_TOKENS=1024    per reply
    JUDGE_BODY={}            additional fields of the request, as JSON
    JUDGE_KEY=               name of the variable that holds the key
    JUDGE_FOLDER=            folder for replies and their cost; a budget needs it
    JUDGE_MOST_REQUESTS=, JUDGE_MOST_TOKENS=, JUDGE_MOST_COST=, JUDGE_PRICE_IN=, JUDGE_PRICE_OUT=   (prices per million)
    JUDGE_TIMEOUT_S=60, JUDGE_ATTEMPTS=6, JUDGE_CONCURRENCY=32

A failing server, an exhausted budget and a reply without a mark leave the response unscored; see docs/judge.md.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections import Counter
from pathlib import Path
from statistics import fmean
from typing import Any

from .gsm8k import behind_reasoning
from .questions import json_of, model_of
from .variables import chosen, number, required


def read_criteria(text: str) -> dict[str, str]:
    """Return criterion -> rubric, from a text or from the file that it names."""
    path = Path(text) if len(text) < 256 and "\n" not in text else None
    is_file = path is not None and path.suffix in (".json", ".md", ".txt")
    if not is_file or path is None:
        return {"judge": text}
    if not path.is_file():
        raise ValueError(f"JUDGE_RUBRIC={text}: there is no such file")
    rubric = path.read_text(encoding="utf-8")
    if path.suffix != ".json":
        return {"judge": rubric}
    criteria = json.loads(rubric)
    is_named = isinstance(criteria, dict) and criteria and all(re.fullmatch(r"[A-Za-z]\w*", name) for name in criteria)
    if not is_named or not all(isinstance(rubric, str) for rubric in criteria.values()):
        raise ValueError(f'JUDGE_RUBRIC={text}: expected {{"name": "rubric", ...}}')
    return criteria


def read_scale(text: str) -> tuple[float, float]:
    """Return the lowest and the highest mark. Raise ValueError if the text is invalid."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)-(\d+(?:\.\d+)?)", text)
    if not found or float(found[1]) >= float(found[2]):
        raise ValueError(f"JUDGE_SCALE={text!r}: expected the least and the highest mark, as in 1-10")
    return float(found[1]), float(found[2])


REPEATS = number("JUDGE_REPEATS", "1", 1)
model = model_of("JUDGE", "You grade a response by a rubric.", temperature="0" if REPEATS == 1 else "1")
CRITERIA = read_criteria(required("JUDGE_RUBRIC", "is the rubric, or names a file with it"))
LEAST, MOST = read_scale(os.environ.get("JUDGE_SCALE") or "1-10")
IS_PARTS = chosen("JUDGE_REWARD", "mean", "parts") == "parts"
IS_MAJORITY = chosen("JUDGE_COMBINE", "mean", "majority") == "majority"
GRADE = """\
{rubric}

The conversation:
<{nonce}>
{question}
</{nonce}>
{reference}The response to be graded:
<{nonce}>
{response}
</{nonce}>

Give a mark from {least:g} (worst) to {most:g} (best). Reason briefly, then end with one line of JSON: \
{{"score": MARK}}"""
COMPARE = """\
{rubric}

The conversation:
<{nonce}>
{question}
</{nonce}>
Response A:
<{nonce}>
{first}
</{nonce}>
Response B:
<{nonce}>
{second}
</{nonce}>

Which response is better? Reason briefly, then end with one line of JSON: {{"better": "A"}}, {{"better": "B"}} or \
{{"better": "tie"}}"""
REFERENCE = "A correct answer:\n<{nonce}>\n{answer}\n</{nonce}>\n"
SCORE = re.compile(
    r"""\b(?:score|mark|rating|grade)(?:\s+(?:is|of))?[\s*_:="'`]{0,12}(-?\d+(?:\.\d+)?)"""
    r"""(?:\s*(?:/|out of)\s*(\d+(?:\.\d+)?))?""",
    re.IGNORECASE,
)
LINE = re.compile(r"[\s*`]*(-?\d+(?:\.\d+)?)(?:\s*(?:/|out of)\s*(\d+(?:\.\d+)?))?[\s*`.]*")


async def step(state: str, action: str, extra_info: dict[str, Any]) -> dict[str, Any]:
    response = behind_reasoning(action, state).strip()
    given: dict[str, list[float]] = {
        name: [LEAST] for name in CRITERIA
    }  # for an empty response, and for unclosed reasoning
    if response:
        question = str(extra_info.get("question") or state)
        answer = extra_info.get("answer")
        asked = [judge(question, response, answer, name, n) for name in CRITERIA for n in range(REPEATS)]
        found = await asyncio.gather(*asked)
        given = {name: found[k * REPEATS : (k + 1) * REPEATS] for k, name in enumerate(CRITERIA)}
    parts = {name: share(combined(values)) for name, values in given.items()}
    score = fmean(parts.values())
    return {
        "next_state": None,
        "reward": parts if IS_PARTS else score,
        "score": score,
        "done": True,
        "extra_info": extra_info,
        "metrics": {f"{name}_agreement": agreement(values) for name, values in given.items() if len(values) > 1},
    }


def example(row: dict[str, Any]) -> dict[str, Any]:
    """Return the row with its question in `extra_info`, as the judge reads it, and the answer if there is one."""
    extra_info = row.get("extra_info") or {}
    extra_info = dict(json.loads(extra_info) if isinstance(extra_info, str) else extra_info)
    messages = row.get("messages") or row.get("prompt") or row.get("question") or row.get("problem")
    messages = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
    if not messages:
        raise ValueError("it has no 'messages', 'prompt', 'question' or 'problem'")
    turns = messages[:-1] if messages[-1].get("role") == "assistant" else messages
    extra_info.setdefault("question", "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in turns))
    if "answer" not in extra_info and row.get("answer") is not None:
        extra_info["answer"] = row["answer"]
    made = row if row.get("messages") is not None or row.get("prompt") is not None else row | {"messages": messages}
    return made | {"extra_info": extra_info}


async def judge(question: str, response: str, answer: Any, name: str, repeat: int) -> float:
    """Return a mark on the scale for one criterion. Raise JudgeError if the judge gives none."""
    reference = "" if answer is None else REFERENCE
    fields = {"question": question, "response": response, "answer": "" if answer is None else str(answer)}
    form, wanted = GRADE.replace("{reference}", reference), f"mark from {LEAST:g} to {MOST:g}"
    return await _asked(form, CRITERIA[name], fields, repeat, mark_of, wanted)


async def marks(question: str, response: str, answer: Any, repeat: int) -> dict[str, float]:
    """Return criterion -> mark between 0 and 1. Raise JudgeError if the judge gives none."""
    return {name: share(await judge(question, response, answer, name, repeat)) for name in CRITERIA}


async def prefer(question: str, first: str, second: str, repeat: int = 0) -> str:
    """Return the response that the judge prefers: A (the first), B or tie. Raise JudgeError if it gives no verdict."""
    rubric = "\n\n".join(CRITERIA.values())
    fields = {"question": question, "first": first, "second": second}
    return await _asked(COMPARE, rubric, fields, repeat, better_of, "verdict (A, B or tie)")


async def _asked(form: str, rubric: str, fields: dict[str, str], repeat: int, read: Any, wanted: str) -> Any:
    key = [form, rubric, fields, LEAST, MOST]
    fixed = {"rubric": rubric, "least": LEAST, "most": MOST}
    return await model.ask(form, fields, read, wanted, key=key, repeat=repeat, **fixed)


def mark_of(reply: str) -> float | None:
    """Return the mark at the end of a reply: JSON, "Score: 7/10", or a number as the last line; None if absent."""
    text = reply.rpartition("</think>")[2]
    found = json_of(text, "score")
    out_of = None
    if found is None:
        stated = SCORE.findall(text)
        alone = LINE.fullmatch((text.strip().splitlines() or [""])[-1])
        found, out_of = stated[-1] if stated else (alone[1], alone[2]) if alone else (None, None)
    try:
        mark = float(found)
    except (TypeError, ValueError):
        return None
    if isinstance(found, bool) or not LEAST <= mark <= MOST or (out_of and float(out_of) != MOST):
        return None
    return mark


def better_of(reply: str) -> str | None:
    """Return the verdict at the end of a reply: A, B or tie; None if there is none."""
    word = str(json_of(reply.rpartition("</think>")[2], "better")).strip().lower()
    return {"a": "A", "b": "B", "tie": "tie"}.get(word)


def combined(marks: list[float]) -> float:
    """Return the mean of the marks, or the most frequent mark; ties are averaged."""
    if not IS_MAJORITY:
        return fmean(marks)
    counts = Counter(marks)
    return fmean(mark for mark, count in counts.items() if count == max(counts.values()))


def share(mark: float) -> float:
    """Return a mark rescaled to 0 to 1."""
    return (mark - LEAST) / (MOST - LEAST)


def agreement(marks: list[float]) -> float:
    """Return the share of pairs of marks that are equal."""
    pairs = len(marks) * (len(marks) - 1) / 2
    return sum(n * (n - 1) / 2 for n in Counter(marks).values()) / pairs
