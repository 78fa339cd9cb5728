"""Packed models with more than plain attention and a plain head: every layout gives the numbers of one process."""

from __future__ import annotations

from pathlib import Path

import pytest
from pools import Result, assert_same
from test_cuts import actor_config, gradients, mixed
from tiny_models import tiny_config, tiny_model

from RL2.errors import ConfigError
from RL2.models.policy import Policy
from RL2.parallel.processes import Processes
from RL2.parallel.tp import check_sizes
from RL2.types import StatsRequest
from RL2.workers.actor import Actor

MODELS = ("phi", "gemma2", "granite_swa", "deepseek_v3", "apertus")
"""A head with a bias; sliding windows and soft caps of scores and logits; sliding windows and attention sinks; values
smaller than keys; activations with parameters."""
SPLIT_OTHERWISE = ("glm4", "olmo2", "phi3", "deepseek_v2")
"""Tensor-parallel plans: fused weights of an MLP; norms over all heads; fused weights of attention; a shared key."""
LAYOUTS = {"fsdp": {}, "tp": {"tp_size": 2}, "sp": {"sp_size": 2}}
WITHOUT_TP = ("granite_swa", "deepseek_v3")
CASES = [(name, layout) for name in MODELS for layout in LAYOUTS if layout != "tp" or name not in WITHOUT_TP]
CASES += [(name, "tp") for name in SPLIT_OTHERWISE]


def run_cases(folder: Path, processes: Processes) -> dict[str, Result]:
    """Every case in the layouts of these processes."""
    batch = mixed()
    results: dict[str, Result] = {}
    for name, layout in CASES if processes.world_size > 1 else [(name, "alone") for name in MODELS + SPLIT_OTHERWISE]:
        sizes = LAYOUTS.get(layout, {})
        actor = Actor(actor_config("spo", str(folder / name), **sizes), processes, 10, folder)
        actor.stats(batch, StatsRequest(("logp",)), 4096)  # sequences are compared with each alone
        results[f"{name}, {layout}"] = gradients(actor, batch, 4096)
    return results


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("variants")
    for name in MODELS + SPLIT_OTHERWISE:
        tiny_model(tiny_config(name)).save_pretrained(folder / name)
    return folder


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_a_layout_is_one_process(name: str, layout: str, one: dict[str, Result], two: dict[str, Result]) -> None:
    assert one[f"{name}, alone"]["metrics"]["loss"] != 0
    assert_same(one[f"{name}, alone"], two[f"{name}, {layout}"], 1e-5)


def test_sinks_are_not_split_by_tensor_parallelism(folder: Path) -> None:
    lm = Policy.build(str(folder / "granite_swa"))
    with pytest.raises(
        ConfigError, match=r"^actor.tp_size=2: GraniteSWAForCausalLM has attention sinks, which are not"
    ):
        check_sizes(lm, 2, 1, "actor")
