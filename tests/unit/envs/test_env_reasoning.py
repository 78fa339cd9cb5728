"""Reasoning is never judged: not before it is closed, and not at all if it never is."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from envs import calculator, countdown, gsm8k, mixed, orz, searchr1
from envs.gsm8k import behind_reasoning

INFO = {"answer": "3", "target": 3, "nums": [1, 2]}
RIGHT: dict[str, tuple[Any, str]] = {
    "calculator": (calculator, "#### 3"),
    "countdown": (countdown, "<answer>1+2</answer>"),
    "gsm8k": (gsm8k, "#### 3"),
    "mixed": (mixed, "#### 3"),
    "orz": (orz, "\\boxed{3}"),
    "searchr1": (searchr1, "<answer>3</answer>"),
}
EARNS = {
    "{}": True,
    "<think>hm</think>{}": True,
    "<think>\n{}, or not\n</think>\nso {}": True,
    "hm</think>{}": True,
    "<think>hm, {}": False,
    "<think>{}</think>": False,
    "<think>{}</think>no answer": False,
    "{} <think>or was it": False,
    "<think>a</think>{}<think>no": False,
}


@pytest.mark.parametrize("opened", [False, True], ids=["by the response", "by the prompt"])
@pytest.mark.parametrize("name", RIGHT)
def test_only_what_stands_behind_earns(name: str, opened: bool) -> None:
    script, right = RIGHT[name]
    for form, earns in EARNS.items():
        if opened and not form.startswith("<think>") and "</think>" not in form:
            earns = False
        action = form.removeprefix("<think>" if opened else "").format(right, right)
        info = INFO | ({"env": "gsm8k"} if name == "mixed" else {})
        told = {"sampling": {}} if name == "mixed" else {}
        state = "What is <think>? 1 + 2 =" + ("<think>\n" if opened else "")
        try:
            reward = asyncio.run(script.step(state, action, info, **told))["reward"]
        finally:
            orz.grade.close()
        assert reward == float(earns), (form, action)


def test_what_a_prompt_says_of_reasoning_opens_none() -> None:
    assert behind_reasoning("3", "Reason in <think> tags.\n") == "3"
    assert behind_reasoning("3", "Reason.\n<think>\n") == ""
    assert behind_reasoning("3</think>4", "<think>") == "4"
