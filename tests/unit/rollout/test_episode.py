"""Token ids in, token ids out: what was sampled is kept to the token, whatever the environment makes of the text."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from real_templates import FILES, tokenizer_with
from tiny_models import tiny_config, tiny_model
from transformers import PreTrainedTokenizerBase

from RL2.batch.packing import pack
from RL2.data.template import NAME, Template
from RL2.engines.base import Engine
from RL2.engines.embedded.engine import EmbeddedEngine
from RL2.engines.scripted import ScriptedEngine
from RL2.models.routing import RoutingRecord, find_routers
from RL2.rollout.environment import load_environment
from RL2.rollout.episode import request_seed, run_episode
from RL2.types import Prompt, Sampling, Sequence, Trajectory

PREFIX = """
async def step(state, action, extra_info):
    turn = extra_info["turn"] = extra_info.get("turn", 0) + 1
    return {"next_state": state + action + extra_info.get("between", " then "), "reward": turn / 10, "score": turn,
            "done": turn == extra_info.get("turns", 2), "extra_info": extra_info}
"""
REWRITE = """
async def step(state, action, extra_info):
    return {"next_state": "again: " + action, "reward": 1, "score": 1, "done": False, "extra_info": extra_info}
"""

CHAT = """
async def reset(extra_info):
    return [{"role": "system", "content": "Play."}, {"role": "user", "content": f"task {extra_info['seed']}"}]
async def step(state, action, extra_info):
    messages = [{"role": "user", "content": action + "?"}]
    return {"next_state": messages, "reward": 0, "score": 0, "done": False, "extra_info": extra_info}
