"""Episodes of an agent: what its environment says of its answer holds for the tokens that were sampled."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from RL2.agents.make import make_agent
from RL2.agents.session import Policy
from RL2.data.template import Template
from RL2.data.tool_calls import ResponseParser
from RL2.engines.scripted import ScriptedEngine
from RL2.errors import ConfigError
from RL2.rollout.environment import environment_of
from RL2.types import Prompt, Sampling, Trajectory

AGENT = """
import json, os, urllib.request

def ask(messages):
    url = os.environ["OPENAI_BASE_URL"] + "/chat/completions"
    headers = {"Authorization": "Bearer " + os.environ["OPENAI_API_KEY"], "Content-Type": "application/json"}
    request = urllib.request.Request(url, json.dumps({"model": "m", "messages": messages}).encode(), headers)
    return json.load(urllib.request.urlopen(request))["choices"][0]["message"]

def play(task):
    messages = [*task["messages"], ask(task["messages"])]
    messages += [{"role": "user", "content": "Sure?"}]
    last = ask(messages)
    ask([{"role": "user", "content": "Sum up."}])
    return LEFT
"""


def settings(agent: str | None) -> Any:
    return SimpleNamespace(agent=agent, agent_timeout_s=60, agent_env=(), max_running_agents=1)


def policy_of(engine: ScriptedEngine, template: Template) -> Policy:
    return Policy(engine, template.tokenizer, template, ResponseParser(template), None)


def played(tokenizer: PreTrainedTokenizerBase, folder: Path, left: str, *, trains: bool) -> Trajectory:
    """An episode of two conversations, of two responses and of one, whose answer is judged by `step`."""
    (folder / "agent.py").write_text(AGENT.replace("LEFT", left))

    async def step(state: str, action: str, extra_info: dict[str, Any]) -> dict[str, Any]:
        reward = float(len(action))
        done = {"next_state": None, "reward": reward, "score": reward, "done": True, "extra_info": extra_info}
        return done | {"train": trains}

    engine = ScriptedEngine(lambda ids, sampling: [*tokenizer.encode("12 apples"), tokenizer.eos_token_id])
    environment, template = environment_of(step), Template(tokenizer)

    async def play() -> Trajectory:
        player = make_agent(settings(f"{folder}/agent.py:play"), "agent", policy_of(engine, template))
        assert player is not None
        prompt = Prompt(0, "", [], {}, {}, [{"role": "user", "content": "How many?"}])
        sampling = Sampling(max_new_tokens=8, stop_token_ids=(tokenizer.eos_token_id,))
        try:
            return await player.play(
                prompt, environment=environment, sampling=sampling, max_turns=9, group=0, sample=0, seed=0
            )
        finally:
            await player.close()
            environment.close()

    return asyncio.run(play())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("left", "reward", "training"), [("None", 9.0, [True, False]), ("'yes'", 3.0, [False, False])], ids=["last", "text"]
)
def test_an_answer_that_shall_not_train_does_not(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, left: str, reward: float, training: list[bool]
) -> None:
    whole = played(tokenizer, tmp_path, left, trains=True)
    assert whole.unscored is None and [any(sequence.action_mask) for sequence in whole.sequences] == [True, True]
    cut = played(tokenizer, tmp_path, left, trains=False)
    assert (cut.reward, cut.score) == (whole.reward, whole.score) == (reward, reward)
    assert [sequence.token_ids.tolist() for sequence in cut.sequences] == [
        sequence.token_ids.tolist() for sequence in whole.sequences
    ]
    assert [any(sequence.action_mask) for sequence in cut.sequences] == training
    for sequence in cut.sequences:
        assert all(
            version == -1
            for version, trains in zip(sequence.versions.tolist(), sequence.action_mask.tolist(), strict=True)
            if not trains
        )


def test_without_an_agent_there_is_no_player(tokenizer: PreTrainedTokenizerBase) -> None:
    policy = policy_of(ScriptedEngine(lambda ids, sampling: [1]), Template(tokenizer))
    assert make_agent(settings(None), "agent", policy) is None
    with pytest.raises(ConfigError, match=r"agent=no.py:play: no.py is not a file"):
        make_agent(settings("no.py:play"), "agent", policy)
