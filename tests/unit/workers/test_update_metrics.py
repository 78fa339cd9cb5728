"""Metrics of an update: what each is divided by, and which are left out."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from RL2.parallel.processes import Processes
from RL2.workers.metrics import Max, Mean, Metric, Totals, mean_over_updates

TRAINS_T = torch.tensor([True, True, False, True])
VALUE_T = torch.tensor([1.0, 4.0, 100.0, 4.0])


def totals_of(processes: Processes, *microbatches: tuple[Tensor, dict[str, Metric]]) -> Totals:
    totals = Totals(processes)
    for trains_T, metrics in microbatches:
        totals.add(torch.tensor(0.5), trains_T, metrics, lambda t: f"token {t}")
    return totals


def test_a_mean_has_the_denominator_that_it_names(processes: Processes) -> None:
    counted_T = torch.tensor([0.0, 1.0, 1.0, 1.0])
    metrics: dict[str, Metric] = {"plain": VALUE_T, "some": Mean(VALUE_T * counted_T, counted_T), "top": Max(VALUE_T)}
    none_T = torch.zeros(4, dtype=torch.bool)
    totals = totals_of(processes, (TRAINS_T, metrics), (TRAINS_T, metrics), (none_T, metrics))
    assert totals.means() == {"loss": 1.5, "tokens": 6.0, "plain": 3.0, "some": 4.0, "top": 4.0}
    assert totals.largest("top") == "the largest is 4 at token 1"


def test_a_mean_over_nothing_is_left_out(processes: Processes) -> None:
    nothing: dict[str, Metric] = {"none": Mean(VALUE_T, torch.zeros(4)), "plain": VALUE_T}
    assert totals_of(processes, (TRAINS_T, nothing)).means().keys() == {"loss", "tokens", "plain"}
    none_T = torch.zeros(4, dtype=torch.bool)
    assert totals_of(processes, (none_T, nothing | {"top": Max(VALUE_T)})).means() == {"loss": 0.5, "tokens": 0.0}


def test_a_maximum_finds_what_is_no_number_wherever_it_is(processes: Processes) -> None:
    for t in (0, 1, 3):
        value_T = VALUE_T.clone()
        value_T[t] = math.nan
        totals = totals_of(processes, (TRAINS_T, {"top": Max(value_T)}))
        assert totals.means()["top"] == math.inf
        assert totals.largest("top") == f"the largest is inf at token {t}"


def test_updates_count_for_the_metrics_that_they_have() -> None:
    assert mean_over_updates([{"a": 1.0, "b": 5.0}, {"a": 2.0}]) == {"a": 1.5, "b": 5.0}
