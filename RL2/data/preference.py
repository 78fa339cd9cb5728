"""Pairs of responses for reward models and preference optimisation: one was chosen, the other rejected."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from RL2.data.bad_rows import BadRows
from RL2.data.sft import Demonstration, Example, demonstration, encode_demonstrations, marked
from RL2.data.source import DataError, Row, from_json, keys, shown
from RL2.data.template import Template
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
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    example: Callable[[Row], Row | None] | None,
    max_length: int,
    notes: list[str] | None = None,
    bad: BadRows | None = None,
) -> tuple[list[Pair], int]:
    """Return the pairs of which both sequences have at most `max_length` tokens, and how many others were left out.

    Rows are {"prompt", "chosen", "rejected"}, three texts, or {"chosen", "rejected"}, two lists of messages that end
    with the assistant; `prompt` or `messages` stand before a side that does not repeat them. Or what `example` makes
    into these. What there is to say of them is added to `notes`. Rows that cannot be used go to `bad`; by default a
    DataError names them.
    """
    bad = bad or BadRows(path)
    sides: tuple[dict[int, Demonstration], ...] = ({}, {})
    for number, row in bad.load(example).items():
        with bad.row(number):
            pair = _pair(row)
            for side, each in zip(sides, pair, strict=True):
                side[number] = each
    template = Template(tokenizer)
    chosen, rejected = (encode_demonstrations(template, side, bad, notes) for side in sides)

    pairs = list[Pair]()
    for number in sorted(chosen.keys() & rejected.keys()):
        with bad.row(number):
            first, second = _response(chosen[number]), _response(rejected[number])
            if max(len(first[0]), len(second[0])) <= max_length:
                pairs.append((first, second))
    bad.settle()
    if not pairs:
        raise DataError(f"{path}: no pair within data.max_length={max_length}; raise it")
    if notes is not None:
        notes += _oddities(path, pairs)
        notes += [f"{path}, first pair, {side}: {marked(tokenizer, *pairs[0][n])}" for n, side in enumerate(SIDES)]
    return pairs, bad.total - bad.left_out - len(bad.found) - len(pairs)


def _oddities(path: str, pairs: list[Pair]) -> list[str]:
    """Return what there is to say of pairs that teach nothing, or something else than a preference."""
    same = sum(first[0] == second[0] for first, second in pairs)
    asked = [[ids[: mask.index(True)] for ids, mask in pair] for pair in pairs]
    other = sum(first != second for first, second in asked)
    said = [f"{path}: {same} pairs have the same response twice"] if same else []
    return said + ([f"{path}: {other} pairs answer different prompts"] if other else [])


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


def _side(row: Row, side: str) -> Row:
    """Return one side of the row in the format of supervised fine-tuning."""
    prompt, messages, answer = (_decoded(row.get(key)) for key in ("prompt", "messages", side))
    if answer is None:
        raise DataError(f"no {side!r}; its keys are {keys(row)}")
    if isinstance(answer, list):
        before = next((value for value in (prompt, messages) if isinstance(value, list)), None)
        if before is None and isinstance(prompt, str) and answer and _said(answer[0])[0] == "assistant":
            before = [{"role": "user", "content": prompt}]
        return row | {"prompt": None, "response": None, "messages": [*_missing(before or [], answer, side), *answer]}
    if not isinstance(answer, str):
        raise DataError(f"{side!r} must be text or a list of messages, not {shown(answer)}")
    if isinstance(prompt, list):
        prompt, messages = None, prompt
    if prompt is None and messages is None:
        raise DataError(f"{side!r} is text and answers nothing: the row needs a 'prompt'; its keys are {keys(row)}")
    return row | {"prompt": prompt, "messages": messages, "response": answer}


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
    if isinstance(first, str) and last not in MAY_FOLLOW.get(first, (last,)):
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


def _pair(row: Row) -> list[Demonstration]:
    """Return both sides; only the turns from where they part train, at least the last one."""
    chosen, rejected = (demonstration(_side(row, side), "all") for side in SIDES)
    if chosen.chat is None or rejected.chat is None:
        return [chosen, rejected]
    first, second = chosen.chat.messages, rejected.chat.messages
    longest = min(len(first), len(second)) - 1
    parted = next((n for n in range(longest) if _said(first[n]) != _said(second[n])), longest)
    return [replace(each, turns=[n for n in each.turns if n >= parted]) for each in (chosen, rejected)]


def _response(example: Example) -> Example:
    """Return the example up to the last token that trains."""
    token_ids, mask = example
    if True not in mask:
        raise DataError("no token to train on")
    end = len(mask) - mask[::-1].index(True)
    return token_ids[:end], mask[:end]
