"""Demonstrations for supervised fine-tuning: trajectories whose actions are the assistant's tokens."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import groupby, takewhile
from typing import Any, Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from RL2.data.bad_rows import BadRows
from RL2.data.cache import key, table
from RL2.data.chat import Message, encode, is_chat, messages_of, template_arguments, template_errors, unicode
from RL2.data.source import DataError, Row, keys, shown
from RL2.data.table import Table, TableView, Writer
from RL2.data.template import Chat, Template, reasoning_of
from RL2.data.turns import Piece, cut_at_turns
from RL2.io.progress import Progress
from RL2.types import Sequence, Trajectory

Example = tuple[list[int], list[bool]]
"""Token ids, and the mask of the tokens that train."""
TrainOn = Literal["all", "last", "weighted"]
"""Assistant turns that train: all, the last one, or those without `weight: 0`."""

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_SHOWN = 600
"""Limit in characters of a row that is printed."""
COLUMNS = ("ids", "trains", "row")
"""Columns of a table of examples."""
EMPTY, LOST = "empty turns", "rewritten turns"
"""Names of the counters of empty and of rewritten turns."""


@dataclass(frozen=True)
class Demonstration:
    """A conversation, or a prompt and its response."""

    chat: Chat | None
    prompt: str = ""
    response: str = ""
    turns: list[int] = field(default_factory=list)
    """Indices of the messages that train."""


class Examples(TableView[Trajectory]):
    """Demonstrations of a data set as trajectories, read from the table on access."""

    def __init__(self, table: Table) -> None:
        super().__init__(table)
        self.ids, self.trains, self.rows = (table.columns[name] for name in COLUMNS)

    def item(self, number: int) -> Trajectory:
        row, zeros = int(self.rows[number][0]), np.zeros(len(self.ids[number]))
        sequence = Sequence(self.ids[number], self.trains[number], zeros, zeros)
        return Trajectory(row=row, group=row, sample=0, sequences=[sequence])


def load_examples(
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    example: Callable[[Row], Row | None] | None,
    max_length: int,
    train_on: TrainOn = "weighted",
    notes: list[str] | None = None,
    bad: BadRows | None = None,
    progress: Progress | None = None,
    template: Template | None = None,
) -> tuple[Examples, int]:
    """Return a trajectory per row of at most `max_length` tokens, and the number of rows left out as longer.

    Rows are {"prompt", "response"}, {"messages"} or {"messages", "response"}, or are converted into these by `example`.
    Notes about the rows are appended to `notes`. Unusable rows go to `bad`; without it they raise DataError. `template`
    is the tokenizer's, if it has been analysed before.
    """
    bad, known = bad or BadRows(path), template or Template(tokenizer)

    def build(writer: Writer, tell: Callable[[float], None]) -> dict[str, Any]:
        counts = Counter[str]()
        for rows in bad.pieces(example, tell):
            found: dict[str, list[Any]] = {name: [] for name in COLUMNS}
            for number, (token_ids, mask) in _encode(known, rows, bad, train_on, counts).items():
                with bad.row(number):
                    if not any(mask):
                        raise DataError("no token to train on")
                    if len(token_ids) <= max_length:
                        for column, values in zip(found.values(), (token_ids, mask, [number]), strict=True):
                            column.append(values)
            writer.add(**found)
        bad.settle()
        if not writer.rows:
            raise DataError(f"{path}: no example within data.max_length={max_length}; raise it")
        return {"counts": counts}

    settings = {"kind": "examples", "max_length": max_length, "train_on": train_on, "skip": bad.skip}
    found = table(
        bad, key(bad.source, tokenizer, example, settings), COLUMNS, build, progress or Progress(speaks=False)
    )
    examples = Examples(found)
    if notes is not None:
        first = examples[0].sequences[0]
        notes += said_of(path, found.about["counts"])
        shown = marked(tokenizer, first.token_ids.tolist(), first.action_mask.tolist())
        notes.append(f"{path}, row {examples[0].row + 1}: {shown}")
    return examples, bad.total - bad.left_out - len(bad.found) - len(examples)


def said_of(path: str, counts: Mapping[str, int]) -> list[str]:
    """Return notes about rows that were encoded: empty turns and turns that do not train."""
    notes = []
    if empty := counts.get(EMPTY):
        notes.append(f"{path}: {empty} rows train an empty turn of the assistant, which is only its end token")
    if lost := counts.get(LOST):
        notes.append(
            f"{path}: {lost} earlier turns of the assistant do not train: the chat template renders them "
            "differently once others follow (data.train_on=last trains only the last turn)"
        )
    return notes


def pieces(tokenizer: PreTrainedTokenizerBase, token_ids: list[int], mask: list[bool]) -> list[tuple[str, bool]]:
    """Split the tokens into runs with the same mask; return each run's text and whether it trains."""
    found, start = list[tuple[str, bool]](), 0
    for is_trained, run in groupby(mask):
        end = start + len(list(run))
        text = tokenizer.decode(token_ids[start:end], clean_up_tokenization_spaces=False)
        found.append((str(text), is_trained))
        start = end
    return found


