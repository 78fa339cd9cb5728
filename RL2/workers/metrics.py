"""Metrics of an update: each says what it is divided by."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from RL2.parallel.processes import Processes
from RL2.types import TokenBatch, TokenStats


@dataclass(frozen=True)
class Mean:
    """A metric that is the sum of `value_T` over the sum of `counted_T`, each over the tokens that train.

    It is left out where nothing is counted.
    """

    value_T: Tensor
    counted_T: Tensor


@dataclass(frozen=True)
class Max:
    """A metric that is the largest `value_T` of the tokens that train, at least 0; NaN counts as infinite."""

    value_T: Tensor


Metric = Tensor | Mean | Max
"""A plain tensor [T] is averaged over the tokens that train."""

LossFunction = Callable[[TokenStats, TokenBatch], tuple[Tensor, Mapping[str, Metric]]]
"""Returns loss_T and metrics of the action tokens of a microbatch."""


def mean_of(metric: Metric, trains_T: Tensor) -> float | None:
    """Return a metric over the tokens that train, here and in one piece; None where a `Mean` counts nothing."""
    if isinstance(metric, Max):
        return float(metric.value_T[trains_T].max().clamp(min=0))
    if isinstance(metric, Tensor):
        return float(metric[trains_T].double().mean())
    counted = metric.counted_T[trains_T].double().sum()
    return float(metric.value_T[trains_T].double().sum() / counted) if counted else None


class Totals:
    """Sums and maxima of metrics over microbatches and processes. Their names must be equal on all processes."""

    def __init__(self, processes: Processes, data: dist.ProcessGroup | None = None) -> None:
        """Start at 0; `data` is the group with one process from each part of the data, None for all processes."""
        self.processes, self.data = processes, data
        self.sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), dtype=torch.float64))
        self.counts: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), dtype=torch.float64))
        self.peaks: dict[str, tuple[float, str]] = {}
        """Maxima on this process, and the token of each."""

    def add(self, loss: Tensor, trains_T: Tensor, metrics: Mapping[str, Metric], where: Callable[[int], str]) -> None:
        """Add a microbatch; `where(t)` describes its token `t`."""
        self.sums["loss"] += loss.detach().double().cpu()
        self.sums["tokens"] += trains_T.sum().double().cpu()
        for name, metric in metrics.items():
            if isinstance(metric, Max):
                self._add_peak(name, torch.where(trains_T, metric.value_T.detach(), 0), where)
                continue
            value_T = metric.value_T if isinstance(metric, Mean) else metric
            self.sums[name] += torch.where(trains_T, value_T.detach(), 0).double().sum().cpu()
            if isinstance(metric, Mean):
                self.counts[name] += torch.where(trains_T, metric.counted_T, 0).double().sum().cpu()

    def add_mean(self, name: str, value_N: Tensor) -> None:
        """Add values to the metric `name`, their mean over microbatches and processes."""
        self.sums[name] += value_N.detach().double().sum().cpu()
        self.counts[name] += len(value_N)

    def _add_peak(self, name: str, value_T: Tensor, where: Callable[[int], str]) -> None:
        # the maximum of NaN and a number would depend on their order
        value_T = value_T.double().nan_to_num(nan=math.inf, posinf=math.inf)
        self.peaks.setdefault(name, (0.0, ""))
        if len(value_T) and float(value_T.max()) > self.peaks[name][0]:
            t = int(value_T.argmax())
            self.peaks[name] = float(value_T[t]), where(t)

    def means(self) -> dict[str, float]:
        """Return the metrics over all processes (collective).

        The loss is a sum, because its weights make it a mean. The others are left out if no token trains.
        """
        sums, counts = self._over_processes(self.sums), self._over_processes(self.counts)
        means = {"loss": sums.pop("loss"), "tokens": sums.pop("tokens")}
        peaks = {name: self._max_over_processes(peak) for name, (peak, _) in self.peaks.items()}
        for name, total in sums.items():
            if count := counts.get(name, means["tokens"]):
                means[name] = total / count
        return means | (peaks if means["tokens"] else {})

    def _over_processes(self, sums: dict[str, Tensor]) -> dict[str, float]:
        if not sums:
            return {}
        summed = self.processes.sum(torch.stack(list(sums.values())), self.data).tolist()
        return dict(zip(sums, summed, strict=True))

    def _max_over_processes(self, peak: float) -> float:
        return float(self.processes.max(torch.tensor(peak, dtype=torch.float64), self.data))

    def largest(self, name: str) -> str:
        """Describe the largest value of a `Max` metric over all processes (collective)."""
        value, where = max(self.processes.gather([self.peaks[name]]))
        return f"the largest is {value:g} at {where}"


def engine_gap(stats: TokenStats, batch: TokenBatch) -> dict[str, Metric]:
    """Return metrics of the distance between the log-probabilities of trainer and engine, in nats.

    Tokens that older weights sampled differ for another reason; `drift` has their distance.
    """
    assert batch.engine_logp_T is not None
    old_T = stats.logp.detach() if batch.old_logp_T is None else batch.old_logp_T
    gap_T = (old_T - batch.engine_logp_T).abs()
    if batch.age_T is None:
        return {"logp_gap": gap_T, "logp_gap_max": Max(gap_T)}
    present_T = (batch.age_T == 0).float()
    present_gap_T, stale_T = gap_T * present_T, 1 - present_T
    return {
        "logp_gap": Mean(present_gap_T, present_T),
        "logp_gap_max": Max(present_gap_T),
        "on_policy": present_T,
        "drift": Mean(gap_T * stale_T, stale_T),
    }


def mean_over_updates(updates: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean of each metric over the updates that have it."""
    history: dict[str, list[float]] = defaultdict(list)
    for metrics in updates:
        for name, value in metrics.items():
            history[name].append(value)
    return {name: sum(values) / len(values) for name, values in history.items()}
