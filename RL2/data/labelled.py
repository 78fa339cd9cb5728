"""Single responses with a label, good or bad, for losses of preferences that need no pairs (KTO's data)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedTokenizerBase

from RL2.data.bad_rows import BadRows
from RL2.data.cache import key, table
from RL2.data.preference import until_the_response_ends
from RL2.data.sft import Demonstration, Example, demonstration, encode_demonstrations, marked, said_of
from RL2.data.source import DataError, Row, keys, shown
from RL2.data.table import Table, TableView, Writer
from RL2.data.template import Template
from RL2.io.progress import Progress

COLUMNS = ("ids", "trains", "good")
"""Columns of a table of responses with labels."""
LABELS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
"""A label as text, in lower case -> whether the response is good."""


class Labelled(TableView[tuple[Example, bool]]):
    """Responses of a data set with their labels, read from the table on access."""

    def __init__(self, table: Table) -> None:
        super().__init__(table)
        self.ids, self.trains, self.good = (table.columns[name] for name in COLUMNS)

    def item(self, number: int) -> tuple[Example, bool]:
        """Return token ids, the mask of the response, and whether it is good."""
        return (self.ids[number].tolist(), self.trains[number].tolist()), bool(self.good[number][0])


def load_labelled(
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    example: Callable[[Row], Row | None] | None,
    max_length: int,
    notes: list[str] | None = None,
    bad: BadRows | None = None,
    progress: Progress | None = None,
    template: Template | None = None,
) -> tuple[Labelled, int]:
    """Return the responses of at most `max_length` tokens with their labels, and the number of longer ones.

    Rows are those of supervised fine-tuning with a `label`: true or false, 1 or 0. The last response trains. `example`
    may convert other rows. Notes about the rows are appended to `notes`. Unusable rows go to `bad`; without it they
    raise DataError. `template` is the tokenizer's, if it has been analysed before.
    """
    bad, known = bad or BadRows(path), template or Template(tokenizer)

    def build(writer: Writer, tell: Callable[[float], None]) -> dict[str, Any]:
        counts, labels = Counter[str](), Counter[str]()
        for rows in bad.pieces(example, tell):
            said, good = dict[int, Demonstration](), dict[int, bool]()
            for number, row in rows.items():
                with bad.row(number):
                    good[number] = label_of(row)
                    said[number] = demonstration({name: x for name, x in row.items() if name != "label"}, "last")
            found: dict[str, list[Any]] = {name: [] for name in COLUMNS}
            for number, encoded in encode_demonstrations(known, said, bad, counts).items():
                with bad.row(number):
                    token_ids, mask = until_the_response_ends(encoded)
                    if len(token_ids) <= max_length:
                        labels[str(good[number])] += 1
                        for column, values in zip(found.values(), (token_ids, mask, [good[number]]), strict=True):
                            column.append(values)
            writer.add(**found)
        bad.settle()
        if not writer.rows:
            raise DataError(f"{path}: no response within data.max_length={max_length}; raise it")
        return {"counts": counts, "labels": labels}

    settings = {"kind": "labelled", "max_length": max_length, "skip": bad.skip}
    stored = key(bad.source, tokenizer, example, settings)
    found = table(bad, stored, COLUMNS, build, progress or Progress(speaks=False))
    responses = Labelled(found)
    if notes is not None:
        notes += said_of(path, found.about["counts"])
        labels = found.about["labels"]
        notes.append(f"{path}: {labels.get('True', 0)} good and {labels.get('False', 0)} bad responses")
        (first, good) = responses[0]
        notes.append(f"{path}, first row, {'good' if good else 'bad'}: {marked(tokenizer, *first)}")
    return responses, bad.total - bad.left_out - len(bad.found) - len(responses)


def label_of(row: Row) -> bool:
    """Return whether the row's response is good. Raise DataError if it has no label or another value."""
    if "chosen" in row and "rejected" in row:
        raise DataError("a pair; this loss reads single responses with a 'label' (choose a loss on pairs, or split it)")
    if row.get("label") is None:
        raise DataError(f"no 'label', true or false; its keys are {keys(row)}")
    label = LABELS.get(str(row["label"]).strip().lower())
    if label is None:
        raise DataError(f"'label' must be true or false, not {shown(row['label'])}")
    return label