def marked(tokenizer: PreTrainedTokenizerBase, token_ids: list[int], mask: list[bool]) -> str:
    """Return the text of the tokens in one line, with [[ ]] around what trains; a long text is cut at the front."""
    found = pieces(tokenizer, token_ids, mask)
    text = "".join(f"[[{piece}]]" if is_trained else piece for piece, is_trained in found).replace("\n", "\\n")
    return text if len(text) <= _SHOWN else f"...{text[-_SHOWN:]}"


def encode_rows(path: str, tokenizer: PreTrainedTokenizerBase, rows: list[Row]) -> list[Example]:
    """Return token ids and assistant mask of rows in one of the formats above; `path` is for errors."""
    bad = BadRows(path)
    bad.total = len(rows)
    examples = _encode(Template(tokenizer), dict(enumerate(rows)), bad, "all", Counter())
    bad.settle()
    return [examples[number] for number in range(len(rows))]


def _encode(
    template: Template, rows: dict[int, Row], bad: BadRows, train_on: TrainOn, counts: Counter[str]
) -> dict[int, Example]:
    demonstrations = dict[int, Demonstration]()
    for number, row in rows.items():
        with bad.row(number):
            demonstrations[number] = demonstration(row, train_on)
    counts[EMPTY] += sum(map(_says_nothing, demonstrations.values()))
    return encode_demonstrations(template, demonstrations, bad, counts)


def demonstration(row: Row, train_on: TrainOn) -> Demonstration:
    """Return the demonstration of a row. Raise DataError if the row demonstrates nothing."""
    if _is_to_avoid(row):
        raise DataError("its 'label' is false: the completion is a negative example, not a demonstration")
    if not is_chat(row):
        return Demonstration(None, row["prompt"], _response(row))
    messages = _conversation(row)
    turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    if train_on == "last":
        turns = turns[-1:]
    elif train_on == "weighted":
        turns = [number for number in turns if _weight(messages[number], f"messages[{number}]")]
        if not turns:
            raise DataError("every turn of the assistant has weight 0")
    return Demonstration(Chat(messages, template_arguments(row)), turns=turns)


def _is_to_avoid(row: Row) -> bool:
    """Return whether a row of unpaired preferences (TRL's KTO format) has a bad completion.

    The label may be a string, as in CSV, or a number. Beside a `response`, `label` is an answer instead.
    """
    label = row.get("label")
    return label is False or ("completion" in row and str(label).strip().lower() in ("false", "0", "0.0"))


