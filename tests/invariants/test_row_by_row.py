"""Models that run row by row, and mixtures of experts: results do not depend on blocks, microbatches or processes.

Real processes, gloo.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pools import Result, assert_same, whole
from test_cuts import actor_config, gradients, make_batch, mixed
from tiny_models import tiny_config, tiny_model

from RL2.config.model import ReplayedMoe
from RL2.errors import ConfigError
from RL2.models.policy import Policy, named_weights
from RL2.parallel.processes import Processes
from RL2.parallel.tp import check_sizes
from RL2.types import StatsRequest
from RL2.workers.actor import Actor

TOLERANCE = 1e-5
MODELS = ("lfm2", "qwen3_moe", "mamba2")
"""Short convolutions, experts, and a recurrence."""


def run_cases(folder: Path, processes: Processes) -> dict[str, Result]:
    """Every case on these processes."""
    batch = mixed()
    results: dict[str, Result] = {}
    for name in MODELS:
        model = str(folder / name)
        actor = Actor(actor_config("spo", model), processes, 10, folder)
        results[name] = gradients(actor, batch, 4096)
        results[f"{name}, cut"] = gradients(actor, batch, 2 * int(batch.lengths_B.max()))
        results[f"{name}, one correct"] = gradients(actor, make_batch([1.0] + [0.0] * 7), 4096)
        stats = actor.stats(batch, StatsRequest(("logp", "entropy")), 4096)
        results[f"{name}, statistics"] = {"grads": {"logp": stats.logp, "entropy": stats.entropy}, "metrics": {}}
        for _ in range(2):
            actor.update(batch)
        results[f"{name}, two steps"] = {"grads": {n: whole(w) for n, w in actor.weights()}, "metrics": {}}
    config = actor_config("spo", str(folder / "qwen3_moe"))
    results["z-loss"] = gradients(
        Actor(replace(config, moe=ReplayedMoe(z_coef=0.1)), processes, 10, folder), batch, 4096
    )
    drawn_TLE = torch.rand(len(batch.labels_T), 2, 4, generator=torch.Generator().manual_seed(0))
    given = batch.with_(experts_T=drawn_TLE.argsort(-1)[..., :2].to(torch.int16))
    for recomputes in (True, False):
        changed = replace(config, moe=ReplayedMoe(replay="engine"), gradient_checkpointing=recomputes)
        results[f"replay, {recomputes}"] = gradients(Actor(changed, processes, 10, folder), given, 4096)
    balanced = replace(actor_config("spo", str(folder / "glm4_moe")), moe=ReplayedMoe(bias_rate=0.01))
    actor = Actor(balanced, processes, 10, folder)
    for _ in range(2):
        actor.update(batch)
    results["biases"] = {"grads": {n: whole(w) for n, w in actor.weights() if "bias" in n}, "metrics": {}}
    torch.manual_seed(0)  # the adapters' first values
    lora = replace(config.lora, rank=4, alpha=8, target_modules=("q_proj", "o_proj"))
    adapted = Actor(replace(config, lora=lora), processes, 10, folder)
    for _ in range(2):
        adapted.update(batch)
    results["adapters"] = {"grads": {n: whole(w) for n, w in named_weights(adapted.lm)}, "metrics": {}}
    return results


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    for name in (*MODELS, "glm4_moe"):
        tiny_model(tiny_config(name)).save_pretrained(folder / name)
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_two_processes_are_one(name: str, one: dict[str, Result], two: dict[str, Result]) -> None:
    assert one[name]["metrics"]["loss"] != 0
    for case in ("", ", one correct", ", statistics"):
        assert_same(one[name + case], two[name + case], TOLERANCE)
    # Adam divides by the root of the second moment: where gradients are tiny, rounding is amplified
    assert_same(one[f"{name}, two steps"], two[f"{name}, two steps"], 1e-3)


@pytest.mark.parametrize("name", MODELS)
def test_microbatches_are_one_batch(name: str, one: dict[str, Result], two: dict[str, Result]) -> None:
    for results in (one, two):
        assert_same(one[name], results[f"{name}, cut"], TOLERANCE)


def test_losses_of_routers_are_summed_over_processes(one: dict[str, Result], two: dict[str, Result]) -> None:
    assert_same(one["z-loss"], two["z-loss"], TOLERANCE)
    added = one["z-loss"]["metrics"]["loss"] - one["qwen3_moe"]["metrics"]["loss"]
    assert added == pytest.approx(0.1 * one["z-loss"]["metrics"]["moe/z_loss"], rel=1e-3)


def test_loads_of_all_processes_move_the_correction_biases(one: dict[str, Result], two: dict[str, Result]) -> None:
    (moved_E,) = (x for name, x in one["biases"]["grads"].items() if "e_score_correction_bias" in name)
    assert moved_E.unique().numel() > 1
    assert_same(one["biases"], two["biases"], 1e-6)


def test_experts_are_replayed_on_two_processes_and_in_recomputation(
    one: dict[str, Result], two: dict[str, Result]
) -> None:
    assert_same(one["replay, True"], two["replay, True"], TOLERANCE)
    assert_same(one["replay, True"], two["replay, False"], TOLERANCE)
    assert one["replay, True"]["metrics"]["moe/routes_changed"] > 0.3


def test_adapters_train_alike(one: dict[str, Result], two: dict[str, Result]) -> None:
    assert_same(one["adapters"], two["adapters"], 1e-3)


@pytest.mark.parametrize("name", MODELS)
def test_recomputation_changes_nothing(name: str, one: dict[str, Result], folder: Path, processes: Processes) -> None:
    config = actor_config("spo", str(folder / name), gradient_checkpointing=False)
    assert_same(one[name], gradients(Actor(config, processes, 10, folder), mixed(), 4096), TOLERANCE)


@pytest.mark.parametrize("size", ["tp_size", "sp_size"])
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("lfm2", "Lfm2ForCausalLM runs row by row through its own forward, which only FSDP divides"),
        ("qwen3_moe", "Qwen3MoeForCausalLM is a mixture of experts, which FSDP and ep_size divide"),
    ],
)
def test_neither_tensor_nor_sequence_parallelism_divides_such_a_model(
    size: str, name: str, said: str, folder: Path
) -> None:
    lm = Policy.build(str(folder / name))
    sizes = {"tp_size": 1, "sp_size": 1, size: 2}
    said = f"actor.{size}=2: {said}"
    with pytest.raises(ConfigError, match=said):
        check_sizes(lm, group="actor", **sizes)
