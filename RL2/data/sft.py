"""Demonstrations for supervised fine-tuning: trajectories whose actions are the assistant's tokens."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable
from itertools import groupby
from typing import Any

from transformers import PreTrainedTokenizerBase

from RL2.data.chat import Message, encode, is_chat, messages_of, render, template_errors, unicode
from RL2.data.source import DataError, Row, in_row, keys, load_converted, shown
from RL2.types import Sequence, Trajectory

Example = tuple[list[int], list[bool]]
"""Token ids, and which of them are trained on."""
Piece = tuple[str, bool]
"""Text, and whether it is trained on."""

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_BATCH = 1024
"""Texts encoded at once: offsets take much memory for the little while that they live."""


def load_examples(
    path: str, tokenizer: PreTrainedTokenizerBase, example: Callable[[Row], Row] | None, max_length: int
) -> tuple[list[Trajectory], int]:
    """One trajectory per row, at most `max_length` tokens long, and how many rows were cut to that.

    Rows are {"prompt", "response"}, {"messages"} or {"messages", "response"}, or what `example` makes into these.
    """
    examples = encode_rows(path, tokenizer, load_converted(path, example))
    trajectories, num_cut = list[Trajectory](), 0
    for number, (token_ids, mask) in enumerate(examples):
        num_cut += len(token_ids) > max_length
        with in_row(path, number):
            if not any(mask[:max_length]):
                hint = f" within data.max_length={max_length}; raise it" if any(mask) else ""
                raise DataError("no token to train on" + hint)
        trajectories.append(_trajectory(number, token_ids[:max_length], mask[:max_length]))
    return trajectories, num_cut


def encode_rows(path: str, tokenizer: PreTrainedTokenizerBase, rows: list[Row]) -> list[Example]:
    """Token ids of rows in one of the formats above, and where the assistant speaks; `path` is for errors."""
    raw, chats = dict[int, tuple[str, str]](), dict[int, list[Message]]()
    for number, row in enumerate(rows):
        with in_row(path, number):
            if is_chat(row):
                chats[number] = _conversation(row)
            else:
                raw[number] = row["prompt"], _response(row)
    if raw and tokenizer.eos_token_id is None:
        raise DataError(f"{path}: rows with 'prompt' need a tokenizer with an eos token, which ends the response")

    examples = _encode_raw(tokenizer, raw)
    if chats and tokenizer.is_fast and _GENERATION.search(str(tokenizer.chat_template)):
        examples |= _encode_marked(tokenizer, path, chats)
    else:
        examples |= _encode_by_prefix(tokenizer, path, chats)
    return [examples[number] for number in range(len(rows))]


def _trajectory(row: int, token_ids: list[int], mask: list[bool]) -> Trajectory:
    zeros = [0.0] * len(token_ids)
    return Trajectory(row=row, group=row, sample=0, sequences=[Sequence(token_ids, mask, zeros, zeros.copy())])


def _response(row: Row) -> str:
    response = row.get("response")
    if response is None:
        raise DataError(f"'prompt' without 'response'; its keys are {keys(row)}")
    if not isinstance(response, str):
        raise DataError(f"'response' must be text, not {shown(response)}")
    return unicode(response, "'response'")


def _conversation(row: Row) -> list[Message]:
    """The messages with the answer at their end."""
    messages = messages_of(row)
    ends = messages[-1]["role"] == "assistant"
    if row.get("response") is not None:
        if ends:
            raise DataError("'response' answers 'messages', which end with the assistant already; leave out one")
        messages = [*messages, {"role": "assistant", "content": _response(row)}]
    elif not ends:
        raise DataError("'messages' must end with the assistant, or the row needs a 'response'")
    if messages[0]["role"] == "assistant":
        raise DataError("'messages' begin with the assistant; there is nothing to answer")
    return messages


def _encode_raw(tokenizer: PreTrainedTokenizerBase, rows: dict[int, tuple[str, str]]) -> dict[int, Example]:
    prompts = encode(tokenizer, [prompt for prompt, _ in rows.values()], add_special_tokens=True)
    responses = encode(tokenizer, [response for _, response in rows.values()], add_special_tokens=False)
    eos = tokenizer.eos_token_id
    return {
        number: ([*prompt, *response, eos], [False] * len(prompt) + [True] * (len(response) + 1))
        for number, prompt, response in zip(rows, prompts, responses, strict=True)
    }


def _encode_marked(
    tokenizer: PreTrainedTokenizerBase, path: str, chats: dict[int, list[Message]]
) -> dict[int, Example]:
    """Where the template marks what the assistant says."""
    examples = dict[int, Example]()
    for number, messages in chats.items():
        with in_row(path, number), template_errors():
            out: Any = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        examples[number] = (
            out["input_ids"],
            _end_turns(out["input_ids"], out["assistant_masks"], tokenizer.eos_token_id),
        )
    return examples


def _end_turns(token_ids: list[int], marked: list[int], eos: int | None) -> list[bool]:
    """Let every marked run end with the token that ends the turn: authors mark more (a newline) or less."""
    mask, start = list[bool](), 0
    for is_marked, run in groupby(marked):
        end = start + len(list(run))
        if is_marked:
            after = [t + 1 for t in range(start, min(end + 1, len(marked))) if token_ids[t] == eos]
            trained = after[-1] if after else end
            mask += [False] * (start - len(mask)) + [True] * (trained - start)
        start = end
    return mask + [False] * (len(marked) - len(mask))


def _encode_by_prefix(
    tokenizer: PreTrainedTokenizerBase, path: str, chats: dict[int, list[Message]]
) -> dict[int, Example]:
    """Where the assistant's text is what the template adds to the prompt before it."""
    rows = dict[int, list[Piece]]()
    for number, messages in chats.items():
        with in_row(path, number):
            rows[number] = _pieces(tokenizer, messages)
    numbers = list(rows)
    examples = dict[int, Example]()
    encode_pieces = _encode_whole if tokenizer.is_fast else _encode_apart
    for start in range(0, len(numbers), _BATCH):
        part = numbers[start : start + _BATCH]
        examples |= zip(part, encode_pieces(tokenizer, [rows[number] for number in part]), strict=True)
    return examples


