"""Preference pairs for reward models and preference optimisation: a chosen and a rejected response."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from RL2.data.bad_rows import BadRows
from RL2.data.cache import key, table
from RL2.data.sft import Demonstration, Example, demonstration, encode_demonstrations, marked, said_of
from RL2.data.source import DataError, Row, from_json, keys, shown
from RL2.data.table import Table, TableView, Writer
from RL2.data.template import Template
from RL2.io.progress import Progress

Pair = tuple[Example, Example]
"""The chosen and the rejected side, each as token ids up to the end of the response and the mask of the response."""
SIDES = ("chosen", "rejected")
IDS = ("chosen_ids", "rejected_ids")
"""Columns of the sides of rows that are written in token ids."""
COLUMNS = ("ids", "trains")
"""Columns of a table of pairs; each pair takes two rows."""
SAME, OTHER = "have the same response twice", "answer different prompts"
"""Faults of pairs that are counted and reported."""
MAY_FOLLOW = {
    "assistant": ("user", "tool", "system", "developer"),
    "user": ("system", "developer"),
    "tool": ("assistant",),
    "system": (),
}
"""Role of a side's first message -> roles that may come directly before it.

A user after the assistant is not accepted: it could continue the conversation or begin another.
"""


class Pairs(TableView[Pair]):
    """Pairs of a data set, read from the table on access. Row 2n is the chosen side of pair n."""

    def __init__(self, table: Table) -> None:
        super().__init__(table)
        self.ids, self.trains = (table.columns[name] for name in COLUMNS)

    def __len__(self) -> int:
        return len(self.table) // 2

    def item(self, number: int) -> Pair:
        first = 2 * number
        chosen, rejected = ((self.ids[n].tolist(), self.trains[n].tolist()) for n in (first, first + 1))
        return chosen, rejected


def load_pairs(
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    example: Callable[[Row], Row | None] | None,
    max_length: int,
    notes: list[str] | None = None,
    bad: BadRows | None = None,
    progress: Progress | None = None,
    template: Template | None = None,
) -> tuple[Pairs, int]:
    """Return the pairs whose sequences have at most `max_length` tokens, and the number of pairs left out as longer.

    Rows are {"prompt", "chosen", "rejected"} with three texts, {"prompt_ids", "chosen_ids", "rejected_ids"} with three
    lists of token ids, which are used as they are, or {"chosen", "rejected"} with two lists of messages that end with
    the assistant. `prompt` or `messages` precede a side that does not repeat them. `example` may convert other rows
    into these. Notes about the rows are appended to `notes`. Unusable rows go to `bad`; without it they raise
    DataError. `template` is the tokenizer's, if it has been analysed before.
    """
    bad, known = bad or BadRows(path), template or Template(tokenizer)

    def build(writer: Writer, tell: Callable[[float], None]) -> dict[str, Any]:
        counts = {side: Counter[str]() for side in SIDES}
        odd = Counter[str]()
        for rows in bad.pieces(example, tell):
            pairs = _encoded(known, rows, bad, counts, max_length)
            _count(odd, pairs)
            sides = [side for pair in pairs for side in pair]
            writer.add(ids=[ids for ids, _ in sides], trains=[mask for _, mask in sides])
        bad.settle()
        if not writer.rows:
            raise DataError(f"{path}: no pair within data.max_length={max_length}; raise it")
        return {"counts": counts, "odd": odd}

    settings = {"kind": "pairs", "max_length": max_length, "skip": bad.skip}
    found = table(
        bad, key(bad.source, tokenizer, example, settings), COLUMNS, build, progress or Progress(speaks=False)
    )
    pairs = Pairs(found)
    if notes is not None:
        for side in SIDES:
            notes += said_of(path, found.about["counts"][side])
        odd = found.about["odd"]
        notes += [f"{path}: {odd[what]} pairs {what}" for what in (SAME, OTHER) if odd.get(what)]
        notes += [f"{path}, first pair, {side}: {marked(tokenizer, *pairs[0][n])}" for n, side in enumerate(SIDES)]
    return pairs, bad.total - bad.left_out - len(bad.found) - len(pairs)


def _encoded(
    template: Template, rows: dict[int, Row], bad: BadRows, counts: dict[str, Counter[str]], max_length: int
) -> list[Pair]:
    """Return the pairs of the rows that are usable and short enough."""
    sides: dict[str, dict[int, Demonstration]] = {side: {} for side in SIDES}
    found: dict[int, Pair] = {}
    for number, row in rows.items():
        with bad.row(number):
            if row.get("prompt_ids") is not None:
                found[number] = _of_ids(row)
                continue
            for side, each in zip(SIDES, _pair(row), strict=True):
                sides[side][number] = each
    chosen, rejected = (encode_demonstrations(template, sides[side], bad, counts[side]) for side in SIDES)
    for number in sorted(chosen.keys() & rejected.keys()):
        with bad.row(number):
            found[number] = until_the_response_ends(chosen[number]), until_the_response_ends(rejected[number])
    return [pair for _, pair in sorted(found.items()) if max(len(ids) for ids, _ in pair) <= max_length]


def _of_ids(row: Row) -> Pair:
    """Return a pair that is written in token ids, such as those of `rl2 credit --pairs`."""

    def ids_of(name: str) -> list[int]:
        ids = row.get(name)
        if not isinstance(ids, list) or not ids or any(type(one) is not int or not 0 <= one < 1 << 31 for one in ids):
            raise DataError(f"{name} must be a list of token ids, not {shown(ids)}")
        return ids

    before = ids_of("prompt_ids")
    chosen, rejected = (([*before, *ids], [False] * len(before) + [True] * len(ids)) for ids in map(ids_of, IDS))
    return chosen, rejected


def _count(odd: Counter[str], pairs: list[Pair]) -> None:
    """Count pairs with equal responses and pairs whose sides answer different prompts."""
    odd[SAME] += sum(first[0] == second[0] for first, second in pairs)
    asked = [[ids[: mask.index(True)] for ids, mask in pair] for pair in pairs]
    odd[OTHER] += sum(first != second for first, second in asked)


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
    """Return the messages of `before` that the side does not repeat itself and that must precede it.

    A side may repeat all of them, their end, or none; in some data sets `before` is one whole side. Raise DataError if
    it is ambiguous whether the side continues them or is another conversation.
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
            f"{name!r} begins with the {first} and does not repeat 'messages' or 'prompt', which end with the "
            f"{last}; make both sides whole conversations and remove the other columns"
        )
    return before


