"""Order in which rows are drawn; exactly resumable."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np


class Cursor:
    """Endless seeded stream of row numbers in batches.

    Each epoch is a new permutation of all rows, a pure function of (seed, epoch). A batch may span two epochs. The
    number of rows drawn is the whole state.
    """

    def __init__(self, num_rows: int, batch_size: int, seed: int) -> None:
        if num_rows < 1 or batch_size < 1:
            raise ValueError(f"num_rows={num_rows} and batch_size={batch_size} must be at least 1")
        self.num_rows, self.batch_size, self.seed = num_rows, batch_size, seed
        self.drawn = 0
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def next(self, number: int | None = None) -> list[int]:
        """Return the next batch of row numbers, or `number` of them."""
        number = self.batch_size if number is None else number
        batch = [self._row(n) for n in range(self.drawn, self.drawn + number)]
        self.drawn += number
        return batch

    def batches(self, n_epochs: int) -> int:
        """Return the number of whole batches in `n_epochs` passes over the rows. Raise ValueError if it is 0."""
        num_batches = n_epochs * self.num_rows // self.batch_size
        if num_batches == 0:
            raise ValueError(
                f"a batch of {self.batch_size} is more than {n_epochs} epoch(s) of {self.num_rows} rows hold"
            )
        return num_batches

    def learn(self, success: Mapping[int, float]) -> None:
        """Receive the success rates of rows that were drawn; ignored in this order."""

    def metrics(self) -> dict[str, float]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {"drawn": self.drawn, "num_rows": self.num_rows, "seed": self.seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a position. Raise ValueError if it belongs to other data or another order."""
        for name, here in (("num_rows", self.num_rows), ("seed", self.seed)):
            if state.get(name) != here:
                raise ValueError(f"it was saved with {name}={state.get(name)}, but now {name}={here}")
        if type(drawn := state.get("drawn")) is not int or not 0 <= drawn < 2**63:
            raise ValueError(f"its position in the data, {drawn!r}, is not a valid number of rows")
        self.drawn = drawn

    def _row(self, n: int) -> int:
        """Return the row at position `n` of the stream."""
        epoch, position = divmod(n, self.num_rows)
        if epoch != self._epoch:
            self._order = np.random.default_rng([self.seed, epoch]).permutation(self.num_rows)
            self._epoch = epoch
        return int(self._order[position])
