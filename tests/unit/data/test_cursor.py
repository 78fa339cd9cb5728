from __future__ import annotations

import pytest

from RL2.data.cursor import Cursor


@pytest.mark.parametrize(("num_rows", "batch_size"), [(7, 3), (6, 3), (3, 7), (1, 1)])
def test_every_epoch_holds_every_row_once(num_rows: int, batch_size: int) -> None:
    cursor = Cursor(num_rows, batch_size, seed=1)
    drawn = [row for _ in range(num_rows * 4) for row in cursor.next()]
    assert len(drawn) == num_rows * 4 * batch_size
    for start in range(0, len(drawn), num_rows):
        assert sorted(drawn[start : start + num_rows]) == list(range(num_rows))


def test_order_depends_on_seed_and_epoch() -> None:
    a, b, c = (Cursor(50, 50, seed) for seed in (0, 0, 1))
    first, second = a.next(), a.next()
    assert first != second
    assert (first, second) == (b.next(), b.next())
    assert first != c.next()


def test_resume_is_exact() -> None:
    cursor = Cursor(10, 4, seed=3)
    for _ in range(6):
        state = cursor.state_dict()
        expected = [cursor.next() for _ in range(4)]
        resumed = Cursor(10, 4, seed=3)
        resumed.load_state_dict(state)
        assert [resumed.next() for _ in range(4)] == expected
        assert resumed.state_dict() == cursor.state_dict()
        cursor.load_state_dict(state | {"drawn": state["drawn"] + 4})
    assert state == {"drawn": 20, "num_rows": 10, "seed": 3}


def test_number_of_batches() -> None:
    cursor = Cursor(10, 4, seed=0)
    assert [cursor.batches(n) for n in (1, 2, 3)] == [2, 5, 7]
    with pytest.raises(ValueError, match=r"batch of 64 .* 2 epoch\(s\) of 10 rows"):
        Cursor(10, 64, seed=0).batches(2)
    with pytest.raises(ValueError, match="num_rows=0"):
        Cursor(0, 4, seed=0)


def test_a_position_in_other_data_is_refused() -> None:
    state = Cursor(10, 4, seed=3).state_dict()
    with pytest.raises(ValueError, match="saved with num_rows=10, but now num_rows=11"):
        Cursor(11, 4, seed=3).load_state_dict(state)
    with pytest.raises(ValueError, match="saved with seed=3, but now seed=4"):
        Cursor(10, 4, seed=4).load_state_dict(state)