def _said(message: Any) -> tuple[Any, ...]:
    """Return the parts of a message that identify it, ignoring other keys."""
    if not isinstance(message, dict):  # reported when the messages are validated
        return (None, message)
    content = message.get("content")
    return message.get("role"), content.strip() if isinstance(content, str) else content, message.get("tool_calls")


def _decoded(value: Any) -> Any:
    """Return a list of messages that was written as JSON; other values stay, since `2` is JSON but also an answer."""
    decoded = from_json(value)
    return decoded if isinstance(decoded, list) and decoded and all(isinstance(x, dict) for x in decoded) else value


def _pair(row: Row) -> list[Demonstration]:
    """Return both sides. Turns train from the first difference on, and the last turn always does."""
    chosen, rejected = (demonstration(_side(row, side), "all") for side in SIDES)
    if chosen.chat is None or rejected.chat is None:
        return [chosen, rejected]
    first, second = chosen.chat.messages, rejected.chat.messages
    longest = min(len(first), len(second)) - 1
    parted = next((n for n in range(longest) if _said(first[n]) != _said(second[n])), longest)
    return [replace(each, turns=[n for n in each.turns if n >= parted]) for each in (chosen, rejected)]


def until_the_response_ends(example: Example) -> Example:
    """Return the example up to its last token that trains."""
    token_ids, mask = example
    if True not in mask:
        raise DataError("no token to train on")
    end = len(mask) - mask[::-1].index(True)
    return token_ids[:end], mask[:end]
