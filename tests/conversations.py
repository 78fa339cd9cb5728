"""Conversations that clients have with the endpoint: they go on, branch, rewrite, run in parallel and use tools."""

from __future__ import annotations

import asyncio
import copy
import json
import sys
from dataclasses import dataclass, field
from random import Random
from typing import Any

from openai import AsyncOpenAI
from transformers import PreTrainedTokenizerBase

from RL2.agents.endpoint import Endpoint
from RL2.agents.session import Policy, Session
from RL2.data.template import Template
from RL2.data.tool_calls import ResponseParser
from RL2.engines.scripted import ScriptedEngine
from RL2.types import Sampling, Sequence

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "look_up",
            "description": "Look a word up.",
            "parameters": {"type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]},
        },
    }
]
WORDS = ["7", "seven ", " Ünï", "\n", "日本", "🙂", "e\u0301", "\u200bx", "<|im_end|>", "</think>", "{}", "\\n", '"']


CALL = '<tool_call>\n{"name": "look_up", "arguments": {"word": %s}}\n</tool_call>'
"""A call as many models write it, with a place for the word."""


@dataclass
class Sampled:
    """One request to the engine, and what it sampled."""

    prompt: list[int]
    token_ids: list[int]


@dataclass
class Speaker:
    """An engine that says random things: odd texts, reasoning, calls, and bytes that are no text."""

    tokenizer: PreTrainedTokenizerBase
    calls: tuple[str, ...] = ()
    """Calls as the model writes them, with a place for the word."""
    log: list[Sampled] = field(default_factory=list)

    @property
    def engine(self) -> ScriptedEngine:
        return ScriptedEngine(self.reply)

    def reply(self, token_ids: list[int], sampling: Sampling) -> list[int]:
        random = Random(sampling.seed)
        text = "".join(random.choices(WORDS, k=random.randrange(6)))
        if random.random() < 0.2:
            text = f"<think>\n{random.random()}\n</think>\n\n{text}"
        if self.calls and random.random() < 0.3:
            text += random.choice(self.calls) % json.dumps(random.choice(WORDS))
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        ids = [i for i in ids if i not in sampling.stop_token_ids]
        ids += random.choices(range(10, len(self.tokenizer)), k=random.randrange(1, 6))
        ids = ids[: sampling.max_new_tokens - 1]
        ids += [sampling.stop_token_ids[0]] if random.random() < 0.9 else [ids[0]] * sampling.max_new_tokens
        ids = ids[: sampling.max_new_tokens]
        stops = [i for i, token in enumerate(ids) if token in sampling.stop_token_ids]
        ids = ids[: stops[0] + 1] if stops else ids
        self.log.append(Sampled(list(token_ids), ids))
        return ids


async def converse(client: AsyncOpenAI, random: Random, tools: bool) -> None:
    """Have one conversation of a few requests, in one of the ways that programs have them."""
    settings: dict[str, Any] = {"model": "any", "max_tokens": random.choice([3, 20, 200])}
    if tools:
        settings["tools"] = TOOLS
    messages: list[dict[str, Any]] = [{"role": "system", "content": words(random)}] if random.random() < 0.5 else []
    messages.append({"role": "user", "content": words(random)})
    past: list[list[dict[str, Any]]] = []
    for _ in range(random.randrange(1, 5)):
        number = random.choice([1, 1, 1, 2])
        if random.random() < 0.2:
            answers = [await streamed(client, messages, settings)]
        elif random.random() < 0.2:  # sub-agents, some with the same conversation
            others = [*messages[:-1], {"role": "user", "content": words(random)}]
            each = [messages, random.choice([messages, others])]
            found = await asyncio.gather(*(client.chat.completions.create(messages=m, **settings) for m in each))  # type: ignore[call-overload]
            answers = [got.choices[0].message.model_dump() for got in found[:1]]
        else:
            got = await client.chat.completions.create(messages=messages, n=number, **settings)  # type: ignore[call-overload]
            answers = [choice.message.model_dump() for choice in got.choices]
        answer = random.choice(answers)
        messages = [*messages, answer]
        past.append(messages)
        for call in answer.get("tool_calls") or []:
            result = {"role": "tool", "tool_call_id": call["id"], "content": words(random)}
            messages = [*messages, result]
        if not answer.get("tool_calls") or random.random() < 0.3:
            messages = [*messages, {"role": "user", "content": words(random)}]
        messages = changed(random, messages, past)