def _says_nothing(each: Demonstration) -> bool:
    """Return whether any turn that trains has no text, reasoning or call."""
    if each.chat is None:
        return not each.response.strip()
    trained = [each.chat.messages[number] for number in each.turns]
    return any(not (str(m.get("content") or "").strip() or m.get("tool_calls") or reasoning_of(m)) for m in trained)


def encode_demonstrations(
    template: Template, demonstrations: dict[int, Demonstration], bad: BadRows, counts: Counter[str]
) -> dict[int, Example]:
    """Return token ids and training mask of demonstrations, by number. Unusable ones go to `bad`.

    `counts` is increased by the turns that do not train because the template renders them differently once others
    follow.
    """
    tokenizer = template.tokenizer
    raw = {number: each for number, each in demonstrations.items() if each.chat is None}
    chats = {number: each for number, each in demonstrations.items() if each.chat is not None}
    examples = _encode_raw(template, raw, bad)
    if chats and tokenizer.is_fast and _GENERATION.search(str(tokenizer.chat_template)):
        examples |= _encode_marked(template, chats, bad)
    else:
        examples |= _encode_by_prefix(template, chats, bad, counts)
    return {number: examples[number] for number in sorted(examples)}


def _response(row: Row) -> str:
    response = row.get("response")
    if response is None:
        raise DataError(f"'prompt' without 'response'; its keys are {keys(row)}")
    if not isinstance(response, str):
        raise DataError(f"'response' must be text, not {shown(response)}")
    return unicode(response, "'response'")


def _conversation(row: Row) -> list[Message]:
    """Return the messages including the final answer."""
    messages = messages_of(row)
    ends = messages[-1]["role"] == "assistant"
    if row.get("response") is not None:
        if ends:
            raise DataError("both 'response' and a final assistant turn in 'messages'; remove one")
        messages = [*messages, {"role": "assistant", "content": _response(row)}]
    elif not ends:
        raise DataError("'messages' must end with the assistant, or the row needs a 'response'")
    if messages[0]["role"] == "assistant":
        raise DataError("'messages' begin with the assistant; there is nothing to answer")
    return messages


def _weight(message: Message, name: str) -> bool:
    """Return whether a turn trains: OpenAI's rows use the key `weight`, others `train`."""
    weight = message.get("weight", message.get("train", 1))
    if weight not in (0, 1):
        raise DataError(f"{name} has weight {shown(weight)}; it must be 0 or 1")
    return bool(weight)


def _encode_raw(template: Template, rows: dict[int, Demonstration], bad: BadRows) -> dict[int, Example]:
    """Encode raw texts. Each response ends with exactly one end token, as in sampling."""
    tokenizer = template.tokenizer
    if rows and not template.ends:
        raise DataError(f"{bad.path}: rows with 'prompt' need a tokenizer with an eos token to end the response")
    eos = str(tokenizer.eos_token or template.end)
    ended = [
        each.response + ("" if each.response.endswith(template.ends) else template.end if opens else eos)
        for each in rows.values()
        for opens in [bool(template.header) and each.prompt.endswith(template.header)]
    ]
    prompts = encode(tokenizer, [each.prompt for each in rows.values()], begins=True)
    responses = encode(tokenizer, ended, begins=False)
    return {
        number: (prompt + response, [False] * len(prompt) + [True] * len(response))
        for number, prompt, response in zip(rows, prompts, responses, strict=True)
    }


def _encode_marked(template: Template, chats: dict[int, Demonstration], bad: BadRows) -> dict[int, Example]:
    """Encode chats with a template that marks the assistant's text."""
    examples = dict[int, Example]()
    for number, each in chats.items():
        assert each.chat is not None
        with bad.row(number):
            chat = each.chat
            template.refuse_lost_around(chat, template.render(chat))
            with template_errors(template.watchdog):
                out: Any = template.tokenizer.apply_chat_template(
                    template.as_read(chat.messages),
                    return_dict=True,
                    return_assistant_tokens_mask=True,
                    **chat.arguments,
                )
            token_ids = out["input_ids"]
            runs = end_turns(template.tokenizer, token_ids, out["assistant_masks"], template.end_ids)
            mask = [False] * len(token_ids)
            for start, end in _sampled(template, each, token_ids, runs):
                mask[start:end] = [True] * (end - start)
            examples[number] = token_ids, mask
    return examples


