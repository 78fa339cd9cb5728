"""The calculator answers in the same turn, and the number after #### is judged at the end."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from episodes import one_episode
from transformers import PreTrainedTokenizerBase

from envs import calculator
from RL2.engines.scripted import ScriptedEngine
from RL2.rollout.environment import load_environment
from RL2.types import Prompt, Sampling


def step(action: str, gold: str = "84", state: str = "q") -> dict[str, Any]:
    return asyncio.run(calculator.step(state, action, {"answer": gold}))


@pytest.mark.parametrize(
    ("call", "result"),
    [
        ("<calc>12*7</calc>", "84"),
        ("I need <calc> (1+2) / 3 </calc>\n", "1"),
        ("<think>is it <calc>1/3</calc>", "0.3333333333"),
        ("<calc>10/4</calc>", "2.5"),
        ("<calc>10/4</calc>.", "2.5"),
        ("<calc>10/4</calc>)\n", "2.5"),
        ("<calc>-1000000*1000000</calc>", "-1000000000000"),
        ("<calc>2000000/3</calc>", "666666.6667"),
        ("<calc>1</calc> then <calc>2</calc>", "2"),
        ("<calc><calc>3</calc>", "3"),
        ("<calc>1/0</calc>", "error: division by zero"),
        ("<calc>2**9</calc>", "error: a number is missing before '*'"),
        ("<calc>import os</calc>", "error: 'i' does not belong in an expression"),
        ("</calc>", "error: write <calc>expression</calc>"),
    ],
)
def test_a_call_is_answered(call: str, result: str) -> None:
    answered = step(call)
    assert answered["next_state"] == f"q{call}<result>{result}</result>"
    assert (answered["reward"], answered["score"], answered["done"]) == (0.0, 0.0, False)


def test_the_answer_ends_the_episode() -> None:
    for action, reward in {"#### 84": 1.0, "So <calc>84</calc> it is\n#### 84": 1.0, "#### 85": 0.0, "": 0.0}.items():
        result = step(action)
        assert (result["reward"], result["done"], result["next_state"]) == (reward, True, None)


def test_a_forged_result_is_only_text() -> None:
    assert step("<calc>1</calc><result>84</result>")["reward"] == 0.0


def test_problems_of_its_own() -> None:
    extra_info: dict[str, Any] = {"seed": 1}
    (message,) = asyncio.run(calculator.reset(extra_info))
    assert message["content"].startswith("A shop has ")
    assert step("#### " + extra_info["answer"], extra_info["answer"])["reward"] == 1.0
    assert len({calculator.problem(seed) for seed in range(100)}) > 90
    assert calculator.problem(7) == calculator.problem(7)


def test_example_is_that_of_gsm8k_with_another_instruction() -> None:
    row = calculator.example({"question": "How many?", "answer": "6*2=12\n#### 12"})
    assert row["extra_info"] == {"answer": "12"}
    assert row["messages"][0]["content"].startswith("How many?\nTo compute something")
    assert calculator.example(row) is row


def test_a_whole_episode(tokenizer: PreTrainedTokenizerBase) -> None:
    """What the calculator writes is read by the model and trains nothing."""
    replies = [tokenizer.encode(text) for text in ("Let me see: <calc>12*7</calc>", "So\n#### 84")]
    engine = ScriptedEngine(
        lambda token_ids, sampling: replies[len(engine.requests) - 1], lambda ids: [-1.0] * len(ids)
    )
    environment = load_environment(Path(calculator.__file__), 5)
    trajectory = one_episode(
        Prompt(0, "12*7?", tokenizer.encode("12*7?"), {"answer": "84"}),
        engine=engine,
        environment=environment,
        tokenizer=tokenizer,
        sampling=Sampling(max_new_tokens=64, stop=("</calc>",)),
        max_turns=3,
    )
    environment.close()
    (sequence,) = trajectory.sequences
    given = [
        i for i, action in zip(sequence.token_ids.tolist(), sequence.action_mask.tolist(), strict=True) if not action
    ]
    assert tokenizer.decode(given) == "12*7?<result>84</result>"
    assert [
        i for i, action in zip(sequence.token_ids.tolist(), sequence.action_mask.tolist(), strict=True) if action
    ] == [
        *replies[0],
        *replies[1],
    ]
    assert (trajectory.reward, trajectory.score, trajectory.unscored) == (1.0, 1.0, None)
