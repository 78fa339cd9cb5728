"""Prompts for rollouts. Every row is converted and checked before training starts."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedTokenizerBase

from RL2.data.chat import encode_prompts, from_json
from RL2.data.source import DataError, Row, in_row, load_converted, shown
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
    path: str, tokenizer: PreTrainedTokenizerBase, example: Callable[[Row], Row] | None, max_length: int
) -> list[Prompt]:
    """Rows {"prompt" | "messages", "extra_info"}, or what `example` makes into these, as prompts of at most
    `max_length` tokens."""
    rows = load_converted(path, example)
    prompts = list[Prompt]()
    for number, (text, token_ids) in enumerate(encode_prompts(tokenizer, path, rows)):
        with in_row(path, number):
            if not token_ids:
                raise DataError("its prompt has no tokens")
            if len(token_ids) > max_length:
                raise DataError(
                    f"its prompt has {len(token_ids)} tokens, the limit is {max_length}; "
                    "raise actor.max_length_per_device or take the row out"
                )
            prompts.append(Prompt(number, text, token_ids, _extra_info(rows[number])))
    return prompts


def _extra_info(row: Row) -> dict[str, Any]:
    value = row.get("extra_info")
    if value is None:
        return {}
    extra_info = from_json(value)
    if not isinstance(extra_info, dict):
        raise DataError(f"'extra_info' must be an object, not {shown(value)}")
    return extra_info
