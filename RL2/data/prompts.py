"""Prompts for rollouts. Every row is converted and validated before training starts."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from RL2.data.bad_rows import BadRows
from RL2.data.cache import key, table
from RL2.data.chat import encode, is_chat, question_of, template_arguments
from RL2.data.source import DataError, Row, from_json, shown
from RL2.data.table import Table, TableView, Writer, is_json
from RL2.data.template import Chat, Template
from RL2.io.progress import Progress
from RL2.types import Prompt

COLUMNS = ("ids", "text", "rest", "row")
"""Columns of a table of prompts; `rest` is JSON of `extra_info` and the template's arguments."""

NO_TOKENS = "its prompt has no tokens"

ANSWERS = (
    r"####\s*{}(?!\w|[.,]\d)",
    r"<answer>\s*{}\s*</answer>",
    r"\\boxed{{\s*{}\s*}}",
    r"\banswer is:?\s*{}(?!\w|[.,]\d)",
)
"""Patterns that state an answer. A bare occurrence proves nothing: many questions list possible answers."""


def given_away(prompt: str, answer: Any) -> str | None:
    """Return the place where `prompt` states the right answer, which a policy would copy; None if it does not.

    `answer` is a string, a number, or a list of accepted answers.
    """
    for each in answer if isinstance(answer, list) else [answer]:
        if isinstance(each, str | int | float) and str(each).strip():
            for form in ANSWERS:
                if found := re.search(form.format(re.escape(str(each).strip())), prompt):
                    return found[0]
    return None


class Prompts(TableView[Prompt]):
    """Prompts of a data set, read from the table on access."""

    def __init__(self, table: Table) -> None:
        super().__init__(table)
        self.ids, self.texts, self.rest, self.rows = (table.columns[name] for name in COLUMNS)

    def item(self, number: int) -> Prompt:
        rest = bytes(self.rest[number])
        extra_info, arguments, *messages = json.loads(rest) if rest else self.table.objects[number]
        text = bytes(self.texts[number]).decode()
        return Prompt(int(self.rows[number][0]), text, self.ids[number].tolist(), extra_info, arguments, *messages)

    @property
    def lengths(self) -> np.ndarray:
        """Number of tokens of each prompt, int [N]."""
        return self.ids.lengths


def largest_token_id(prompts: Sequence[Prompt]) -> int:
    """Return the largest token id of any prompt; -1 if there are no tokens."""
    if isinstance(prompts, Prompts):
        return int(prompts.ids.values.max(initial=-1))
    return max(chain.from_iterable(prompt.token_ids for prompt in prompts), default=-1)


def load_prompts(
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    example: Callable[[Row], Row | None] | None,
    max_length: int,
    bad: BadRows | None = None,
    progress: Progress | None = None,
    template: Template | None = None,
    keeps_messages: bool = False,
) -> Prompts:
    """Return the rows of a file as prompts.

    Rows are {"prompt" | "messages", "extra_info"}, or are converted into these by `example`. Unusable rows, including
    prompts of more than `max_length` tokens, go to `bad`; without it they raise DataError. `template` is the
    tokenizer's, if it has been analysed before. With `keeps_messages`, prompts have the messages too.
    """
    bad, known = bad or BadRows(path), template or Template(tokenizer)

    def build(writer: Writer, tell: Callable[[float], None]) -> dict[str, Any]:
        for rows in bad.pieces(example, tell):
            _write(writer, rows, known, max_length, bad, keeps_messages)
        bad.settle()
        return {}

    kept = {"messages": True} if keeps_messages else {}
    name = key(bad.source, tokenizer, example, {"kind": "prompts", "max_length": max_length, "skip": bad.skip} | kept)
    return Prompts(table(bad, name, COLUMNS, build, progress or Progress(speaks=False)))


class Places:
    """Row of the data file -> place among the prompts; they differ behind a row that was left out."""

    def __init__(self, prompts: Sequence[Prompt]) -> None:
        rows = prompts.rows.values if isinstance(prompts, Prompts) else [prompt.row for prompt in prompts]
        self.rows_N = np.asarray(rows, np.int64)
        self.order_N = self.rows_N.argsort(kind="stable")

    def __getitem__(self, row: int) -> int:
        return int(self.order_N[np.searchsorted(self.rows_N, row, sorter=self.order_N)])


def make_prompt(row: Row, template: Template, number: int) -> Prompt:
    """Return a row {"prompt" | "messages", "extra_info"} as a prompt. Raise DataError if it is not one."""
    chat, text, arguments = _rendered(row, template)
    (token_ids,) = encode(template.tokenizer, [text], begins=not chat)
    if not token_ids:
        raise DataError(NO_TOKENS)
    return Prompt(number, text, token_ids, _extra_info(row), arguments)


def _rendered(row: Row, template: Template) -> tuple[bool, str, dict[str, Any]]:
    """Return whether a row is a chat, the text of its prompt, and the template's arguments beside the messages."""
    if not is_chat(row):
        return False, row["prompt"], {}
    arguments = template_arguments(row)
    text = template.ask(Chat(question_of(row), arguments))
    if not text:
        raise DataError("the chat template renders an empty prompt")
    return True, text, arguments


def _write(
    writer: Writer, rows: dict[int, Row], template: Template, max_length: int, bad: BadRows, keeps_messages: bool
) -> None:
    """Encode and write the usable rows; report the others to `bad`."""
    texts, arguments = dict[bool, dict[int, str]]({True: {}, False: {}}), dict[int, dict[str, Any]]()
    for number, row in rows.items():
        with bad.row(number):
            chat, text, arguments[number] = _rendered(row, template)
            texts[chat][number] = text
    token_ids = dict[int, list[int]]()
    for chat, part in texts.items():
        token_ids |= zip(part, encode(template.tokenizer, list(part.values()), begins=not chat), strict=True)

    found: dict[str, list[Any]] = {name: [] for name in COLUMNS}
    for number, text in sorted((texts[True] | texts[False]).items()):
        with bad.row(number):
            length = len(token_ids[number])
            if not length:
                raise DataError(NO_TOKENS)
            if length > max_length:
                raise DataError(
                    f"its prompt has {length} tokens, the limit is {max_length}; "
                    "raise actor.max_length_per_device or remove the row"
                )
            rest: list[Any] = [_extra_info(rows[number]), arguments[number]]
            if keeps_messages and is_chat(rows[number]):
                rest.append(question_of(rows[number]))
            if not (stored := is_json(rest)):
                writer.keep(writer.rows + len(found["row"]), rest)
            found["ids"].append(token_ids[number])
            found["text"].append(text.encode())
            found["rest"].append(json.dumps(rest).encode() if stored else b"")
            found["row"].append([number])
    writer.add(**found)


def _extra_info(row: Row) -> dict[str, Any]:
    value = row.get("extra_info")
    if value is None:
        return {}
    extra_info = from_json(value)
    if not isinstance(extra_info, dict):
        raise DataError(f"'extra_info' must be an object, not {shown(value)}")
    return extra_info
