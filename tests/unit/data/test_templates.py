"""Chat templates of real models, as the package trl carries them, and SmolLM2's: what trains, and where a turn ends."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from real_templates import FILES, tokenizer_with
from transformers import PreTrainedTokenizerFast

from RL2.data.prompts import load_prompts
from RL2.data.sft import load_examples
from RL2.data.source import DataError
from RL2.data.template import Template

pytestmark = pytest.mark.skipif(not FILES, reason="trl is not installed")

TOOL = {
    "type": "function",
    "function": {
        "name": "get_tide",
        "description": "The tide at a harbour.",
        "parameters": {
            "type": "object",
            "properties": {"harbour": {"type": "string", "description": "Its name."}},
            "required": ["harbour"],
        },
    },
}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def said(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def call(arguments: Any, content: str | None = "") -> dict[str, Any]:
    function = {"name": "get_tide", "arguments": arguments}
    return said(content or "", tool_calls=[{"id": "c12345678", "type": "function", "function": function}])  # fmt: skip


TALK = [user("A colour?"), said("Green."), user("Another?"), said("Blue.")]
THOUGHT = [user("A colour?"), said("Green.", reasoning_content="Hm, a colour.")]
TIDE = [
    user("High tide at Pell?"),
    call('{"harbour": "Pell"}'),
    {"role": "tool", "tool_call_id": "c12345678", "name": "get_tide", "content": "06:12"},
    said("At 06:12."),
]


@pytest.fixture(scope="module")
def tokenizer_of() -> Callable[[str], PreTrainedTokenizerFast]:
    return tokenizer_with


def jsonl(folder: Path, row: Any) -> str:
    (file := folder / "rows.jsonl").write_text(json.dumps(row))
    return str(file)


def trained(
    folder: Path, tokenizer: PreTrainedTokenizerFast, messages: list[Any], **row: Any
) -> list[tuple[list[int], str]]:
    """Of each run of tokens that train, the tokens before it and its text."""
    ((trajectory,), _) = load_examples(jsonl(folder, {"messages": messages, **row}), tokenizer, None, 10**5)
    (sequence,) = trajectory.sequences
    runs, at = [], 0
    for is_trained, run in groupby(sequence.action_mask.tolist()):
        length = len(list(run))
        if is_trained:
            text = tokenizer.decode(sequence.token_ids.tolist()[at : at + length], clean_up_tokenization_spaces=False)
            runs.append((sequence.token_ids.tolist()[:at], str(text)))
        at += length
    return runs


NO_THOUGHT, TOOL_CALL = (
    "<think>\n\n</think>\n\n",
    '<tool_call>\n{"name": "get_tide", "arguments": {"harbour": "Pell"}}\n',
)
XML_CALL = "<tool_call>\n<function=get_tide>\n<parameter=harbour>\nPell\n</parameter>\n</function>\n</tool_call>"
EXPECTED: dict[str, tuple[list[str], list[str] | None]] = {
    # name: what trains of TALK, and of TIDE; None where the template knows no tools
    "cohere": (["Green.<|END_OF_TURN_TOKEN|>", "Blue.<|END_OF_TURN_TOKEN|>"], None),
    "cohere2": (
        ["Green.<|END_RESPONSE|><|END_OF_TURN_TOKEN|>", "Blue.<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"],
        None,
    ),
    "gemma": (["Green.<end_of_turn>", "Blue.<end_of_turn>"], None),
    "gemma3": (["Green.<end_of_turn>", "Blue.<end_of_turn>"], None),
    "gemma4_v2": (
        ["Green.<turn|>", "Blue.<turn|>"],
        ['<|tool_call>call:get_tide{harbour:<|"|>Pell<|"|>}<tool_call|><turn|>', "At 06:12.<turn|>"],
    ),
    "glm4moe": (
        ["\n<think></think>\nGreen.<|user|>", "\n<think></think>\nBlue.<|user|>"],
        [
            "\n<think></think>\n<tool_call>get_tide\n<arg_key>harbour</arg_key>\n<arg_value>Pell</arg_value>\n"
            "</tool_call><|observation|>",
            "\n<think></think>\nAt 06:12.<|user|>",
        ],
    ),
    "gptoss": (
        ["<|channel|>final<|message|>Blue.<|return|>"],
        [
            ' to=functions.get_tide<|channel|>commentary json<|message|>{"harbour": "Pell"}<|call|>',
            "<|channel|>final<|message|>At 06:12.<|return|>",
        ],
    ),
    "idefics3": ([" Green.<end_of_utterance>", " Blue.<end_of_utterance>"], None),
    "lfm2_2_5": (
        ["Green.<|im_end|>", "Blue.<|im_end|>"],
        ["<|tool_call_start|>[get_tide(harbour='Pell')]<|tool_call_end|><|im_end|>", "At 06:12.<|im_end|>"],
    ),
    "llama3": (["Green.<|eot_id|>", "Blue.<|eot_id|>"], None),
    "llama3_1": (
        ["Green.<|eot_id|>", "Blue.<|eot_id|>"],
        ['{"name": "get_tide", "parameters": {"harbour": "Pell"}}<|eot_id|>', "At 06:12.<|eot_id|>"],
    ),
    "llama3_2": (
        ["Green.<|eot_id|>", "Blue.<|eot_id|>"],
        ['{"name": "get_tide", "parameters": {"harbour": "Pell"}}<|eot_id|>', "At 06:12.<|eot_id|>"],
    ),
    "nemotron_3_nano": (
        ["</think>Blue.<|im_end|>"],
        ["</think>At 06:12.<|im_end|>"],
    ),
    "phi3": (["Green.<|end|>", "Blue.<|end|>"], None),
    "phi3_5": (["Green.<|end|>", "Blue.<|end|>"], None),
    "qwen2_5": (
        ["Green.<|im_end|>", "Blue.<|im_end|>"],
        [f"{TOOL_CALL}</tool_call><|im_end|>", "At 06:12.<|im_end|>"],
    ),
    "qwen2_5_training": (
        ["Green.<|im_end|>", "Blue.<|im_end|>"],
        [f"{TOOL_CALL}</tool_call><|im_end|>", "At 06:12.<|im_end|>"],
    ),
    "qwen3": ([f"{NO_THOUGHT}Blue.<|im_end|>"], [f"{NO_THOUGHT}At 06:12.<|im_end|>"]),
    "qwen3_training": (
        [f"{NO_THOUGHT}Green.<|im_end|>", f"{NO_THOUGHT}Blue.<|im_end|>"],
        [f"{NO_THOUGHT}{TOOL_CALL}</tool_call><|im_end|>", f"{NO_THOUGHT}At 06:12.<|im_end|>"],
    ),
    "qwen3_5_nothink": (["Blue.<|im_end|>"], [f"{XML_CALL}<|im_end|>", "At 06:12.<|im_end|>"]),
    "qwen3_6": (
        ["\n</think>\n\nBlue.<|im_end|>"],
        [f"\n</think>\n\n{XML_CALL}<|im_end|>", "\n</think>\n\nAt 06:12.<|im_end|>"],
    ),
    "qwen3_instruct_2507": (
        ["Green.<|im_end|>", "Blue.<|im_end|>"],
        [f"{TOOL_CALL}</tool_call><|im_end|>", "At 06:12.<|im_end|>"],
    ),
    "qwen3_vl": (
        ["Green.<|im_end|>", "Blue.<|im_end|>"],
        [f"{TOOL_CALL}</tool_call><|im_end|>", "At 06:12.<|im_end|>"],
    ),
    "smollm2": (["Green.<|im_end|>", "Blue.<|im_end|>"], None),
    "smolvlm": ([" Green.<end_of_utterance>", " Blue.<end_of_utterance>"], None),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_what_trains(name: str, tmp_path: Path, tokenizer_of: Callable[[str], PreTrainedTokenizerFast]) -> None:
    tokenizer, (of_talk, of_tide) = tokenizer_of(name), EXPECTED[name]
    assert [text for _, text in trained(tmp_path, tokenizer, TALK)] == of_talk
    if of_tide is None:
        with pytest.raises(DataError, match="row 1: the chat template"):
            trained(tmp_path, tokenizer, TIDE, tools=[TOOL])
    else:
        assert [text for _, text in trained(tmp_path, tokenizer, TIDE, tools=[TOOL])] == of_tide


@pytest.mark.parametrize("name", FILES)
def test_what_trains_is_what_a_policy_would_sample(
    name: str, tmp_path: Path, tokenizer_of: Callable[[str], PreTrainedTokenizerFast]
) -> None:
    """The last turn stands behind the very tokens that reinforcement learning sends, and ends where sampling does."""
    tokenizer = tokenizer_of(name)
    ends = Template(tokenizer).ends
    tried = 0
    for messages, row in ((TALK, {}), (THOUGHT, {}), (TIDE, {"tools": json.dumps([TOOL])})):
        question = {"messages": messages[:-1], **row}
        try:
            runs = trained(tmp_path, tokenizer, messages, **row)
            (prompt,) = load_prompts(jsonl(tmp_path, question), tokenizer, None, 10**5)
        except DataError as error:
            if re.search("the chat template (leaves out|refuses|breaks|begins each)", str(error)):
                continue
            raise
        tried += 1
        before, text = runs[-1]
        if not name.endswith("_training"):  # these say themselves what trains
            assert before == prompt.token_ids, tokenizer.decode(before)
        assert messages[-1]["content"] in text
        assert text.endswith(ends)
        assert sum(text.count(end) for end in ends) == 1
        for _, earlier in runs[:-1]:
            assert earlier.endswith((*ends, "<|end|>"))
    assert tried or name.startswith(("deepseek", "nemotron"))


def test_reasoning_is_written_as_the_template_writes_it(
    tmp_path: Path, tokenizer_of: Callable[[str], PreTrainedTokenizerFast]
) -> None:
    """Under any key, or in the content; where the prompt opens it, it is not opened again."""
    inline = [user("A colour?"), said("<think>\nHm, a colour.\n</think>\n\nGreen.")]
    for name, wanted in {
        "qwen3": "<think>\nHm, a colour.\n</think>\n\nGreen.<|im_end|>",
        "qwen3_6": "Hm, a colour.\n</think>\n\nGreen.<|im_end|>",
        "qwen3_8": "Hm, a colour.\n</think>\n\nGreen.<|im_end|>",
        "deepseek_r1_distill": "Hm, a colour.\n</think>\n\nGreen.<\uff5cend\u2581of\u2581sentence\uff5c>",
        "gptoss": "<|channel|>analysis<|message|>Hm, a colour.<|end|><|start|>assistant"
        "<|channel|>final<|message|>Green.<|return|>",
        "lfm2_2_5": "<think>Hm, a colour.</think>Green.<|im_end|>",
    }.items():
        for key in ("reasoning_content", "reasoning", "thinking"):
            thought = [user("A colour?"), said("Green.", **{key: "Hm, a colour."})]
            assert [text for _, text in trained(tmp_path, tokenizer_of(name), thought)] == [wanted]
        assert [text for _, text in trained(tmp_path, tokenizer_of(name), inline)] == [wanted]
    for name in ("qwen2_5", "llama3", "gemma"):
        with pytest.raises(DataError, match="leaves out the reasoning of the assistant: 'Hm, a colour"):
            trained(tmp_path, tokenizer_of(name), THOUGHT)
