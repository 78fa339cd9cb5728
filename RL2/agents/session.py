"""One episode as the endpoint serves it: requests are encoded, sampled and recorded."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from RL2.agents.protocol import Reply, Request, RequestError
from RL2.agents.record import Record, Turn
from RL2.data.chat import Message, messages_of
from RL2.data.source import DataError
from RL2.data.template import Chat, Template
from RL2.data.tool_calls import ResponseParser, ToolCall
from RL2.engines.base import Engine
from RL2.rollout.continuation import decode, encode_text, next_text, without_end
from RL2.rollout.spans import REPLACEMENT
from RL2.rollout.step_result import Unscored
from RL2.types import Completion, Sampling

OPENED = 256
"""Number of characters at the end of a prompt in which it may open the reasoning."""
CALL_ID = 9
"""Number of characters in the identifier of a call; the templates of Mistral accept no other."""


@dataclass(frozen=True)
class Policy:
    """The model that answers, and how its texts are written."""

    engine: Engine
    tokenizer: PreTrainedTokenizerBase
    template: Template
    parser: ResponseParser
    max_length: int | None
    """Limit of a sequence in tokens."""


@dataclass(frozen=True)
class _Prompt:
    """Text that the model reads for a request."""

    parent: Turn | None
    added: list[int]
    """Token ids behind those of `parent`."""
    text: str
    """Text of all that the model reads."""
    messages: list[Message]
    """The conversation that was sent; empty if the client sent a text or token ids."""

    @cached_property
    def token_ids(self) -> list[int]:
        return [*(self.parent.token_ids if self.parent else []), *self.added]


class Session:
    """The requests of one client and their record.

    Temperature, top_p and top_k are those of `sampling`, with which the tokens train, whatever a client asks for;
    with `follows` they are the client's. A response ends at `max_new_tokens` or at the client's limit.
    """

    def __init__(
        self,
        policy: Policy,
        sampling: Sampling,
        seed: int | None,
        max_responses: int | None = None,
        follows: bool = False,
    ) -> None:
        """Begin an episode. Without a `seed`, only requests with one of their own can be repeated."""
        self.policy, self.sampling, self.seed, self.follows = policy, sampling, seed, follows
        self.max_responses = max_responses
        self.record = Record()
        self.begun = 0
        """Number of responses that were asked for, without those of clients that left."""
        self.truncated = False
        """True if the last response or prompt ran into a length limit."""
        self.refused_responses = False
        """True if the client asked for more than `max_responses`."""
        self.is_over = False
        """True once the episode has ended; responses that come later are not recorded."""
        self.failure: BaseException | None = None
        """Error of the engine, which stops the run."""
        self._asked: Counter[bytes] = Counter()

    async def respond(self, request: Request) -> list[Reply]:
        """Return `request.n` responses and record them. Raise RequestError if the request cannot be answered.

        A cancelled call records nothing: nobody has read its responses.
        """
        if self.max_responses is not None and self.begun + request.n > self.max_responses:
            self.refused_responses = True
            raise RequestError(f"the episode has had rollout.max_turns={self.max_responses} responses")
        prompt = self._prompt(request)
        length = len(prompt.token_ids)
        sampling = self._sampling(request, length)
        self.begun += request.n
        seeds = [self._seed(request, prompt, sampling) for _ in range(request.n)]
        try:
            completions = await asyncio.gather(
                *(self.policy.engine.generate(prompt.token_ids, replace(sampling, seed=seed)) for seed in seeds)
            )
        except asyncio.CancelledError:  # the client has left, and may ask again
            self.begun -= request.n
            raise
        except Exception as error:
            self.failure = error
            raise
        if self.is_over:
            raise RequestError("the episode has ended", 401)
        made = [
            self._reply(request, prompt, completion, sampling, seed)
            for completion, seed in zip(completions, seeds, strict=True)
        ]
        self.record.turns += [turn for turn, _ in made]
        self.truncated = any(completion.finish == "length" for completion in completions)
        return [reply for _, reply in made]

    def count(self, request: Request) -> int:
        """Return the number of tokens that a request's prompt would have. Raise RequestError if it cannot be read."""
        return len(self._prompt(request).token_ids)

    def _prompt(self, request: Request) -> _Prompt:
        try:
            messages = messages_of({"messages": request.messages}) if request.prompt is None else []
            return self._continued(request, messages) or self._begun(request, messages)
        except (DataError, Unscored) as error:
            raise RequestError(str(error), parameter="messages") from error

    def _continued(self, request: Request, messages: list[Message]) -> _Prompt | None:
        """Return the prompt of a request that continues a turn, or None."""
        policy, given = self.policy, request.prompt
        if isinstance(given, list):
            parent = self.record.after_ids(given)
            if parent is None:
                return None
            return _Prompt(parent, self._known(given[len(parent.token_ids) :]), decode(policy.tokenizer, given), [])
        if isinstance(given, str):
            parent = self.record.after_text(given)
            text = given
        else:
            parent = self.record.after_messages(messages, request.arguments)
            if parent is not None:
                new = messages[len(parent.conversation) :]
                text = next_text(policy.template, parent.text, new, parent.end, request.arguments)
        if parent is None:
            return None
        added = text[len(parent.text) :].removeprefix(parent.end)
        return _Prompt(parent, encode_text(policy.tokenizer, added, begins=False), text, messages)

    def _begun(self, request: Request, messages: list[Message]) -> _Prompt:
        """Return the prompt of a request that begins a conversation."""
        policy, given = self.policy, request.prompt
        if isinstance(given, list):
            return _Prompt(None, self._known(given), decode(policy.tokenizer, given), [])
        if isinstance(given, str):
            text, is_chat = given, False
        else:
            text = policy.template.ask(Chat(messages, request.arguments))
            is_chat = True
        token_ids = encode_text(policy.tokenizer, text, begins=not is_chat)
        if not token_ids:
            raise RequestError("the prompt has no tokens")
        return _Prompt(None, token_ids, text, messages)

    def _known(self, token_ids: list[int]) -> list[int]:
        """Return token ids that a client sent. Raise RequestError for ids without a token; the engine would fail."""
        number = len(self.policy.tokenizer)
        if not token_ids or not all(0 <= token < number for token in token_ids):
            raise RequestError("'prompt' has no token ids, or some that the tokenizer does not know", 400, "prompt")
        return token_ids

    def _sampling(self, request: Request, length: int) -> Sampling:
        """Return how a request with a prompt of `length` tokens is sampled. Raise RequestError if there is no room."""
        room = min(self.sampling.max_new_tokens, request.max_tokens or self.sampling.max_new_tokens)
        if self.policy.max_length is not None:
            room = min(room, self.policy.max_length - length)
        if room < 1:
            self.truncated = True
            raise RequestError(
                f"the prompt has {length} tokens, which leaves no room for a response within "
                f"{self.policy.max_length} tokens (context_length_exceeded)"
            )
        sampling = replace(
            self.sampling, max_new_tokens=room, stop=tuple(dict.fromkeys((*self.sampling.stop, *request.stop)))
        )
        if not self.follows:
            return sampling
        return replace(
            sampling,
            temperature=sampling.temperature if request.temperature is None else request.temperature,
            top_p=sampling.top_p if request.top_p is None else request.top_p,
        )

    def _seed(self, request: Request, prompt: _Prompt, sampling: Sampling) -> int:
        """Return a seed that depends on the session, the request, and how often it was made before.

        Requests of several threads get the same tokens in whatever order they arrive.
        """
        seed = self.seed
        if seed is None:
            seed = secrets.randbits(63) if request.seed is None else 0
        what = repr((seed, request.seed, prompt.token_ids, sampling.max_new_tokens, sampling.stop)).encode()
        digest = hashlib.blake2b(what, digest_size=8).digest()
        number = self._asked[digest]
        self._asked[digest] += 1
        again = hashlib.blake2b(digest + number.to_bytes(8), digest_size=8).digest()
        return int.from_bytes(again) >> 1

    def _reply(
        self, request: Request, prompt: _Prompt, completion: Completion, sampling: Sampling, seed: int
    ) -> tuple[Turn, Reply]:
        tokenizer = self.policy.tokenizer
        sampled, end = without_end(tokenizer, completion, sampling)
        action = decode(tokenizer, sampled)
        text, stop = _up_to_stop(action, sampling.stop) if completion.finish == "stop" and not end else (action, None)
        message = self._message(request, text, prompt.text[-OPENED:], seed)
        has_calls = bool(message.get("tool_calls"))
        turn = Turn(prompt.parent, prompt.added, completion, prompt.text, action, end)
        if request.prompt is None:
            turn.conversation = [*prompt.messages, message]
            turn.arguments = request.arguments
        return turn, Reply(
            message=message,
            token_ids=completion.token_ids,
            token_texts=list(token_texts(tokenizer, completion.token_ids)) if request.logprobs else [],
            logps=completion.logps,
            finish="tool_calls" if has_calls and completion.finish == "stop" else completion.finish,
            stop=stop,
            prompt_tokens=len(prompt.token_ids),
        )

    def _message(self, request: Request, text: str, opened: str, seed: int) -> Message:
        """Return the assistant's message that the text of a response makes."""
        if request.prompt is not None:
            return {"role": "assistant", "content": text}
        tools = request.arguments.get("tools") or []
        # calls that cannot be read, and those of a client that offers no tools, stay in the text
        found = self.policy.parser.parse(text, opened, tools, reads_calls=bool(tools))
        calls = [call for call in found.calls if call.error is None]
        left = [call.text for call in found.calls if call.error is not None]
        message: Message = {"role": "assistant", "content": "\n".join(filter(None, [found.content, *left]))}
        if found.reasoning:
            message["reasoning_content"] = found.reasoning
        if calls:
            message["tool_calls"] = _calls(calls if request.parallel_calls else calls[:1], seed)
        return message