def _pieces(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> list[Piece]:
    """The rendered conversation up to the end of its last turn, cut where training on it begins and ends."""
    whole = render(tokenizer, messages, add_generation_prompt=False)
    eos = str(tokenizer.eos_token or "")
    pieces, at = list[Piece](), 0
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        is_last = number == len(messages) - 1
        prompt = render(tokenizer, messages[:number], add_generation_prompt=True)
        turn = whole if is_last else render(tokenizer, messages[: number + 1], add_generation_prompt=False)
        if not (whole.startswith(turn) and turn.startswith(prompt) and len(prompt) >= at):
            raise DataError(
                f"the chat template breaks the prefix property: up to messages[{number}] it does not render the "
                "beginning of the conversation (some drop the reasoning of earlier turns); give it {% generation %} "
                "marks around what the assistant says, or pass the rendered text as 'prompt' and 'response'"
            )
        # what the template writes after the token that ends the turn, such as a newline, is never sampled
        end = turn.rfind(eos, len(prompt)) + len(eos) if eos in turn[len(prompt) :] else len(turn)
        pieces += [(whole[at : len(prompt)], False), (whole[len(prompt) : end], True)]
        at = end
    return pieces


def _encode_whole(tokenizer: PreTrainedTokenizerBase, rows: list[list[Piece]]) -> list[Example]:
    """Encode the text as one; a token is trained on if it ends in a piece that is.

    Not if it begins there: some tokenizers leave spaces out of their offsets, and a prompt's last space would slip in.
    """
    texts = ["".join(text for text, _ in pieces) for pieces in rows]
    out = tokenizer(
        texts, add_special_tokens=False, return_attention_mask=False, return_offsets_mapping=True, verbose=False
    )
    examples = list[Example]()
    for pieces, token_ids, offsets in zip(rows, out.input_ids, out.offset_mapping, strict=True):
        ends = [end for _, end in offsets]
        mask, at = list[bool](), 0
        for text, trained in pieces:
            at += len(text)
            mask += [trained] * (bisect_right(ends, at) - len(mask))
        examples.append((token_ids, mask))
    return examples


def _encode_apart(tokenizer: PreTrainedTokenizerBase, rows: list[list[Piece]]) -> list[Example]:
    """Encode piece by piece: a slow tokenizer does not say which text a token covers."""
    examples = list[Example]()
    for pieces in rows:
        encoded = encode(tokenizer, [text for text, _ in pieces], add_special_tokens=False)
        token_ids = [token for part in encoded for token in part]
        mask = [trained for part, (_, trained) in zip(encoded, pieces, strict=True) for _ in part]
        examples.append((token_ids, mask))
    return examples
