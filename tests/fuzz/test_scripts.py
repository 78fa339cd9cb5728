"""Whatever an environment gives back: an episode ends with finite rewards, or unscored with a cause to read."""

from __future__ import annotations

import asyncio
import decimal
import fractions
import json
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from fuzzing import clear, inputs, shaken, values
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from RL2.engines.scripted import ScriptedEngine
from RL2.rollout.environment import Environment, load_environment
from RL2.rollout.episode import run_episode
from RL2.rollout.metrics import rollout_metrics, unscored_causes
from RL2.types import Prompt, Sampling

SCRIPT = """
async def step(state, action, extra_info):
    return answer(extra_info["answers"], state + action)

async def reset(extra_info):
    return answer(extra_info["answers"], "")

def answer(answers, so_far):
    value = answers.pop(0) if answers else None
    if isinstance(value, BaseException):
        raise value
    if isinstance(value, dict) and value.get("next_state") == "APPEND":
        value = value | {"next_state": so_far + " and?", "extra_info": {"answers": answers}}
    return value
"""


class NoNumber(float):
    def __float__(self) -> float:
        raise RuntimeError("no")


RESULT = {"next_state": "APPEND", "reward": 1.0, "score": 0.5, "done": False, "extra_info": {"answers": []}}
MESSAGES = {**RESULT, "next_state": [{"role": "user", "content": "and?"}]}
odd = st.sampled_from(
    [
        *(np.float64(1), np.float32("nan"), np.array(1.0), fractions.Fraction(1, 3), decimal.Decimal(1), NoNumber(1)),
        *(1j, b"bytes", object(), RESULT, ValueError("\ud800"), RuntimeError(), OSError("a\nb"), KeyboardInterrupt()),
        *(SystemExit(3), StopIteration(), RecursionError("x"), Exception("a" * 100_000), asyncio.CancelledError()),
    ]
)
answers = st.lists(shaken(RESULT) | shaken(MESSAGES) | odd | values, max_size=4)


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Environment]:
    (path := tmp_path_factory.mktemp("environment") / "any.py").write_text(SCRIPT)
    environment = load_environment(path, 20)
    yield environment
    environment.close()


def test_what_scripts_return(environment: Environment, tokenizer: PreTrainedTokenizerBase) -> None:
    engine = ScriptedEngine(lambda ids, sampling: [7, 8, tokenizer.eos_token_id])
    sampling = Sampling(max_new_tokens=8, stop_token_ids=(tokenizer.eos_token_id,))
    with asyncio.Runner() as runner:

        @inputs(0.08)
        @given(answers, st.booleans())
        def play(given_answers: list[Any], has_prompt: bool) -> None:
            text = "3 + 4 =" if has_prompt else ""
            given_answers = [{**a} if isinstance(a, dict) else a for a in given_answers]
            for answer in given_answers:
                if isinstance(answer, dict) and answer.get("extra_info") == {"answers": []}:
                    answer["extra_info"] = {"answers": given_answers}
            prompt = Prompt(3, text, tokenizer.encode(text), {})
            prompt.extra_info["answers"] = _Shared(given_answers)
            with clear():
                trajectory = runner.run(
                    run_episode(
                        prompt,
                        engine=engine,
                        environment=environment,
                        tokenizer=tokenizer,
                        sampling=sampling,
                        max_turns=3,
                        max_length=200,
                        group=0,
                        sample=0,
                        seed=0,
                    )
                )
                assert math.isfinite(trajectory.reward) and math.isfinite(trajectory.score)
                if trajectory.unscored is not None:
                    assert trajectory.unscored.splitlines() == [trajectory.unscored]
                    assert trajectory.reward == trajectory.score == 0 and len(trajectory.unscored) < 2000
                for sequence in trajectory.sequences:
                    lengths = {len(sequence.token_ids), len(sequence.action_mask), len(sequence.rewards)}
                    assert lengths == {len(sequence.token_ids)} and lengths != {0}
                    assert all(map(math.isfinite, sequence.rewards.tolist()))
                json.dumps([trajectory.texts, trajectory.unscored], ensure_ascii=False).encode()
                rollout_metrics([trajectory], "train"), unscored_causes([trajectory])

        play()


class _Shared(list[Any]):
    """A list that an episode's copy of `extra_info` does not copy."""

    def __deepcopy__(self, memo: object) -> list[Any]:
        return list(self)


@inputs(0.02)
@given(st.text(max_size=30) | st.sampled_from([SCRIPT, "async def step(*a): 0", "def step(a, b, c): 0", "\x00"]))
def test_scripts(tmp_path_factory: pytest.TempPathFactory, source: str) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed_script.py"
    path.write_bytes(source.encode("utf-8", "surrogatepass"))
    with clear():
        load_environment(path, 1).close()
