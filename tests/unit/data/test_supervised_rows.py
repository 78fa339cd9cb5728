"""How supervised programs come by their rows."""

from __future__ import annotations

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from RL2.config.data import SupervisedData
from RL2.config.load import load
from RL2.data.source import DataError
from RL2.data.table import Ragged
from RL2.errors import ConfigError
from RL2.trainer.supervised import Rows, first_rows, refuse_long, train_and_test


def pairs(number: int, first: int = 0) -> Rows:
    """Token ids tell which row and side it is."""
    return of([[100 * (first + n) + side] * 3 for n in range(number) for side in (0, 1)], per_row=2)


def of(sequences: list[list[int]], per_row: int) -> Rows:
    """All tokens but the first of each sequence train."""
    trains = [[False] + [True] * (len(ids) - 1) for ids in sequences]
    return Rows(Ragged.from_rows(sequences, np.int32), Ragged.from_rows(trains, np.bool_), per_row)


def rows_of(rows: Rows) -> set[int]:
    return {token // 100 for token in rows.draw(range(len(rows))).token_ids_T.tolist()}


def data(test_path: str | None = None, test_ratio: float = 0.0) -> SupervisedData:
    return SupervisedData(
        path="train", test_path=test_path, test_ratio=test_ratio, env_path=None, columns={}, max_length=8, batch_size=2
    )


def test_a_row_that_is_drawn_twice_is_two_pairs() -> None:
    rows = pairs(3)
    assert len(rows) == 3
    batch = rows.draw([2, 0, 2])
    assert batch.token_ids_T[::2].tolist() == [200, 201, 0, 1, 200, 201]
    assert batch.group_B.tolist() == [0, 0, 1, 1, 2, 2]


def test_the_first_rows_are_shown_with_what_trains(tokenizer: PreTrainedTokenizerBase) -> None:
    asked, said = tokenizer("48-19=").input_ids, tokenizer("29\n#### 29").input_ids
    ids = Ragged.from_rows([[*asked, *said]] * 8, np.int32)
    trains = Ragged.from_rows([[False] * len(asked) + [True] * len(said)] * 8, np.bool_)
    shown = [["48-19=", False], ["29\n#### 29", True]]
    rows = first_rows(Rows(ids, trains, per_row=1), tokenizer)
    assert [[list(piece) for piece in row["pieces"]] for row in rows] == [shown] * 5
    rows = first_rows(Rows(ids, trains, per_row=2, scored=True), tokenizer)
    assert [row["name"].rpartition(", ")[2] for row in rows] == ["chosen", "rejected"] * 4
    assert [list(piece) for piece in rows[0]["pieces"]] == [["48-19=29\n####", False], [" 29", True]]


def test_tests_are_another_file_or_rows_that_are_not_trained_on() -> None:
    files = {"train": pairs(10), "test": pairs(2, first=50)}
    train, test = train_and_test(data(), files.__getitem__)
    assert (len(train), test) == (10, None)

    train, test = train_and_test(data(test_path="test"), files.__getitem__)
    assert test is not None
    assert (rows_of(train), rows_of(test)) == (set(range(10)), {50, 51})

    train, test = train_and_test(data(test_ratio=0.3), files.__getitem__)
    assert test is not None
    assert (len(train), len(test)) == (7, 3)
    assert rows_of(train) | rows_of(test) == set(range(10))
    again = train_and_test(data(test_ratio=0.3), files.__getitem__)[1]
    assert again is not None
    assert rows_of(again) == rows_of(test)


@pytest.mark.parametrize("ratio", [0.01, 0.99])
def test_a_share_that_leaves_nothing_is_refused(ratio: float) -> None:
    message = f"data.test_ratio={ratio} of 10 rows leaves none to test or to train on"
    with pytest.raises(ConfigError, match=message):
        train_and_test(data(test_ratio=ratio), lambda path: pairs(10))


def model(group: str, tokens: int, sp_size: int = 1) -> tuple[str, ...]:
    sizes = (f"{group}.model_name=m", f"{group}.max_length_per_device={tokens}", f"{group}.sp_size={sp_size}")
    return (*sizes, "data.path=rows", "data.max_length=4096", "trainer.experiment_name=e")


def single(*lengths: int) -> Rows:
    """Examples that take so many places each."""
    return of([[7] * (n + 1) for n in lengths], per_row=1)


def test_a_limit_above_a_microbatch_is_nothing_to_refuse_but_a_row_is() -> None:
    """A row of `pairs` takes twice two places."""
    refuse_long(load("sft", model("actor", 4, sp_size=2)), single(3, 8), "rows")
    refuse_long(load("rm", model("critic", 4)), pairs(3), "rows")
    refuse_long(load("dpo", model("actor", 4)), pairs(3), "rows")
    for program, group, rows, given, message in [
        (
            "sft",
            "actor",
            single(3, 9, 2),
            (4, 2),
            "a sequence of 9 tokens does not fit into actor.X=4 x actor.sp_size=2",
        ),
        ("rm", "critic", pairs(3), (3,), "a pair of 4 tokens does not fit into critic.X=3"),
        ("dpo", "actor", pairs(3), (2,), "a pair of 4 tokens does not fit into actor.X=2"),
    ]:
        with pytest.raises(DataError) as caught:
            refuse_long(load(program, model(group, *given)), rows, "rows")
        needed = {"sft": 5, "rm": 4, "dpo": 4}[program]
        assert str(caught.value) == (
            f"rows: {message.replace('X', 'max_length_per_device')}; raise that to {needed}, or lower "
            "data.max_length=4096"
        )


def test_a_sequence_has_to_fit_into_a_microbatch_of_the_reference() -> None:
    settings = (*model("actor", 4), "ref_actor.max_inference_length_per_device=1")
    with pytest.raises(DataError, match=r"a sequence of 2 tokens does not fit into ref_actor.max_inference_length_per"):
        refuse_long(load("dpo", settings), pairs(3), "rows")
    refuse_long(load("dpo", (*settings, "actor.reference_free=true")), pairs(3), "rows")