"""

Play = Callable[..., Trajectory]


@pytest.fixture
def play(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> Iterator[Play]:
    """One episode of a script against replies."""
    environments = []

    def play(source: str, engine: Engine, text: str = "hello", **changes: Any) -> Trajectory:
        path = tmp_path / "env.py"
        path.write_text(source)
        environments.append(load_environment(path, 5))
        prompt = Prompt(7, text, changes.get("tokenizer", tokenizer).encode(text), changes.pop("extra_info", {}))
        settings: dict[str, Any] = {"max_turns": 4, "max_length": None, "group": 1, "sample": 2, "seed": 3}
        settings["tokenizer"] = tokenizer
        settings["sampling"] = Sampling(max_new_tokens=16, stop_token_ids=(tokenizer.eos_token_id,))
        return asyncio.run(run_episode(prompt, engine=engine, environment=environments[-1], **(settings | changes)))

    yield play
    for environment in environments:
        environment.close()


def says(*replies: list[int]) -> ScriptedEngine:
    """One reply after another."""
    left = iter(replies)
    return ScriptedEngine(lambda token_ids, sampling: next(left), lambda ids: [-i / 100 for i in ids])


def sampled(sequence: Sequence) -> list[int]:
    return [i for i, action in zip(sequence.token_ids.tolist(), sequence.action_mask.tolist(), strict=True) if action]


def test_every_token_has_its_place(play: Play, tokenizer: PreTrainedTokenizerBase) -> None:
    prompt, reply = tokenizer.encode("hello"), [*tokenizer.encode(" world"), tokenizer.eos_token_id]
    trajectory = play(PREFIX, says(reply), extra_info={"turns": 1})
    (sequence,) = trajectory.sequences
    assert sequence.token_ids.tolist() == prompt + reply
    assert sequence.action_mask.tolist() == [False] * len(prompt) + [True] * len(reply)
    assert sequence.logps.tolist() == pytest.approx([0.0] * len(prompt) + [-i / 100 for i in reply])
    assert sequence.rewards.tolist() == [0.0] * (len(prompt) + len(reply) - 1) + [0.1]
    assert trajectory.texts == ["hello", " world"], "the end token is no part of the action"
    assert (trajectory.row, trajectory.group, trajectory.sample) == (7, 1, 2)
    assert (trajectory.reward, trajectory.score, trajectory.truncated, trajectory.unscored) == (0.1, 1, False, None)


def test_each_token_has_the_experts_of_the_turn_that_ran_it_first(
    play: Play, tokenizer: PreTrainedTokenizerBase
) -> None:
    lm = tiny_model(tiny_config("qwen3_moe", {"vocab_size": len(tokenizer)})).eval()
    engine = EmbeddedEngine(lm, decode=str, max_running_requests=4, memory_share=0.5, records_experts=True)
    trajectory = play(PREFIX, engine, extra_info={"turns": 2}, sampling=Sampling(max_new_tokens=5))
    (sequence,) = trajectory.sequences
    record = RoutingRecord(find_routers(lm))
    with torch.no_grad(), record.recording():
        lm(input_ids=torch.tensor([sequence.token_ids.tolist()[:-1]]), use_cache=False)
    found = pack([trajectory, trajectory]).experts_T
    assert found is not None
    wanted = record.experts_NLK().sort(-1).values
    assert torch.equal(found.sort(-1).values, torch.cat([wanted, wanted]))


def test_sampled_ids_are_never_encoded_again(play: Play, tokenizer: PreTrainedTokenizerBase) -> None:
    letters = [tokenizer.convert_tokens_to_ids(letter) for letter in "hello"]
    half = tokenizer.encode("é")[:1]  # a byte that is no text on its own
    odd = [*letters, *half]
    assert tokenizer.encode(tokenizer.decode(odd)) != odd, "the tokenizer spells this otherwise"
    engine = says([*odd, tokenizer.eos_token_id], tokenizer.encode("the answer"))
    trajectory = play(PREFIX, engine)
    (sequence,) = trajectory.sequences
    between = tokenizer.encode(" then ")
    context = [*tokenizer.encode("hello"), *odd, tokenizer.eos_token_id, *between]
    assert engine.requests[1][0] == context
    assert sequence.token_ids.tolist() == context + tokenizer.encode("the answer")
    start = len(context) - len(between)
    assert sequence.action_mask.tolist()[start : len(context)] == [False] * len(between)
    assert sequence.logps.tolist()[start : len(context)] == [0.0] * len(between)
    assert sampled(sequence) == [*odd, tokenizer.eos_token_id, *tokenizer.encode("the answer")]


def test_each_turn_has_its_reward(play: Play) -> None:
    trajectory = play(PREFIX, says([10, 11], [12], [13, 14]), extra_info={"turns": 3})
    (sequence,) = trajectory.sequences
    rewarded = {sequence.token_ids[t]: reward for t, reward in enumerate(sequence.rewards) if reward}
    assert rewarded == {11: 0.1, 12: 0.2, 14: 0.3}
    assert trajectory.score == 6
    assert trajectory.reward == pytest.approx(0.6)
    assert len(trajectory.texts) == 6


@pytest.mark.parametrize("written_out", [True, False])
def test_the_end_token_is_not_doubled(play: Play, tokenizer: PreTrainedTokenizerBase, written_out: bool) -> None:
    end = tokenizer.eos_token_id
    engine = says([20, end], [21])
    play(PREFIX, engine, extra_info={"between": "<|im_end|>" * written_out + "\n<|im_start|>user"})
    assert engine.requests[1][0] == [*tokenizer.encode("hello"), 20, end, *tokenizer.encode("\n<|im_start|>user")]


def test_an_end_token_that_was_not_sampled_is_kept(play: Play, tokenizer: PreTrainedTokenizerBase) -> None:
    engine = says([20], [21])
    play(PREFIX, engine, extra_info={"between": "<|im_end|>"})
    assert engine.requests[1][0] == [*tokenizer.encode("hello"), 20, tokenizer.eos_token_id]


def test_a_rewritten_history_begins_a_new_sequence(play: Play, tokenizer: PreTrainedTokenizerBase) -> None:
    engine = says([*tokenizer.encode("one"), tokenizer.eos_token_id], tokenizer.encode("two"))
    trajectory = play(REWRITE, engine, max_turns=2)
    first, second = trajectory.sequences
    assert sampled(first) == [*tokenizer.encode("one"), tokenizer.eos_token_id]
    assert second.token_ids.tolist() == tokenizer.encode("again: one") + tokenizer.encode("two")
    assert sampled(second) == tokenizer.encode("two")
    assert (first.rewards[-1], second.rewards[-1], trajectory.reward) == (1, 1, 2)
    assert trajectory.texts == ["hello", "one", "again: one", "two"]


def test_turns_are_limited(play: Play) -> None:
    engine = says(*[[30]] * 9)
    trajectory = play(PREFIX, engine, max_turns=3, extra_info={"turns": 9})
    assert len(engine.requests) == 3
    assert not trajectory.truncated
    assert trajectory.unfinished, "the environment was not done"


def test_a_response_cut_short_is_truncated(play: Play) -> None:
    assert play(PREFIX, says([40] * 99), max_turns=1).truncated
    assert not play(PREFIX, says([40] * 99, [41]), extra_info={"turns": 2}).truncated, "the last response counts"


def test_a_sequence_never_outgrows_max_length(play: Play, tokenizer: PreTrainedTokenizerBase) -> None:
    start, between = len(tokenizer.encode("hello")), len(tokenizer.encode(" then "))
    engine = says([50] * 3, [51] * 99)
    (sequence,) = play(PREFIX, engine, max_length=start + 3 + between + 2).sequences
    assert [sampling.max_new_tokens for _, sampling in engine.requests] == [5 + between, 2]
    assert len(sequence.token_ids) == start + 3 + between + 2

    engine = says([50] * 3)
    trajectory = play(PREFIX, engine, max_length=start + 3 + between, extra_info={"turns": 4})
    assert len(engine.requests) == 1
    assert len(trajectory.sequences[0].token_ids) == start + 3, "an observation that nobody answers is left out"
    assert trajectory.truncated
    assert trajectory.unscored is None
    assert trajectory.score == 1

    trajectory = play(PREFIX, says(), max_length=start)
    assert trajectory.truncated
    assert trajectory.unscored == f"the prompt leaves no room for a response within {start} tokens"
    assert trajectory.sequences == []


def test_an_unscored_trajectory_keeps_its_tokens_and_no_reward(play: Play) -> None:
    source = PREFIX.replace("    return", "    if extra_info['turn'] == 2: raise OSError('no answer')\n    return")
    trajectory = play(source, says([60], [61]))
    assert trajectory.unscored is not None
    assert trajectory.unscored.startswith("OSError: no answer (")
    assert (trajectory.score, trajectory.reward) == (0, 0)
    assert sampled(trajectory.sequences[0]) == [60, 61]
    assert len(trajectory.texts) == 4


def test_an_error_of_the_engine_is_raised(play: Play) -> None:
    def fails(token_ids: list[int], sampling: Sampling) -> list[int]:
        raise ConnectionError("the engine is gone")

    with pytest.raises(ConnectionError, match="the engine is gone"):
        play(PREFIX, ScriptedEngine(fails))


def test_reset_gives_the_first_state_where_there_is_no_prompt(play: Play, tokenizer: PreTrainedTokenizerBase) -> None:
    source = PREFIX + "\nasync def reset(extra_info):\n    extra_info['turns'] = 1\n    return 'a board'\n"
    engine = says([70])
    trajectory = play(source, engine, text="")
    assert engine.requests[0][0] == tokenizer.encode("a board")
    assert trajectory.texts[0] == "a board"
    engine = says([70], [71])
    assert play(source, engine).texts[0] == "hello", "a prompt comes first"


@pytest.mark.parametrize("ended", [True, False])
def test_messages_go_through_the_chat_template(play: Play, tokenizer: PreTrainedTokenizerBase, ended: bool) -> None:
    reply = [*tokenizer.encode("one"), *([tokenizer.eos_token_id] if ended else [])]
    trajectory = play(CHAT, says(reply, tokenizer.encode("two")), text="", max_turns=2, extra_info={"seed": 5})
    first = "<|im_start|>system\nPlay.<|im_end|>\n<|im_start|>user\ntask 5<|im_end|>\n<|im_start|>assistant\n"
    rest = "\n<|im_start|>user\none?<|im_end|>\n<|im_start|>assistant\n"
    (sequence,) = trajectory.sequences
    assert tokenizer.decode(sequence.token_ids.tolist()) == f"{first}one<|im_end|>{rest}two"
    assert sampled(sequence) == [*reply, *tokenizer.encode("two")]


TOOLS = """
async def step(state, action, extra_info, calls):
    results = [{"role": "tool", "name": c["name"], "tool_call_id": "call00000", "content": str(c)} for c in calls]
    result = {"next_state": results or None, "reward": 1, "score": 1, "done": not calls}
    return result | {"extra_info": extra_info}
