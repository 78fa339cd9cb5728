"""Agents of public frameworks, unmodified: the examples, with a model that says what the test wants.

AGENTS_PYTHON is an interpreter that has the frameworks; this one if it is not set.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from conversations import Sampled, faults
from real_templates import FILES, tokenizer_with

from RL2.agents.player import AgentPlayer
from RL2.agents.session import Policy
from RL2.config.agent import agent_of
from RL2.data.template import Template
from RL2.data.tool_calls import ResponseParser
from RL2.engines.scripted import ScriptedEngine
from RL2.rollout.environment import without_script
from RL2.types import Prompt, Sampling, Trajectory

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
PYTHON = os.environ.get("AGENTS_PYTHON", sys.executable)
IMPORTS = {
    "openai_agents": "agents",
    "smolagents_weather": "smolagents, openai",
    "langgraph_loop": "langgraph, langchain_openai",
}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
FINAL = '<tool_call>\n{"name": "final_answer", "arguments": {"answer": "rain"}}\n</tool_call>'
ROW = {"weather": {"Rome": "rain", "Oslo": "sun"}, "answer": "rain"}


@cache
def is_installed(example: str) -> bool:
    return subprocess.run([PYTHON, "-c", f"import {IMPORTS[example]}"], capture_output=True).returncode == 0


def command(example: str) -> str:
    if not is_installed(example):
        pytest.skip(f"{PYTHON} has no {IMPORTS[example]}")
    return f"{PYTHON} {ROOT}/examples/agents/{example}.py"


def played(example: str, says: list[str], log: list[Sampled]) -> Trajectory:
    """Return an episode of an example in which the model says one text after another."""
    tokenizer = tokenizer_with("qwen3")
    template, left = Template(tokenizer), iter(says)
    (end,) = template.end_ids

    def reply(token_ids: list[int], sampling: Sampling) -> list[int]:
        log.append(Sampled(token_ids, [*tokenizer.encode(next(left)), end]))
        return log[-1].token_ids

    async def play() -> Trajectory:
        policy = Policy(ScriptedEngine(reply), tokenizer, template, ResponseParser(template), None)
        player = AgentPlayer(agent_of("rollout.agent", command(example)), policy, 120, 1)
        question: list[dict[str, Any]] = [{"role": "user", "content": "How is the weather in Rome?"}]
        prompt = Prompt(0, "", [], ROW, messages=question)
        sampling = Sampling(max_new_tokens=200, stop_token_ids=(end,))
        environment = without_script({})
        try:
            return await player.play(
                prompt, environment=environment, sampling=sampling, max_turns=4, group=0, sample=0, seed=0
            )
        finally:
            await player.close()

    return asyncio.run(play())


@pytest.mark.skipif(not FILES, reason="the package trl carries the template")
@pytest.mark.parametrize("example", IMPORTS)
def test_an_example_calls_its_tool_and_trains_on_what_was_sampled(example: str) -> None:
    rewrites = example == "smolagents_weather"  # it tells the model of its calls in a text
    log: list[Sampled] = []
    trajectory = played(example, [CALL, FINAL if rewrites else "rain"], log)
    assert trajectory.unscored is None
    assert trajectory.score == 1 and trajectory.metrics["calls"] == 1
    assert len(trajectory.sequences) == (2 if rewrites else 1)
    assert len(log) == 2 and not faults(trajectory.sequences, log)
    assert "rain" in tokenizer_with("qwen3").decode(log[1].prompt)
