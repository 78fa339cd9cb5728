"""A request to the endpoint and its replies, in the form that all protocols are translated to and from.

Each protocol is one module with the functions of `Protocol`. Messages and tools have the form of chat templates: that
of OpenAI's chat API, with `reasoning_content` for reasoning and the arguments of calls as objects.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal
from typing import Protocol as Interface

from RL2.data.chat import Message

Event = tuple[str | None, dict[str, Any] | str]
"""A server-sent event: its name, if it has one, and its data."""


class RequestError(Exception):
    """An error of the client, which gets `status` and the message."""

    def __init__(self, message: str, status: int = 400, parameter: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.parameter = parameter
        """Name of the parameter at fault."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """A request for responses, whatever protocol it came in. None stands for what was not given."""

    messages: list[Message] = field(default_factory=list)
    """The conversation; empty if `prompt` is given."""
    prompt: str | list[int] | None = None
    """Text or token ids to continue, in place of a conversation."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Arguments of the chat template besides the messages: `tools` and its own settings."""
    model: str = ""
    """Name that the client gave; it is returned as it is."""
    n: int = 1
    """Number of responses."""
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    stop: tuple[str, ...] = ()
    seed: int | None = None
    logprobs: bool = False
    """The client wants the log-probability of each sampled token."""
    stream: bool = False
    stream_usage: bool = False
    """The client wants the numbers of tokens at the end of a stream."""
    parallel_calls: bool = True
    """False: only the first tool call of a response counts."""


@dataclass(frozen=True, kw_only=True)
class Reply:
    """One response to a request."""

    message: Message
    """The assistant's message: `content`, and where there are any `reasoning_content` and `tool_calls`, each
    `{"id": ..., "type": "function", "function": {"name": ..., "arguments": object}}`."""
    token_ids: list[int]
    """All sampled tokens, with the end token."""
    token_texts: list[str]
    """Text of each token; together they are the text of the response, with its end token. Empty without `logprobs`."""
    logps: list[float]
    finish: Literal["stop", "length", "tool_calls"]
    stop: str | None = None
    """The stop string that ended it; `message` does not contain it."""
    prompt_tokens: int = 0


class Protocol(Interface):
    """Functions of a module that translates one protocol."""

    def read(self, body: dict[str, Any]) -> Request:
        """Return the request that the JSON object `body` makes. Raise RequestError if it is not one."""
        ...

    def answer(self, request: Request, replies: list[Reply]) -> dict[str, Any]:
        """Return the JSON object that answers `request`."""
        ...

    def events(self, request: Request, replies: list[Reply]) -> Iterator[Event]:
        """Return the server-sent events that answer `request` when it asks for a stream."""
        ...

    def error(self, error: RequestError) -> dict[str, Any]:
        """Return the JSON object of an error."""
        ...
