"""Packed models with more than plain attention and a plain head: every layout gives the numbers of one process."""

from __future__ import annotations

from pathlib import Path

import pytest
from pools import Result, assert_same
from test_cuts import actor_config, gradients, mixed
from tiny_models import tiny_config, tiny_model

from RL2.parallel.processes import Processes
from RL2.workers.actor import Actor

MODELS = ("phi",)
"""A head with a bias."""
LAYOUTS = {"fsdp": {}, "tp": {"tp_size": 2}, "sp": {"sp_size": 2}}


def run_cases(folder: Path, processes: Processes) -> dict[str, Result]:
    """Every model in every layout of these processes."""
    batch = mixed()
    results: dict[str, Result] = {}
    for name in MODELS:
        for layout, sizes in LAYOUTS.items() if processes.world_size > 1 else [("alone", {})]:
            actor = Actor(actor_config("spo", str(folder / name), **sizes), processes, 10, folder)
            results[f"{name}, {layout}"] = gradients(actor, batch, 4096)
    return results


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("variants")
    for name in MODELS:
        tiny_model(tiny_config(name)).save_pretrained(folder / name)
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
def test_a_layout_is_one_process(name: str, layout: str, one: dict[str, Result], two: dict[str, Result]) -> None:
    assert one[f"{name}, alone"]["metrics"]["loss"] != 0
    assert_same(one[f"{name}, alone"], two[f"{name}, {layout}"], 1e-5)