"""


@pytest.mark.skipif(not FILES, reason="trl is not installed")
@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "qwen3_6", "glm4moe", "llama3_1", "gptoss", "deepseekv3"])
def test_calls_are_read_and_their_results_follow(play: Play, name: str) -> None:
    tokenizer = tokenizer_with(name)
    template = Template(tokenizer)
    call = template.call_text[: template.end_of_turn(template.call_text, 0)].replace(NAME, "f")
    called = tokenizer.encode(call.removeprefix(template.header.partition("<think>")[0]), add_special_tokens=False)
    said, ends = tokenizer.encode("Green."), template.end_ids
    if template.ends_with_next:
        called.append(tokenizer.convert_tokens_to_ids(template.call_end))
    engine = says(called, [*said, ends[0]])
    settings = {"sampling": Sampling(100, stop_token_ids=ends), "template": template, "tokenizer": tokenizer}
    trajectory = play(TOOLS, engine, **settings)
    assert trajectory.unscored is None
    (sequence,) = trajectory.sequences
    assert sampled(sequence) == [*called, *said, ends[0]]
    observation = trajectory.texts[2].removeprefix("hello" + trajectory.texts[1])
    assert "'name': 'f', 'arguments': {'of': 'zqxvalue'}, 'error': None" in observation.replace('\\"', "'")
    assert tokenizer.decode(sequence.token_ids.tolist()) == trajectory.texts[2] + "Green." + tokenizer.decode(ends[:1])


def test_messages_that_the_template_refuses_are_unscored(play: Play) -> None:
    source = CHAT.replace("action + '?'", "''").replace('action + "?"', '""')
    trajectory = play(source, says([70]), text="")
    assert trajectory.unscored == "the environment's messages: messages[0] is empty"


def test_samples_of_a_prompt_get_the_same_task(play: Play) -> None:
    def task(**changes: int) -> str:
        return play(CHAT, says([70]), text="", max_turns=1, **changes).texts[0]

    assert task(sample=0) == task(sample=1)
    assert len({task(group=g, seed=s) for g in range(3) for s in range(3)}) == 9
    assert int(task().partition("task ")[2].partition("<")[0]) < 2**32, "numpy takes no more"


def test_a_response_may_be_taken_as_given(play: Play) -> None:
    """It keeps its reward, and its tokens train no more than the prompt's."""
    source = PREFIX.replace('"score"', '"train": turn != 1, "score"')
    trajectory = play(source, says([70, 71], [72]))
    (sequence,) = trajectory.sequences
    assert sampled(sequence) == [72]
    at = sequence.rewards.tolist().index(0.1)
    assert (sequence.token_ids[at], sequence.logps[at]) == (71, 0.0)


def test_changes_to_extra_info_stay_in_the_episode(play: Play) -> None:
    shared: dict[str, Any] = {"turns": 2, "notes": []}
    source = PREFIX.replace("    return", "    extra_info['notes'].append(action)\n    return")
    play(source, says([80], [81]), extra_info=shared)
    assert shared == {"turns": 2, "notes": []}


def test_each_request_has_a_seed_of_its_own(play: Play) -> None:
    engine = says([90], [91])
    play(PREFIX, engine)
    assert [sampling.seed for _, sampling in engine.requests] == [request_seed(3, 1, 2, turn) for turn in range(2)]
    seeds = [request_seed(s, g, k, t) for s in range(4) for g in range(4) for k in range(4) for t in range(4)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert request_seed(0, 1, 2, 3) == 3252311618909706447, "the same on every machine"
