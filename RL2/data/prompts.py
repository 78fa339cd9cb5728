"""Prompts for rollouts. Every row is converted and checked before training starts."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedTokenizerBase

from RL2.data.bad_rows import BadRows
from RL2.data.chat import encode, is_chat, question_of, template_arguments
from RL2.data.source import DataError, Row, from_json, shown
from RL2.data.template import Chat, Template
from RL2.types import Prompt

ANSWERS = (
    r"####\s*{}(?!\w|[.,]\d)",
    r"<answer>\s*{}\s*</answer>",
    r"\\boxed{{\s*{}\s*}}",
    r"\banswer is:?\s*{}(?!\w|[.,]\d)",
)
"""How answers are given. The bare answer proves nothing: many questions name theirs among others."""


def given_away(prompt: str, answer: Any) -> str | None:
    """Return where `prompt` gives the right answer, which a policy would copy; None if it does not.

    `answer`: a text, a number, or a list of those of which each is right.
    """
    for each in answer if isinstance(answer, list) else [answer]:
        if isinstance(each, str | int | float) and str(each).strip():
            for form in ANSWERS:
                if found := re.search(form.format(re.escape(str(each).strip())), prompt):
                    return found[0]
    return None


def load_prompts(
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    example: Callable[[Row], Row | None] | None,
    max_length: int,
    bad: BadRows | None = None,
) -> list[Prompt]:
    """Return rows {"prompt" | "messages", "extra_info"}, or what `example` makes into these, as prompts.

    Rows that cannot be used, among them prompts of more than `max_length` tokens, go to `bad`; by default a DataError
    names them.
    """
    bad, template = bad or BadRows(path), Template(tokenizer)
    rows = bad.load(example)
    texts, arguments = dict[bool, dict[int, str]]({True: {}, False: {}}), dict[int, dict[str, Any]]()
    for number, row in rows.items():
        with bad.row(number):
            chat = is_chat(row)
            arguments[number] = template_arguments(row) if chat else {}
            text = template.ask(Chat(question_of(row), arguments[number])) if chat else row["prompt"]
            if not text:
                raise DataError("the chat template makes an empty prompt of the messages")
            texts[chat][number] = text
    token_ids = dict[int, list[int]]()
    for chat, part in texts.items():
        token_ids |= zip(part, encode(tokenizer, list(part.values()), begins=not chat), strict=True)

    prompts = list[Prompt]()
    for number, text in sorted((texts[True] | texts[False]).items()):
        with bad.row(number):
            length = len(token_ids[number])
            if not length:
                raise DataError("its prompt has no tokens")
            if length > max_length:
                raise DataError(
                    f"its prompt has {length} tokens, the limit is {max_length}; "
                    "raise actor.max_length_per_device or take the row out"
                )
            prompts.append(Prompt(number, text, token_ids[number], _extra_info(rows[number]), arguments[number]))
    bad.settle()
    return prompts


def _extra_info(row: Row) -> dict[str, Any]:
    value = row.get("extra_info")
    if value is None:
        return {}
    extra_info = from_json(value)
    if not isinstance(extra_info, dict):
        raise DataError(f"'extra_info' must be an object, not {shown(value)}")
    return extra_info