def end_turns(
    tokenizer: PreTrainedTokenizerBase, token_ids: list[int], marked: list[int], end_ids: tuple[int, ...]
) -> list[tuple[int, int]]:
    """Return the marked runs, each up to the token that ends the turn; authors mark more (a newline) or less."""
    runs, start = list[tuple[int, int]](), 0
    for is_marked, run in groupby(marked):
        end = start + len(list(run))
        if is_marked:
            after = [t + 1 for t in range(start, min(end + 1, len(marked))) if token_ids[t] in end_ids]
            while len(after) > 1 and not str(tokenizer.decode(token_ids[after[-2] : after[-1] - 1])).strip():
                after.pop()
            runs.append((start, after[-1] if after else end))
        start = end
    return runs


def _sampled(
    template: Template, each: Demonstration, token_ids: list[int], runs: list[tuple[int, int]]
) -> list[tuple[int, int]]:
    """Return the marked runs of the turns to train, without the part that is in their prompt already.

    Raise DataError if a turn's text is incomplete, or if the runs cannot be assigned to the turns.
    """
    assert each.chat is not None
    chat, last = each.chat, len(each.chat.messages) - 1
    spoken = [number for number, message in enumerate(chat.messages) if message["role"] == "assistant"]
    if len(runs) > len(spoken):
        if each.turns != spoken:
            raise DataError(
                f"the chat template marks {len(runs)} turns of {len(spoken)}; train all of them with data.train_on=all"
            )
        return runs
    found = list[tuple[int, int]]()
    # a template that marks fewer leaves out the first turns
    for turn, (start, end) in zip(spoken[len(spoken) - len(runs) :], runs, strict=True):
        if turn not in each.turns:
            continue
        prompt = template.render(chat, turn, add_generation_prompt=True) if turn else ""
        text = template.render(chat, turn + 1)
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(prompt, text, strict=False)))
        template.refuse_lost(chat.messages[turn], text[same:], but="" if turn == last else "the reasoning")
        before = encode(template.tokenizer, [prompt], begins=False)[0]
        found.append((max(start, len(before)) if token_ids[: len(before)] == before else start, end))
    return found


def _encode_by_prefix(
    template: Template, chats: dict[int, Demonstration], bad: BadRows, counts: Counter[str]
) -> dict[int, Example]:
    """Encode chats in which the assistant's text is what the template appends to its prompt."""
    rows = dict[int, list[Piece]]()
    for number, each in chats.items():
        assert each.chat is not None
        with bad.row(number):
            rows[number], rewritten = cut_at_turns(template, each.chat, each.turns)
            counts[LOST] += rewritten
    if not rows:
        return {}
    encode_pieces = _encode_whole if template.tokenizer.is_fast else _encode_apart
    return dict(zip(rows, encode_pieces(template.tokenizer, list(rows.values())), strict=True))


def _encode_whole(tokenizer: PreTrainedTokenizerBase, rows: list[list[Piece]]) -> list[Example]:
    """Encode each row as one text. A token trains if it ends in a piece that trains.

    The end decides, not the start: some tokenizers leave spaces out of their offsets, so a prompt's last space would
    train.
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
    """Encode piece by piece: a slow tokenizer does not report which text a token covers."""
    examples = list[Example]()
    for pieces in rows:
        encoded = encode(tokenizer, [text for text, _ in pieces], begins=False)
        token_ids = [token for part in encoded for token in part]
        mask = [trained for part, (_, trained) in zip(encoded, pieces, strict=True) for _ in part]
        examples.append((token_ids, mask))
    return examples
