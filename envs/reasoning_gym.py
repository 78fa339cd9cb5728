"""Tasks of Reasoning Gym, generated on demand: REASONING_GYM=chain_sum names the data set.

No prompt file is needed: `reset` generates the task from the seed that all samples of a prompt share. Settings of the
data set are in REASONING_GYM_CONFIG, a JSON object. Only an answer with the full score is rewarded; partial credit,
which some data sets give to any answer, affects only the score.

The library (pip install 'rl2-spo[reasoning-gym]') runs in processes that are killed if they hang. Some of its data sets
would execute an answer as Python code: they receive only answers that are harmless.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
import os
import re
import sys
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from .countdown import answer
from .workers import Workers

if importlib.util.find_spec("reasoning_gym") is None:
    raise ModuleNotFoundError("it needs reasoning-gym: pip install 'rl2-spo[reasoning-gym]'")

DATASET = os.environ.get("REASONING_GYM", "chain_sum")
CONFIG = json.loads(os.environ.get("REASONING_GYM_CONFIG", "{}"))
INSTRUCTION = "\nReason step by step, then give the answer alone between <answer> and </answer>."
LONGEST = 2000
"""Limit in characters of an answer; longer text is not an answer."""

RUNS_ANSWERS = re.compile(r"\beval\(|\bsympify\(|sympy\.parse_expr\(|sp\.parse_expr\(|import.*\bparse_expr\b")
"""Pattern in the source of a data set that may execute answers."""
FORMULA = re.compile(r"[A-Za-z0-9+\-*/^(). ,=\s]*", re.ASCII)
FUNCTIONS = {"sqrt", "exp", "log", "ln", "sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "tanh", "pi"}

gym = Workers(__file__, "make_gym", limit_s=10)


async def reset(extra_info: dict[str, Any]) -> list[dict[str, Any]]:
    extra_info |= {"dataset": extra_info.get("dataset", DATASET), "config": extra_info.get("config", CONFIG)}
    extra_info["question"] = await gym(*_task(extra_info))
    return [{"role": "user", "content": extra_info["question"] + INSTRUCTION}]


async def step(state: str, action: str, extra_info: dict[str, Any]) -> dict[str, Any]:
    given = answer(action, state)
    score = 0.0
    if given and len(given) <= LONGEST:
        score = await gym(*_task(extra_info), extra_info["question"], given)
    reward = float(score >= 1)
    return {"next_state": None, "reward": reward, "score": score, "done": True, "extra_info": extra_info}


def _task(extra_info: dict[str, Any]) -> tuple[str, dict[str, Any], int]:
    return extra_info["dataset"], extra_info["config"], extra_info["seed"]


def make_gym() -> Callable[..., str | float]:
    """Return the function that runs in the workers: it gives a task's question, or the score of an answer."""
    import reasoning_gym

    @lru_cache(maxsize=256)
    def load(dataset: str, config: str, seed: int) -> tuple[Any, dict[str, Any]]:
        made = reasoning_gym.create_dataset(dataset, **json.loads(config), seed=seed, size=1)
        return made, made[0]

    def question_or_score(
        dataset: str, config: dict[str, Any], seed: int, question: str | None = None, given: str = ""
    ) -> str | float:
        made, entry = load(dataset, json.dumps(config), seed)
        if question is None:
            return entry["question"]
        if question != entry["question"]:
            raise ValueError(f"the data set {dataset} makes another task of the same seed each time")
        if runs_answers(type(made).__module__) and not is_harmless(given):
            return float(given == entry["answer"])
        return float(made.score_answer(given, entry))

    return question_or_score


@lru_cache(maxsize=256)
def runs_answers(module: str) -> bool:
    return RUNS_ANSWERS.search(inspect.getsource(sys.modules[module])) is not None


def is_harmless(text: str) -> bool:
    """Return whether executing `text` would only compute a formula or a literal, without other functions."""
    names = re.findall(r"[A-Za-z]+", text)
    if FORMULA.fullmatch(text) and all(len(name) == 1 or name in FUNCTIONS for name in names):
        return not re.search(r"\.\s*[A-Za-z]|[A-Za-z)]\s*\.", text)
    try:
        ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return False
    return True
