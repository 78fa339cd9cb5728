"""Rows and baselines of the losses of preferences that need no pairs: KTO, BCO and APO-zero on single responses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from RL2.config.programs import DPOConfig
from RL2.data.cursor import Cursor
from RL2.data.labelled import load_labelled
from RL2.data.source import DataError
from RL2.data.table import Ragged
from RL2.data.template import Template
from RL2.io.progress import Progress
from RL2.objectives.objective import Objective
from RL2.objectives.registry import BoundObjective, preference
from RL2.objectives.responses import Responses
from RL2.objectives.unpaired import bco, kto
from RL2.trainer.supervised import Complete, Rows, bad_rows, converter, refuse_long
from RL2.types import TokenBatch, TokenStats
from RL2.workers.metrics import LossFunction, Mean, Metric

LogRatios = Callable[[TokenBatch], torch.Tensor]
"""Returns h of each sequence, [B]: the sum over its actions of log p - log p_ref, under the present weights."""


def labelled_reader(
    config: DPOConfig,
    tokenizer: PreTrainedTokenizerBase,
    notes: list[str],
    listing: Path | None = None,
    progress: Progress | None = None,
) -> Callable[[str], Rows]:
    """Return a function that reads responses with labels, and notes on them; it lists skipped rows in `listing`.

    For KTO the rows have mismatched ones too.
    """
    data, example, template = config.data, converter(config.data), Template(tokenizer)
    objective = preference(config.actor).objective

    def read(path: str) -> Rows:
        said, bad = list[str](), bad_rows(data, path)
        found, num_left_out = load_labelled(path, tokenizer, example, data.max_length, said, bad, progress, template)
        left_out = f"{num_left_out} left out (data.max_length={data.max_length} tokens)"
        notes.extend([f"{path}: {len(found)} responses, {left_out}", *said, *bad.notes(listing)])
        rows = Rows(found.ids, found.trains, per_row=1, good=found.good.values)
        refuse_long(config, rows, path)
        if objective is not kto:
            return rows
        others = mismatch(rows, data.batch_size, path)
        refuse_long(config, others, f"{path}, with responses to other prompts")
        return replace(rows, mismatched=others)

    return read


def mismatch(rows: Rows, batch_size: int, path: str) -> Rows:
    """Return each prompt with the response of the row before it; the first of each `batch_size` rows has the last's.

    A last piece of one row joins the piece before it. Raise DataError if there is only one row.
    """
    number = len(rows.ids)
    if number < 2:
        raise DataError(f"{path}: one row; the baseline of actor.loss=kto needs responses to other prompts")
    other = np.arange(number) - 1
    starts = [n for n in range(0, number, batch_size) if n == 0 or n < number - 1] if batch_size > 1 else [0]
    for first, end in zip(starts, [*starts[1:], number], strict=True):
        other[first] = end - 1
    begins = [int(np.argmax(rows.trains[n])) for n in range(number)]

    def joined(values: Ragged) -> Ragged:
        parts = [np.concatenate([values[n][: begins[n]], values[m][begins[m] :]]) for n, m in enumerate(other.tolist())]
        return Ragged(np.concatenate(parts), np.cumsum([0, *map(len, parts)]))

    return Rows(joined(rows.ids), joined(rows.trains), per_row=1)


@dataclass
class Baseline:
    """The baseline z of each optimizer step: KTO's divergence, the running mean of BCO, or 0."""

    objective: Objective
    total: float = 0.0
    """Sum of h over all responses that have trained (BCO)."""
    number: int = 0
    """Their number."""

    def completing(self, log_ratios: LogRatios) -> Complete:
        """Return a function that gives a minibatch its baseline; in training, BCO's mean includes the minibatch."""

        def complete(batch: TokenBatch, rows: Rows, drawn: list[int], training: bool) -> TokenBatch:
            value = 0.0
            if self.objective is kto:
                assert rows.mismatched is not None
                value = max(0.0, float(log_ratios(rows.mismatched.draw(drawn)).mean()))
            elif self.objective is bco:
                if training:
                    h_B = log_ratios(batch)
                    self.total, self.number = self.total + float(h_B.sum()), self.number + len(h_B)
                value = self.total / max(1, self.number)
            return batch.with_(baseline_T=torch.full_like(batch.reward_T, value))

        return complete


class BaselineCursor(Cursor):
    """A cursor whose state has that of a baseline, so that a run resumes exactly."""

    def __init__(self, num_rows: int, batch_size: int, seed: int, baseline: Baseline) -> None:
        super().__init__(num_rows, batch_size, seed)
        self.baseline = baseline

    def state_dict(self) -> dict[str, Any]:
        """Return the position and the state of the baseline."""
        return super().state_dict() | {"baseline": [self.baseline.total, self.baseline.number]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore both. Raise ValueError if they belong to other data, another order or another loss."""
        super().load_state_dict(state)
        if "baseline" not in state:
            raise ValueError("it was saved with a loss on pairs, and now the loss reads responses with labels")
        self.baseline.total, self.baseline.number = state["baseline"]


def with_labels(objective: BoundObjective) -> LossFunction:
    """Return the loss with more metrics: the mean implicit reward of good and of bad responses, and the baseline."""

    def loss(stats: TokenStats, batch: TokenBatch) -> tuple[torch.Tensor, dict[str, Metric]]:
        loss_T, metrics = objective.loss(stats, batch)
        reward_T, good_T = metrics["reward"], Responses(batch).good_B[batch.sequence_T].float()
        more: dict[str, Metric] = {
            "reward_chosen": Mean(reward_T * good_T, good_T),
            "reward_rejected": Mean(reward_T * (1 - good_T), 1 - good_T),
        }
        if batch.baseline_T is not None:
            more["baseline"] = batch.baseline_T
        return loss_T, {**metrics, **more}

    return loss
