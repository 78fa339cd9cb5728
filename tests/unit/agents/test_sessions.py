"""A session keeps what was sampled: a request that goes on continues the ids, and any other begins a sequence."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from conversations import TOOLS, Speaker, faults, play
from real_templates import tokenizer_with
from transformers import PreTrainedTokenizerBase

from RL2.agents.protocol import Reply, Request, RequestError
from RL2.agents.record import Turn
from RL2.agents.session import Policy, Session, token_texts
from RL2.data.template import Template
from RL2.data.tool_calls import ResponseParser
from RL2.engines.scripted import ScriptedEngine
from RL2.types import Completion, Sampling, Sequence

Say = Callable[..., Session]
ASK = {"role": "user", "content": "hello"}


@pytest.fixture
def says(tokenizer: PreTrainedTokenizerBase) -> Say:
    """A session whose engine gives one text after another, each with an end token."""

    def make(*texts: str | list[int], max_responses: int | None = None, max_length: int | None = None) -> Session:
        left = iter(texts)

        def reply(token_ids: list[int], sampling: Sampling) -> list[int]:
            text = next(left)
            return [*tokenizer.encode(text), tokenizer.eos_token_id] if isinstance(text, str) else text

        return Session(policy(tokenizer, ScriptedEngine(reply), max_length), SAMPLING, 1, max_responses)

    return make


SAMPLING = Sampling(max_new_tokens=64, stop_token_ids=(2,))


def policy(tokenizer: PreTrainedTokenizerBase, engine: ScriptedEngine, max_length: int | None = None) -> Policy:
    assert tokenizer.eos_token_id == SAMPLING.stop_token_ids[0]
    template = Template(tokenizer)
    return Policy(engine, tokenizer, template, ResponseParser(template), max_length)


def ask(session: Session, *messages: dict[str, Any], **more: Any) -> list[Reply]:
    return asyncio.run(session.respond(Request(messages=list(messages), **more)))


def sampled(sequence: Sequence) -> list[int]:
    return [i for i, action in zip(sequence.token_ids.tolist(), sequence.action_mask.tolist(), strict=True) if action]


def test_a_conversation_that_goes_on_is_one_sequence(says: Say, tokenizer: PreTrainedTokenizerBase) -> None:
    session = says("one", "two")
    (first,) = ask(session, ASK)
    ask(session, ASK, first.message, {"role": "user", "content": "more"})
    (sequence,) = session.record.sequences()
    assert tokenizer.decode(sequence.token_ids.tolist()) == (
        "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\none<|im_end|>\n"
        "<|im_start|>user\nmore<|im_end|>\n<|im_start|>assistant\ntwo<|im_end|>"
    )
    assert tokenizer.decode(sampled(sequence)) == "one<|im_end|>two<|im_end|>"


def test_ids_that_no_encoding_gives_are_continued(says: Say, tokenizer: PreTrainedTokenizerBase) -> None:
    letters = [tokenizer.encode(letter)[0] for letter in "apples"]
    assert tokenizer.encode("apples") != letters
    session = says([*letters, 2], "two")
    (first,) = ask(session, ASK)
    assert first.message["content"] == "apples"
    ask(session, ASK, first.message, ASK)
    (sequence,) = session.record.sequences()
    assert sampled(sequence)[: len(letters)] == letters


def test_a_response_without_an_end_token_gets_one_that_does_not_train(
    says: Say, tokenizer: PreTrainedTokenizerBase
) -> None:
    session = says("one two three four", "five")
    (first,) = ask(session, ASK, max_tokens=3)
    assert first.finish == "length"
    ask(session, ASK, first.message, ASK)
    (sequence,) = session.record.sequences()
    assert tokenizer.decode(sequence.token_ids.tolist()).count("<|im_end|>") == 4
    assert sampled(sequence).count(2) == 1


@pytest.mark.parametrize("changes", [{"content": "other"}, {"role": "user"}], ids=["content", "role"])
def test_a_rewritten_history_begins_a_sequence(says: Say, changes: dict[str, str]) -> None:
    session = says("one", "two")
    (first,) = ask(session, ASK)
    ask(session, ASK, first.message | changes, ASK)
    assert [len(sampled(s)) > 0 for s in session.record.sequences()] == [True, True]


def test_a_question_with_other_spaces_is_another_question(says: Say) -> None:
    session = says("one", "two")
    (first,) = ask(session, ASK)
    ask(session, ASK | {"content": "hello "}, first.message, ASK)
    assert len(session.record.sequences()) == 2


def test_branches_share_their_beginning_and_train_it_once(says: Say) -> None:
    session = says("one", "two", "three")
    (first,) = ask(session, ASK)
    ask(session, ASK, first.message, ASK)
    ask(session, ASK, first.message, {"role": "user", "content": "else"})
    left, right = session.record.sequences()
    begin = len(session.record.turns[0].token_ids)
    assert left.token_ids.tolist()[:begin] == right.token_ids.tolist()[:begin]
    assert any(left.action_mask[:begin]) and not any(right.action_mask[:begin])
    assert right.logps.tolist()[:begin] == [0.0] * begin and right.versions.tolist()[:begin] == [-1] * begin


def test_parallel_requests_are_sequences_with_samples_of_their_own(tokenizer: PreTrainedTokenizerBase) -> None:
    speaker = Speaker(tokenizer)
    session = Session(policy(tokenizer, speaker.engine), SAMPLING, 1)

    async def both() -> None:
        await asyncio.gather(session.respond(Request(messages=[ASK])), session.respond(Request(messages=[ASK], n=2)))

    asyncio.run(both())
    assert len(session.record.sequences()) == 3 and not faults(session.record.sequences(), speaker.log)
    assert len({tuple(each.token_ids) for each in speaker.log}) == 3


def test_the_order_in_which_requests_arrive_changes_no_sample(tokenizer: PreTrainedTokenizerBase) -> None:
    found = []
    for questions in (("a", "b"), ("b", "a")):
        speaker = Speaker(tokenizer)
        session = Session(policy(tokenizer, speaker.engine), SAMPLING, 1)
        for question in questions:
            ask(session, {"role": "user", "content": question})
        found.append(sorted(each.token_ids for each in speaker.log))
    assert found[0] == found[1]


def test_texts_and_ids_are_continued_too(says: Say, tokenizer: PreTrainedTokenizerBase) -> None:
    session = says("one", "two", "three")
    asyncio.run(session.respond(Request(prompt="hello")))
    asyncio.run(session.respond(Request(prompt="helloone and")))
    turn = session.record.turns[-1]
    asyncio.run(session.respond(Request(prompt=[*turn.token_ids, 5])))
    (sequence,) = session.record.sequences()
    assert tokenizer.decode(sampled(sequence)) == "one<|im_end|>two<|im_end|>three<|im_end|>"


def test_ids_without_a_token_never_reach_the_engine(says: Say, tokenizer: PreTrainedTokenizerBase) -> None:
    session = says("one", "two")
    asyncio.run(session.respond(Request(prompt=[5, 6])))
    for unknown in (len(tokenizer), 10**12):
        with pytest.raises(RequestError, match="tokenizer does not know"):
            asyncio.run(session.respond(Request(prompt=[*session.record.turns[0].token_ids, unknown])))


def test_a_prompt_without_a_response_is_not_continued(says: Say, tokenizer: PreTrainedTokenizerBase) -> None:
    session = says("", "two")
    asyncio.run(session.respond(Request(prompt="hello")))
    asyncio.run(session.respond(Request(prompt="hello world")))
    assert tokenizer.decode(session.record.sequences()[1].token_ids.tolist()) == "hello worldtwo<|im_end|>"


def test_a_conversation_that_ends_with_the_response_is_answered(says: Say) -> None:
    session = says("one", "two")
    (first,) = ask(session, ASK)
    (second,) = ask(session, ASK, first.message)
    assert second.message["content"] == "two"


def test_an_episode_of_thousands_of_turns_takes_linear_time_a_turn(says: Say) -> None:
    turns = 2000
    record = says().record
    parent, conversation = None, [ASK]
    for _ in range(turns):
        conversation = [*conversation, {"role": "assistant", "content": "one"}]
        parent = Turn(parent, [5], Completion([2], [-1.0], "stop", [0]), "", "one", "")
        parent.conversation = conversation
        record.turns.append(parent)
        conversation = [*conversation, ASK]
    compared = 0

    class Counted(dict[str, Any]):
        def get(self, key: str, default: Any = None) -> Any:
            nonlocal compared
            compared += key == "role"
            return super().get(key, default)

    assert record.after_messages([Counted(message) for message in conversation], {}) is parent
    assert compared < 10 * turns
    assert [len(sampled(sequence)) for sequence in record.sequences()] == [turns]


@pytest.mark.parametrize("has_tools", [True, False])
def test_a_client_without_tools_gets_calls_as_text(has_tools: bool) -> None:
    its = tokenizer_with("qwen3")
    text = 'So: <tool_call>\n{"name": "look_up", "arguments": {}}\n</tool_call>'
    engine = ScriptedEngine(lambda ids, sampling: its.encode(text, add_special_tokens=False))
    template = Template(its)
    session = Session(Policy(engine, its, template, ResponseParser(template), None), SAMPLING, 1)
    (reply,) = ask(session, ASK, arguments={"tools": TOOLS} if has_tools else {})
    assert reply.message["content"] == ("So:" if has_tools else text)
    assert ("tool_calls" in reply.message) is has_tools


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3"])
def test_reasoning_in_a_history_may_be_dropped_by_the_template(name: str) -> None:
    """A client sends what it has seen; after a result of a call, too, the template decides what stays of reasoning."""
    its = tokenizer_with(name)
    text = '<think>\nHm.\n</think>\n\n<tool_call>\n{"name": "look_up", "arguments": {"word": "x"}}\n</tool_call>'
    engine = ScriptedEngine(lambda ids, sampling: its.encode(text, add_special_tokens=False))
    template = Template(its)
    session = Session(Policy(engine, its, template, ResponseParser(template), None), SAMPLING, 1)
    tools = {"tools": TOOLS}
    (first,) = ask(session, ASK, arguments=tools)
    result = {"role": "tool", "tool_call_id": first.message["tool_calls"][0]["id"], "content": "found"}
    changed = {"role": "assistant", "content": "It is x.", "reasoning_content": "0.25"}
    ask(session, ASK, first.message, result, changed, ASK, arguments=tools)
    (sequence,) = session.record.sequences()
    read = its.decode(sequence.token_ids)
    assert "found" in read and "It is x." in read and "0.25" not in read


def test_texts_of_tokens_are_made_only_when_they_are_sent(says: Say) -> None:
    (reply,) = ask(says("one two"), ASK, stream=True)
    assert reply.token_texts == []


def test_a_stop_string_is_kept_and_not_shown(says: Say, tokenizer: PreTrainedTokenizerBase) -> None:
    session = says(tokenizer.encode("one STOP"))
    (reply,) = ask(session, ASK, stop=("STOP",))
    assert (reply.message["content"], reply.stop, reply.finish) == ("one ", "STOP", "stop")
    (sequence,) = session.record.sequences()
    assert tokenizer.decode(sampled(sequence)) == "one STOP"


def test_sampling_is_the_run_s(tokenizer: PreTrainedTokenizerBase) -> None:
    engine = ScriptedEngine(lambda ids, sampling: [5, 2])
    ask(Session(policy(tokenizer, engine), SAMPLING, 1), ASK, temperature=0.0, top_p=0.5, max_tokens=10**6)
    ask(Session(policy(tokenizer, engine), SAMPLING, 1, follows=True), ASK, temperature=0.0, top_p=0.5, max_tokens=3)
    (_, run), (_, client) = engine.requests
    assert (run.temperature, run.top_p, run.max_new_tokens) == (1.0, 1.0, 64)
    assert (client.temperature, client.top_p, client.max_new_tokens) == (0.0, 0.5, 3)


def test_limits_are_said(says: Say) -> None:
    session = says("one", "two", max_responses=1)
    (first,) = ask(session, ASK)
    with pytest.raises(RequestError, match=r"has had rollout.max_turns=1 responses"):
        ask(session, ASK, first.message, ASK)
    assert session.refused_responses
    session = says("one", max_length=10)
    with pytest.raises(RequestError, match="leaves no room for a response within 10 tokens"):
        ask(session, ASK)
    assert session.truncated and not session.record.turns


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "'messages' must be a list of at least one message"),
        ([{"role": "user", "content": "\ud800"}], "surrogate|Unicode|unicode"),
        ([ASK, {"role": "user"}], "has no 'content'"),
    ],
    ids=["none", "no text", "no content"],
)
def test_messages_that_cannot_be_read_are_refused(says: Say, messages: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        ask(says("one"), *messages)


def test_tools_that_the_template_drops_are_refused(says: Say) -> None:
    with pytest.raises(RequestError, match="leaves out the tool 'look_up'"):
        ask(says("one"), ASK, arguments={"tools": TOOLS})


def test_a_cancelled_request_is_not_recorded(tokenizer: PreTrainedTokenizerBase) -> None:
    class Slow(ScriptedEngine):
        async def generate(self, token_ids: list[int], sampling: Sampling) -> Any:
            await asyncio.sleep(30)

    session = Session(policy(tokenizer, Slow(lambda ids, sampling: [5])), SAMPLING, 1, max_responses=1)

    async def cancelled() -> None:
        task = asyncio.create_task(session.respond(Request(messages=[ASK])))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    for _ in range(2):  # a client that asks again has not had its response yet
        asyncio.run(cancelled())
    assert session.record.sequences() == [] and session.failure is None


def test_texts_of_tokens_are_the_text(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = [*tokenizer.encode("a 日本 \U0001f642 b"), 250, 251, *tokenizer.encode(" c"), 252]
    texts = list(token_texts(tokenizer, ids))
    assert len(texts) == len(ids) and "".join(texts) == tokenizer.decode(ids)
    assert "日" in texts and " c" in "".join(texts[-3:])


@pytest.mark.parametrize("name", ["chatml", "qwen3", "llama3_1"])
def test_every_sampled_token_trains_once(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """10,000 conversations take minutes: `python tests/conversations.py 10000`."""
    its = tokenizer if name == "chatml" else tokenizer_with(name)
    assert asyncio.run(play(its, list(range(30)), *([()] if name == "chatml" else []))) == []