def _calls(calls: list[ToolCall], seed: int) -> list[dict[str, Any]]:
    """Return the calls of a response in the form of messages."""
    names = [hashlib.blake2b(repr((seed, n)).encode()).hexdigest()[:CALL_ID] for n in range(len(calls))]
    return [
        {"id": name, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        for name, call in zip(names, calls, strict=True)
    ]


def _up_to_stop(text: str, stops: tuple[str, ...]) -> tuple[str, str | None]:
    """Return the text before the first stop string in it, and that string; the whole text and None if there is none."""
    found = [(text.index(stop), stop) for stop in stops if stop in text]
    if not found:
        return text, None
    at, stop = min(found)
    return text[:at], stop


def token_texts(tokenizer: PreTrainedTokenizerBase, token_ids: list[int]) -> Iterator[str]:
    """Yield the text of each token; together they are the text of all. A character belongs to its last token."""
    whole, shown = decode(tokenizer, token_ids), 0
    start, read = 0, 0  # tokenizers treat the first token of a text differently: decode with the last ones before
    for number in range(1, len(token_ids)):
        before, text = decode(tokenizer, token_ids[start:read]), decode(tokenizer, token_ids[start:number])
        piece = text[len(before) :]
        if text.endswith(REPLACEMENT) or not whole.startswith(piece, shown):
            yield ""
            continue
        shown += len(piece)
        start, read = read, number
        yield piece
    yield whole[shown:]
