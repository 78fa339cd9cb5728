"""Pairs of responses for reward models and preference optimisation: one was chosen, the other rejected."""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from typing import Any

from transformers import PreTrainedTokenizerBase

from RL2.data.chat import from_json
from RL2.data.sft import Example, encode_rows
from RL2.data.source import DataError, Row, in_row, keys, load_converted, shown
from RL2.types import Sequence, Trajectory

Pair = tuple[Example, Example]
"""Chosen and rejected: token ids up to the end of the response, and which of them are the response."""
SIDES = ("chosen", "rejected")
MAY_FOLLOW = {
    "assistant": ("user", "tool", "system", "developer"),
    "user": ("system", "developer"),
    "tool": ("assistant",),
    "system": (),
}
"""Role of a side's first message -> roles that the messages before it may end with. After the assistant a user could go
on or begin another conversation, so that is not taken."""


def load_pairs(
    path: str, tokenizer: PreTrainedTokenizerBase, example: Callable[[Row], Row] | None, max_length: int
) -> tuple[list[Pair], int]:
    """The pairs of which both sequences have at most `max_length` tokens, and how many others were left out.

    Rows are {"prompt", "chosen", "rejected"}, three texts, or {"chosen", "rejected"}, two lists of messages that end
    with the assistant; `prompt` or `messages` stand before a side that does not repeat them. Or what `example` makes
    into these.
    """
    rows = load_converted(path, example)
    sides = list[list[Row]]()
    for side in SIDES:
        demonstrations = list[Row]()
        for number, row in enumerate(rows):
            with in_row(path, number):
                demonstrations.append(_demonstration(row, side))
        sides.append(demonstrations)
    encoded = [encode_rows(path, tokenizer, demonstrations) for demonstrations in sides]

    pairs = list[Pair]()
    for number, (chosen, rejected) in enumerate(zip(*sides, strict=True)):
        turns = _turns_in_common(chosen["messages"] or [], rejected["messages"] or [])
        with in_row(path, number):
            first, second = (_response(one[number], turns) for one in encoded)
        if max(len(first[0]), len(second[0])) <= max_length:
            pairs.append((first, second))
    if not pairs:
        raise DataError(f"{path}: no pair within data.max_length={max_length}; raise it")
    return pairs, len(rows) - len(pairs)


def as_responses(pairs: list[Pair]) -> list[Trajectory]:
    """Two sequences a pair, whose actions are the tokens of the response."""
    return [_trajectory(n, i, ids, mask) for n, pair in enumerate(pairs) for i, (ids, mask) in enumerate(pair)]


def as_scored(pairs: list[Pair]) -> list[Trajectory]:
    """Two sequences a pair, whose only action comes after the last token: there a reward model has read all of it.

    The label of that action is a token that nothing reads.
    """
    return [
        _trajectory(n, i, [*ids, ids[-1]], [False] * len(ids) + [True])
        for n, pair in enumerate(pairs)
        for i, (ids, _) in enumerate(pair)
    ]


def _trajectory(pair: int, side: int, token_ids: list[int], mask: list[bool]) -> Trajectory:
    zeros = [0.0] * len(token_ids)
    reward = [*zeros[1:], float(SIDES[side] == "chosen")]
    return Trajectory(row=pair, group=pair, sample=side, sequences=[Sequence(token_ids, mask, zeros, reward)])


def _demonstration(row: Row, side: str) -> Row:
    """Return one side of the row in the format of supervised fine-tuning."""
    prompt, messages, answer = (_decoded(row.get(key)) for key in ("prompt", "messages", side))
    if answer is None:
        raise DataError(f"no {side!r}; its keys are {keys(row)}")
    if isinstance(answer, list):
        before = next((value for value in (prompt, messages) if isinstance(value, list)), None)
        if before is None and isinstance(prompt, str) and answer and _said(answer[0])[0] == "assistant":
            before = [{"role": "user", "content": prompt}]
        return {"prompt": None, "messages": [*_missing(before or [], answer, side), *answer]}
    if not isinstance(answer, str):
        raise DataError(f"{side!r} must be text or a list of messages, not {shown(answer)}")
    if isinstance(prompt, list):
        prompt, messages = None, prompt
    if prompt is None and messages is None:
        raise DataError(f"{side!r} is text and answers nothing: the row needs a 'prompt'; its keys are {keys(row)}")
    return {"prompt": prompt, "messages": messages, "response": answer}


def _missing(before: list[Any], side: list[Any], name: str) -> list[Any]:
    """Return what of the messages `before` is to stand in front of a side: what the side does not repeat itself.

    A side may repeat all of them, their end or nothing, and in some data sets they are one whole side. Raise DataError
    where it cannot be told whether the side goes on from them or is another conversation.
    """
    context, turns = [_said(message) for message in before], [_said(message) for message in side]
    if not context or not turns:
        return []
    for size in range(min(len(context), len(turns)), 0, -1):
        if turns[:size] == context[-size:]:
            return before[:-size]
    if turns[0] == context[0] or any(turns[at : at + len(context)] == context for at in range(1, len(turns))):
        return []  # a whole conversation
    first, last = turns[0][0], context[-1][0]
    if first in MAY_FOLLOW and last not in MAY_FOLLOW[first]:
        raise DataError(
            f"{name!r} begins with the {first} and repeats nothing of 'messages' or 'prompt', which end with the "
            f"{last}; let both sides be whole conversations and leave the others out"
        )
    return before


def _said(message: Any) -> tuple[Any, ...]:
    """Return what makes two messages the same, whatever other keys they carry."""
    if not isinstance(message, dict):  # reported once the messages are checked
        return (None, message)
    content = message.get("content")
    return message.get("role"), content.strip() if isinstance(content, str) else content, message.get("tool_calls")


def _decoded(value: Any) -> Any:
    """Messages that were written as JSON, which not every text is that could be read as JSON: `2` is an answer."""
    decoded = from_json(value)
    return decoded if isinstance(decoded, list) and decoded and all(isinstance(x, dict) for x in decoded) else value


def _turns_in_common(chosen: list[Any], rejected: list[Any]) -> int:
    """Turns of the assistant before the conversations part; the last one always counts as a response."""
    common = 0
    for first, second in zip(chosen[:-1], rejected[:-1], strict=False):
        if first != second:
            break
        common += first["role"] == "assistant"
    return common


def _response(example: Example, turns: int) -> Example:
    """Without the first `turns` runs of marks, and up to the last mark."""
    token_ids, mask = example
    kept = list[bool]()
    for is_marked, run in groupby(mask):
        kept += [is_marked and turns <= 0] * len(list(run))
        turns -= is_marked
    if True not in kept:
        raise DataError("no token to train on")
    end = len(kept) - kept[::-1].index(True)
    return token_ids[:end], kept[:end]
