"""A checkpoint of one layout of the processes goes on in another. Real processes, gloo."""

from __future__ import annotations

import functools
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch
from pools import Result, assert_same, in_pool, whole
from test_cuts import actor_config, make_batch
from transformers import Qwen3Config, Qwen3ForCausalLM

from RL2.data.cursor import Cursor
from RL2.io.checkpoint import Checkpoints, load
from RL2.parallel.processes import Processes
from RL2.types import TokenBatch
from RL2.workers.actor import Actor

LAYOUTS: dict[str, tuple[int, dict[str, int]]] = {
    "alone": (1, {}),
    "fsdp 2": (2, {}),
    "tp 2": (2, {"tp_size": 2}),
    "fsdp 2 x tp 2": (4, {"tp_size": 2}),
    "sp 4": (4, {"sp_size": 4}),
}


def make_actor(folder: Path, processes: Processes, sizes: dict[str, int]) -> Actor:
    return Actor(actor_config("spo", str(folder / "model"), **sizes), processes, 10, folder)


def save_all(folder: Path, processes: Processes) -> None:
    """Two steps, and then a checkpoint, in each layout of so many processes."""
    for name, (size, sizes) in LAYOUTS.items():
        if size == processes.world_size:
            actor, cursor = make_actor(folder, processes, sizes), Cursor(24, 4, seed=0)
            for _ in range(2):
                cursor.next()
                actor.update(batch())
            checkpoints = Checkpoints(folder / name, processes)
            checkpoints.save(2, actor, cursor)
            checkpoints.finish()


def load_all(folder: Path, processes: Processes) -> dict[str, Result]:
    """From every checkpoint, in each layout of so many processes: the weights, and those after one step more."""
    results: dict[str, Result] = {}
    for name, (size, sizes) in LAYOUTS.items():
        for source in LAYOUTS if size == processes.world_size else ():
            actor, cursor = make_actor(folder, processes, sizes), Cursor(24, 4, seed=0)
            assert load(folder / source / "step_000002", actor, cursor, processes) == 2
            loaded = {n: whole(w) for n, w in actor.weights()}
            metrics = actor.update(batch())
            after = {f"{n} after": whole(w) for n, w in actor.weights()}
            state = {"steps": actor.steps, "drawn": cursor.drawn}
            results[f"{source} -> {name}"] = {"grads": loaded | after, "metrics": metrics | state}
    return results


def batch() -> TokenBatch:
    return make_batch([float(n % 3 == 0) for n in range(12)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, processes: Processes) -> Path:
    folder = tmp_path_factory.mktemp("layouts")
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = Qwen3Config(
        vocab_size=51, intermediate_size=48, head_dim=8, tie_word_embeddings=True, initializer_range=0.2, **shape
    )
    Qwen3ForCausalLM(config).save_pretrained(folder / "model")
    save_all(folder, processes)
    for size in (2, 4):
        in_pool(save_all, folder, size)
    return folder


@pytest.fixture(scope="module")
def loaded(folder: Path, processes: Processes) -> Callable[[int], dict[str, Result]]:
    @functools.cache
    def of(size: int) -> dict[str, Result]:
        return load_all(folder, processes) if size == 1 else in_pool(load_all, folder, size)[0]

    return of


@pytest.mark.parametrize(("source", "target"), list(product(LAYOUTS, LAYOUTS)))
def test_a_checkpoint_goes_on_in_any_layout(
    source: str, target: str, loaded: Callable[[int], dict[str, Result]]
) -> None:
    expected = loaded(1)["alone -> alone"]
    assert expected["metrics"]["steps"] == 3 and expected["metrics"]["drawn"] == 8
    # Adam divides by the root of the second moment: where gradients are tiny, rounding is amplified
    assert_same(expected, loaded(LAYOUTS[target][0])[f"{source} -> {target}"], 1e-4)


def test_what_is_loaded_is_what_was_saved(loaded: Callable[[int], dict[str, Result]], folder: Path) -> None:
    """Bit for bit, whatever the layouts: only what follows is subject to rounding."""
    reference = loaded(1)
    for source, target in product(LAYOUTS, LAYOUTS):
        found = loaded(LAYOUTS[target][0])[f"{source} -> {target}"]["grads"]
        for name, weight in reference[f"{source} -> alone"]["grads"].items():
            assert name.endswith(" after") or torch.equal(found[name], weight), f"{source} -> {target}: {name}"
