"""Expert parallelism gives the numbers of one process. Real processes, gloo.

A batch has routes of its own, which are uneven; given routes that leave an expert out; and, by the correction biases of
a router, only routes to the experts of the first process. On two processes one may have no sequence.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pools import Result, assert_same, in_pool, whole
from safetensors.torch import load_file
from sampling import generate
from test_cuts import actor_config, gradients, make_batch
from tiny_models import tiny_config, tiny_model
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from benchmarks.traffic import Traffic
from RL2.config.model import Lora, ReplayedMoe
from RL2.data.cursor import Cursor
from RL2.engines.embedded.engine import EmbeddedEngine
from RL2.io.checkpoint import Checkpoints, load
from RL2.models.policy import empty_model
from RL2.models.routing import find_routers
from RL2.parallel.cost import Layout, Shape, traffic
from RL2.parallel.fsdp import local
from RL2.parallel.processes import Processes
from RL2.types import Sampling, StatsRequest, TokenBatch
from RL2.workers.actor import Actor

TOLERANCE = 1e-5
SPLIT, BIASED, PLAIN = "qwen3_moe", "glm4_moe", "gpt_oss"
"""Experts alone; beside shared experts, with correction biases; with biases of their own, in a transposed layout."""


def batch() -> TokenBatch:
    return make_batch([float(n % 3 == 0) for n in range(8)])


def make_actor(folder: Path, processes: Processes, name: str = SPLIT, **changes: object) -> Actor:
    sizes = {"ep_size": 2} if processes.world_size > 1 else {}
    return Actor(actor_config("spo", str(folder / name), **sizes, **changes), processes, 10, folder)


def weights(actor: Actor) -> Result:
    return {"grads": {name: whole(w) for name, w in actor.weights()}, "metrics": {}}


def run_cases(folder: Path, processes: Processes) -> dict[str, Result]:
    """Every case on one process, or with the experts split over two."""
    mixed, size = batch(), processes.world_size
    results: dict[str, Result] = {}
    for name in (BIASED, PLAIN):
        actor = make_actor(folder, processes, name, moe=ReplayedMoe(bias_rate=0.1 * (name == BIASED)))
        results[name] = gradients(actor, mixed, 4096)
        if name == BIASED:
            actor.update(mixed)
            results["biases"] = {"grads": {n: x for n, x in actor.weights() if "correction" in n}, "metrics": {}}
    actor = make_actor(folder, processes)
    results[SPLIT] = gradients(actor, mixed, 4096)
    results["cut"] = gradients(actor, mixed, int(mixed.lengths_B.max()))
    results["one correct"] = gradients(actor, make_batch([1.0] + [0.0] * 3), 4096)
    stats = actor.stats(mixed, StatsRequest(("logp", "entropy")), 4096)
    results["statistics"] = {"grads": {"logp": stats.logp, "entropy": stats.entropy}, "metrics": {}}
    actor.export(AutoTokenizer.from_pretrained(folder / "tokenizer"), folder / f"export_{size}")
    lm = empty_model(actor.lm, torch.float32, torch.device("cpu"))
    engine = EmbeddedEngine(lm, decode=str, max_running_requests=2, memory_share=0.5)
    engine.load_weights(actor.weights(), 1)
    samples = generate(engine, [[5, 6, 7, 8], [9, 10]], Sampling(max_new_tokens=6))
    results["samples"] = {"grads": {}, "metrics": {"tokens": [each.token_ids for each in samples]}}
    results.update(trained(actor, folder, processes))
    torch.manual_seed(0)  # the adapters' first values
    adapted = make_actor(folder, processes, lora=Lora(rank=4, target_modules=("q_proj", "o_proj")))
    for _ in range(2):
        adapted.update(mixed)
    results["adapters"] = weights(adapted)

    given_TLK = torch.rand(len(mixed.labels_T), 2, 3, generator=torch.Generator().manual_seed(0)).argsort(-1)[..., :2]
    given = mixed.with_(experts_T=given_TLK.to(torch.int16))  # never the last expert
    for recomputes in (True, False):
        moe = ReplayedMoe(replay="engine", z_coef=0.1)
        actor = make_actor(folder, processes, moe=moe, gradient_checkpointing=recomputes)
        results[f"given, {recomputes}"] = gradients(actor, given, 4096)
        if recomputes and size > 1:
            results["communication"] = communication(actor)
    return results


def trained(actor: Actor, folder: Path, processes: Processes) -> dict[str, Result]:
    """Train for three steps, with a checkpoint after two; and on two processes from the checkpoint of one."""
    cursor, checkpoints = Cursor(24, 4, seed=0), Checkpoints(folder / f"steps_{processes.world_size}", processes)
    metrics = [actor.update(batch()) for _ in range(2)]
    checkpoints.save(2, actor, cursor)
    checkpoints.finish()
    metrics.append(actor.update(batch()))
    results = {
        "trained": weights(actor) | {"metrics": {f"{n} {s}": x for s, m in enumerate(metrics) for n, x in m.items()}}
    }
    if processes.world_size > 1:
        results["resumed"] = resumed(folder, processes, "steps_1")
    return results


def resumed(folder: Path, processes: Processes, source: str) -> Result:
    """The third step after a checkpoint."""
    actor = make_actor(folder, processes)
    assert load(folder / source / "step_000002", actor, Cursor(24, 4, seed=0), processes) == 2
    actor.update(batch())
    return weights(actor)


def communication(actor: Actor) -> Result:
    """Return what a backward pass sends and holds here, with evenly routed tokens, and what the cost model says."""
    single = batch().sequences([0, 0])  # one for each process
    even_TLK = torch.arange(len(single.labels_T))[:, None, None] % 2 + torch.tensor([0, 2])
    even = single.with_(experts_T=even_TLK.expand(-1, 2, -1).to(torch.int16), weight_T=single.action_T.float())
    shape, tokens = Shape.of(actor.lm.config), int(single.lengths_B[0])
    actor.config = replace(actor.config, max_length_per_device=tokens)
    with Traffic() as seen:
        actor.backward(even, actor.loss, actor.request)
    fields = len(actor.request.fields)
    sizes = {"tokens": tokens, "actions": tokens, "num_fields": fields, "itemsize": 4}
    said = traffic(shape, Layout(fsdp=2, ep=2), microbatches=1, recompute=True, **sizes)
    held = sum(local(p).nbytes for p in actor.policy.parameters())
    names = {"all-gather", "reduce-scatter", "all-to-all"}
    return {
        "said": {name: x for (_, name), x in said.items() if name in names and x} | {"held": 2.0 * shape.parameters},
        "seen": {name: x for name, x in seen.by_collective().items() if name in names} | {"held": held},
    }


def run_four(folder: Path, processes: Processes) -> dict[str, Result]:
    """Two shards or two replicas of experts that are split over two processes."""
    results = {}
    for ddp_size in (1, 2):
        actor = make_actor(folder, processes, ddp_size=ddp_size)
        results[f"replicas {ddp_size}"] = gradients(actor, batch(), 4096)
        for _ in range(3):
            actor.update(batch())
        results[f"replicas {ddp_size}, trained"] = weights(actor)
    return results


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase) -> Path:
    folder = tmp_path_factory.mktemp("experts")
    for name in (SPLIT, BIASED, PLAIN):
        model = tiny_model(tiny_config(name))
        for router in find_routers(model).all if name == BIASED else ():
            assert router.bias_E is not None
            router.bias_E[:2] = 9
        model.save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / "tokenizer")
    return folder


@pytest.mark.parametrize("case", [SPLIT, BIASED, PLAIN, "cut", "one correct", "statistics", "given, True"])
def test_two_processes_are_one(case: str, one: dict[str, Result], two: dict[str, Result]) -> None:
    assert_same(one[case], two[case], TOLERANCE)


def test_experts_were_left_out(one: dict[str, Result]) -> None:
    assert one[BIASED]["metrics"]["moe/unused_experts"] == 0.5
    assert one["given, True"]["metrics"]["moe/unused_experts"] == 0.25


def test_correction_biases_move_by_the_loads_of_all_processes(one: dict[str, Result], two: dict[str, Result]) -> None:
    assert one["biases"]["grads"]
    assert all(moved_E[0] < 9 and moved_E[2] > 0 for moved_E in one["biases"]["grads"].values())
    assert_same(one["biases"], two["biases"], 1e-6)


def test_recomputation_changes_nothing(two: dict[str, Result]) -> None:
    assert_same(two["given, True"], two["given, False"], TOLERANCE)


def test_three_steps_are_those_of_one_process(one: dict[str, Result], two: dict[str, Result]) -> None:
    assert one["trained"]["metrics"]["actor/grad_norm 2"] > 0
    # Adam divides by the root of the second moment: where gradients are tiny, rounding is amplified
    assert_same(one["trained"], two["trained"], 1e-4)
    assert_same(one["adapters"], two["adapters"], 1e-4)


def test_a_checkpoint_goes_on_with_experts_split_or_whole(
    one: dict[str, Result], two: dict[str, Result], folder: Path, processes: Processes
) -> None:
    expected = one["trained"] | {"metrics": {}}
    assert_same(expected, two["resumed"], 1e-4)
    assert_same(expected, resumed(folder, processes, "steps_2"), 1e-4)


def test_engine_and_export_have_whole_experts(one: dict[str, Result], two: dict[str, Result], folder: Path) -> None:
    assert two["samples"] == one["samples"]
    stored, *exports = (load_file(folder / name / "model.safetensors") for name in (SPLIT, "export_1", "export_2"))
    for export in exports:
        assert export.keys() == stored.keys()
        assert all(torch.equal(export[name], weight) for name, weight in stored.items())


def test_communication_is_what_the_cost_model_says(two: dict[str, Result]) -> None:
    said, seen = two["communication"]["said"], two["communication"]["seen"]
    assert seen.keys() == said.keys()
    for name, size in said.items():
        assert seen[name] == pytest.approx(size, rel=0.05), name


@pytest.mark.parametrize("case", ["replicas 1", "replicas 2"])
def test_four_processes_are_one(case: str, one: dict[str, Result], four: dict[str, Result]) -> None:
    assert_same(one[SPLIT], four[case], TOLERANCE)
    assert_same(one["trained"] | {"metrics": {}}, four[f"{case}, trained"], 1e-4)


@pytest.fixture(scope="module")
def four(folder: Path) -> dict[str, Result]:
    found: dict[str, Result] = in_pool(run_four, folder, 4)[0]
    return found
