"""Sampling of rows by their past success rate: fewer that are always solved, or also fewer that never are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from RL2.data.cursor import Cursor

Rule = Literal["failures", "frontier"]

NEWEST = 0.5
"""Weight of the newest group in a row's success rate; older groups are from older policies."""
FLOOR = 0.05
"""Constant added to each row's weight, so that every row keeps a chance."""


class Curriculum(Cursor):
    """Cursor that yields each row once in the order of `Cursor`, then samples rows by their success rate.

    A row's weight is 1 - s (`failures`: prioritised sampling of Kimi k1.5, arXiv 2501.12599, section 2.3.4) or 4 s (1 -
    s) (`frontier`: rows that are sometimes solved, arXiv 2502.12272), plus a floor. s is the moving average of the
    share of its samples that earned a reward. A row without a scored sample counts as s = 0.5. Batches are drawn
    without replacement as long as there are enough rows.
    """

    def __init__(self, num_rows: int, batch_size: int, seed: int, rule: Rule) -> None:
        super().__init__(num_rows, batch_size, seed)
        self.rule = rule
        self.rates: dict[int, float] = {}
        """Row -> success rate, for rows that have one."""

    def learn(self, success: Mapping[int, float]) -> None:
        """Update the success rates with the share of successes in each row's newest group."""
        for row, share in success.items():
            self.rates[row] = share + (1 - NEWEST) * (self.rates.get(row, share) - share)

    def metrics(self) -> dict[str, float]:
        """Return the share of rows with a success rate, their mean rate, and the share of them always solved."""
        if not self.rates:
            return {}
        rates = np.array(list(self.rates.values()))
        return {
            "curriculum/known": len(rates) / self.num_rows,
            "curriculum/success": float(rates.mean()),
            "curriculum/solved": float((rates == 1).mean()),
        }

    def next(self, number: int | None = None) -> list[int]:
        number = self.batch_size if number is None else number
        first = max(0, min(number, self.num_rows - self.drawn))  # rows left of the first pass over all rows
        batch = [self._row(n) for n in range(self.drawn, self.drawn + first)]
        rng = np.random.default_rng([self.seed, self.drawn])
        while len(batch) < number:
            size = min(number - len(batch), self.num_rows)
            batch += rng.choice(self.num_rows, size, replace=False, p=self._weights()).tolist()
        self.drawn += number
        return batch

    def _weights(self) -> np.ndarray:
        rates = np.full(self.num_rows, 0.5)
        rates[list(self.rates)] = list(self.rates.values())
        weights = FLOOR + (1 - rates if self.rule == "failures" else 4 * rates * (1 - rates))
        return weights / weights.sum()

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"rates": {str(row): rate for row, rate in self.rates.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        rates = state.get("rates", {})
        rows = {str(row) for row in range(self.num_rows)}
        if not isinstance(rates, dict) or not rates.keys() <= rows or not all(map(_is_share, rates.values())):
            raise ValueError("its success rates do not belong to these rows or are not between 0 and 1")
        self.rates = {int(row): rate for row, rate in rates.items()}


def _is_share(rate: object) -> bool:
    return isinstance(rate, float | int) and 0 <= rate <= 1
