"""The order in which rows are drawn, exactly resumable."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np


class Cursor:
    """A seeded, endless stream of row numbers in batches.

    Every epoch is a fresh permutation of all rows, a pure function of (seed, epoch); a batch may run across the border
    of two. So the whole state is how many rows were drawn.
    """

    def __init__(self, num_rows: int, batch_size: int, seed: int) -> None:
        if num_rows < 1 or batch_size < 1:
            raise ValueError(f"num_rows={num_rows} and batch_size={batch_size} must be at least 1")
        self.num_rows, self.batch_size, self.seed = num_rows, batch_size, seed
        self.drawn = 0
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def next(self, number: int | None = None) -> list[int]:
        """Return the next batch, or `number` rows where some are to be replaced."""
        number = self.batch_size if number is None else number
        batch = [self._row(n) for n in range(self.drawn, self.drawn + number)]
        self.drawn += number
        return batch

    def batches(self, n_epochs: int) -> int:
        """Return the number of whole batches in `n_epochs` passes over the rows."""
        num_batches = n_epochs * self.num_rows // self.batch_size
        if num_batches == 0:
            raise ValueError(
                f"a batch of {self.batch_size} is more than {n_epochs} epoch(s) of {self.num_rows} rows hold"
            )
        return num_batches

    def learn(self, success: Mapping[int, float]) -> None:
        """How rows went that were drawn; this order does not depend on it."""

    def metrics(self) -> dict[str, float]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {"drawn": self.drawn, "num_rows": self.num_rows, "seed": self.seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError for a position in other data or in another order."""
        for name, here in (("num_rows", self.num_rows), ("seed", self.seed)):
            if state.get(name) != here:
                raise ValueError(f"it was made with {name}={state.get(name)}, and now {name}={here}")
        if type(drawn := state.get("drawn")) is not int or not 0 <= drawn < 2**63:
            raise ValueError(f"its position in the data, {drawn!r}, is none")
        self.drawn = drawn

    def _row(self, n: int) -> int:
        """Return the row that is drawn as number `n`."""
        epoch, position = divmod(n, self.num_rows)
        if epoch != self._epoch:
            self._order = np.random.default_rng([self.seed, epoch]).permutation(self.num_rows)
            self._epoch = epoch
        return int(self._order[position])
