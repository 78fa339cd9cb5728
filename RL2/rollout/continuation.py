"""The tokens of a conversation as it goes on: sampled ids stay as they are, and what is added to them is encoded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from RL2.data.chat import encode, head_of, messages_of, unicode
from RL2.data.source import DataError
from RL2.data.template import Chat, Template
from RL2.rollout.step_result import State, Unscored
from RL2.types import Completion, Sampling, Sequence

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RESPONSE = "[[response]]"
"""Placeholder of a response, to find out what the chat template writes after one."""


def decode(tokenizer: PreTrainedTokenizerBase, token_ids: list[int]) -> str:
    """Return the text of token ids, special tokens written out."""
    text = tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


def without_end(
    tokenizer: PreTrainedTokenizerBase, completion: Completion, sampling: Sampling
) -> tuple[list[int], str]:
    """Return the tokens of a response without its end token, and the text of that; '' if it has none."""
    sampled = completion.token_ids
    if completion.finish == "stop" and sampled[-1] in sampling.stop_token_ids:
        return sampled[:-1], decode(tokenizer, sampled[-1:])
    return sampled, ""


def first_text(template: Template, state: State, arguments: dict[str, Any] | None = None) -> str:
    """Return a state as text, messages through the chat template. Raise Unscored if it refuses them."""
    return state if isinstance(state, str) else _render(template, [], state, arguments or {})


def next_text(template: Template, so_far: str, state: State, end: str, arguments: dict[str, Any]) -> str:
    """Return `state` as text; messages are written behind `so_far` as the chat template writes them behind a response.

    `end`: text of the end token that was sampled behind `so_far`, if one was. It is then the only one there. Raise
    Unscored if the template cannot write the messages there.
    """
    if isinstance(state, str):
        return state
    if template.call_text and state and state[0].get("role") == "tool":
        observation = _behind_calls(template, state, arguments)
    else:
        before = [{"role": "user", "content": "."}, {"role": "assistant", "content": RESPONSE}]
        observation = _render(template, before, state, arguments).partition(RESPONSE)[2]
        _refuse_lost_results(template, state, observation)
    if not observation:
        raise Unscored("the chat template drops responses; let step return the whole next state as text")
    if end:
        written = next((text for text in template.ends if observation.startswith(text)), "")
        if written != end and template.ends_with_next:  # it belongs to the next turn
            written = ""
        observation = end + observation.removeprefix(written)
    return so_far + observation


def _behind_calls(template: Template, messages: list[dict[str, Any]], arguments: dict[str, Any]) -> str:
    try:
        return template.behind_calls(messages_of({"messages": messages}), arguments)
    except DataError as error:
        raise Unscored(f"the environment's messages: {error}") from error


def _refuse_lost_results(template: Template, messages: list[dict[str, Any]], observation: str) -> None:
    """Raise Unscored if the text of new messages lacks the result of a tool."""
    try:
        for message in messages:
            if message.get("role") == "tool":
                template.refuse_lost(message, observation)
    except DataError as error:
        raise Unscored(str(error)) from error


def observe(
    tokenizer: PreTrainedTokenizerBase, sequence: Sequence, so_far: str, state: str, end: str
) -> tuple[Sequence, list[int]]:
    """Return the sequence that the next response belongs to, and the tokens that the environment adds to it.

    `so_far` is the text up to the response, without its `end` token, and `state` the environment's next state. If that
    does not begin with `so_far`, the environment has rewritten the history: the sampled tokens stay in their sequence,
    and a new one begins.
    """
    if state.startswith(so_far):
        # the end token was sampled; the environment may write its text out
        return sequence, encode_text(tokenizer, state[len(so_far) :].removeprefix(end), begins=False)
    head = head_of(tokenizer)
    return Sequence(), encode_text(tokenizer, state, begins=sequence.token_ids[: len(head)].tolist() == head)


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str, *, begins: bool = True) -> list[int]:
    """Return the ids of `text`, which with `begins` is the beginning of what the model reads."""
    try:
        unicode(text, "the environment's state")
    except DataError as error:
        raise Unscored(str(error)) from error
    return encode(tokenizer, [text], begins=begins)[0]


def append(
    sequence: Sequence,
    token_ids: list[int],
    logps: list[float] | None = None,
    versions: list[int] | None = None,
    experts: Tensor | None = None,
) -> None:
    """Append tokens: those with log-probabilities and versions were sampled, those without were given.

    `experts` are those of all tokens that the engine has run for the sequence.
    """
    number = len(token_ids)
    added = Sequence(
        token_ids,
        np.full(number, logps is not None),
        np.zeros(number) if logps is None else logps,
        np.zeros(number),
        np.full(number, -1) if versions is None else versions,
    )
    assert len(added.logps) == number, "an engine gives each token its log-probability"
    assert len(added.versions) == number, "an engine gives each token its version"
    for name in ("token_ids", "action_mask", "logps", "rewards", "versions"):
        setattr(sequence, name, np.concatenate([getattr(sequence, name), getattr(added, name)]))
    if experts is not None:  # tokens that have experts keep them, although a later turn may run them again
        known = [] if sequence.experts is None else [sequence.experts]
        sequence.experts = torch.cat([*known, experts[sum(map(len, known)) :]])
        assert len(sequence.experts) == len(sequence) - 1, "an engine records every token that it runs"


def _render(
    template: Template, before: list[dict[str, Any]], messages: list[dict[str, Any]], arguments: dict[str, Any]
) -> str:
    """Return the conversation as text, with the header of the next response."""
    try:
        chat = Chat(before + messages_of({"messages": messages}), arguments)
        return template.render(chat, add_generation_prompt=True)
    except DataError as error:
        raise Unscored(f"the environment's messages: {error}") from error