async def streamed(client: AsyncOpenAI, messages: list[dict[str, Any]], settings: dict[str, Any]) -> dict[str, Any]:
    """Return the message of a stream, put together from its pieces."""
    content, calls = "", dict[int, dict[str, Any]]()
    stream = await client.chat.completions.create(messages=messages, stream=True, **settings)  # type: ignore[call-overload]
    async for chunk in stream:
        if chunk.choices:
            delta = chunk.choices[0].delta
            content += delta.content or ""
            for part in delta.tool_calls or []:
                call = calls.setdefault(part.index, {"type": "function", "function": {"name": "", "arguments": ""}})
                call["id"] = part.id or call["id"]
                call["function"]["name"] += part.function.name or ""
                call["function"]["arguments"] += part.function.arguments or ""
    return {"role": "assistant", "content": content} | ({"tool_calls": list(calls.values())} if calls else {})


def words(random: Random) -> str:
    return "w" + "".join(random.choices(WORDS, k=random.randrange(1, 4))).replace("<|im_end|>", "!")


def changed(random: Random, messages: list[dict[str, Any]], past: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return what the client sends next: mostly the conversation as it is, at times another history."""
    way = random.random()
    if way < 0.6:
        return messages
    messages = copy.deepcopy(messages)
    if way < 0.7:  # frameworks strip texts and drop keys that they do not know
        for message in messages:
            if message["role"] == "assistant":
                message["content"] = (message.get("content") or "").strip()
                for key in ("reasoning_content", "refusal", "annotations", "audio", "function_call"):
                    message.pop(key, None)
        return messages
    if way < 0.8:  # back to an earlier place
        return [*random.choice(past), {"role": "user", "content": words(random)}]
    if way < 0.9:  # another question at the beginning
        return [{"role": messages[0]["role"], "content": words(random)}, *messages[1:]]
    answers = [message for message in messages if message["role"] == "assistant"]
    random.choice(answers)["content"] = words(random)
    return messages


async def play(tokenizer: PreTrainedTokenizerBase, seeds: list[int], calls: tuple[str, ...] = (CALL,)) -> list[str]:
    """Have a conversation for each seed; return what is wrong with the records, a line each."""
    template = Template(tokenizer)
    endpoint, wrong = Endpoint(), []
    await endpoint.start()
    sampling = Sampling(max_new_tokens=200, stop_token_ids=(int(tokenizer.convert_tokens_to_ids(template.end)),))
    parser = ResponseParser(template)
    async with AsyncOpenAI(base_url=f"{endpoint.url}/v1", api_key="-", max_retries=0) as shared:
        for seed in seeds:
            speaker = Speaker(tokenizer, calls)
            session = Session(Policy(speaker.engine, tokenizer, template, parser, None), sampling, seed)
            with endpoint.serving(f"key-{seed}", session):
                client = shared.with_options(api_key=f"key-{seed}")
                await converse(client, Random(seed), tools=bool(seed % 2) and bool(speaker.calls))
            wrong += [f"conversation {seed}: {each}" for each in faults(session.record.sequences(), speaker.log)]
    await endpoint.close()
    return wrong


def faults(sequences: list[Sequence], log: list[Sampled]) -> list[str]:
    """Return where sequences and what the engine did differ."""
    found = []
    trained = sum(map(sum, (sequence.action_mask.tolist() for sequence in sequences)))
    if trained != sum(len(each.token_ids) for each in log):
        found.append(f"{trained} tokens train, {sum(len(each.token_ids) for each in log)} were sampled")
    for sampled in log:
        start, whole = len(sampled.prompt), sampled.prompt + sampled.token_ids
        masks = [
            s.action_mask.tolist()[start : len(whole)] for s in sequences if s.token_ids.tolist()[: len(whole)] == whole
        ]
        same = sum(each.prompt + each.token_ids == whole for each in log)
        if sum(map(all, masks)) != same or any(any(mask) != all(mask) for mask in masks):
            found.append(f"a response trains in {sum(map(all, masks))} sequences of {len(masks)}")
    return found


if __name__ == "__main__":
    from real_templates import tokenizer_with

    number = int(sys.argv[1])
    for name in ("qwen2_5", "qwen3", "llama3_1", "smollm2"):
        calls = () if name == "smollm2" else (CALL,)
        wrong = asyncio.run(play(tokenizer_with(name), list(range(number // 4)), calls))
        print(f"{name}: {number // 4} conversations, {len(wrong)} faults", *wrong[:10], sep="\n", flush=True)
