"""Whole runs of spo, from rollout to checkpoint, in layouts of the processes: the metrics of one process alone."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from programs import Run, World, without_times
from pyarrow import parquet
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "alone": (1, ()),
    "fsdp 2": (2, ()),
    "tp 2": (2, ("actor.tp_size=2",)),
    "sp 2": (2, ("actor.sp_size=2",)),
    "hsdp 2x2": (4, ("actor.ddp_size=2",)),
    "fsdp 2 x tp 2": (4, ("actor.tp_size=2",)),
    "fsdp 2 x sp 2": (4, ("actor.sp_size=2",)),
    "tp 2 x sp 2": (4, ("actor.tp_size=2", "actor.sp_size=2")),
}

ROUNDING = ("actor/logp_gap", "actor/logp_gap_max")
"""Metrics that are nothing but rounding."""


@pytest.fixture(scope="module")
def model(world: World) -> Path:
    """The world's model with heads that two divides."""
    config = AutoConfig.from_pretrained(world.model)
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = 4, 2, 16
    torch.manual_seed(0)
    folder = world.root / "even_model"
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(world.model).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def runs(world: World, model: Path) -> Iterator[dict[str, Future[Run]]]:
    """One after the other: each has as many processes as there are cores, or more."""
    settings = (
        f"actor.model_name={model}",
        f"test_data.path={world.root}/rl.jsonl",
        "actor.update_per_rollout=2",
        "trainer.test_freq=2",
        "trainer.save_freq=2",
    )
    with ThreadPoolExecutor(1) as pool:
        yield {
            name: pool.submit(world.run, "spo", *settings, *sizes, nproc=nproc)
            for name, (nproc, sizes) in LAYOUTS.items()
        }
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "alone"])
def test_a_run_in_a_layout_is_the_run_of_one_process(layout: str, runs: dict[str, Future[Run]]) -> None:
    one, many = runs["alone"].result().succeeded(), runs[layout].result().succeeded()
    assert [sample["texts"] for sample in many.samples] == [sample["texts"] for sample in one.samples]
    for row, other in zip(without_times(one.metrics), without_times(many.metrics), strict=True):
        assert all(other.get(name, 0.0) < 1e-5 for name in ROUNDING)
        expected = {name: value for name, value in row.items() if name not in ROUNDING}
        found = {name: value for name, value in other.items() if name not in ROUNDING}
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-7)
    weights, others = load_file(one.weights), load_file(many.weights)
    assert weights.keys() == others.keys()
    for name in weights:
        # Adam divides by the root of the second moment: where gradients are tiny, rounding is amplified
        assert (others[name] - weights[name]).norm() <= 1e-4 * weights[name].norm(), name


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "alone"])
def test_single_tokens_are_seen_alike(runs: dict[str, Future[Run]], layout: str) -> None:
    alone, other = (runs[name].result().succeeded().save_dir / "tokens" for name in ("alone", layout))
    files = sorted(file.name for file in alone.iterdir())
    assert files == sorted(file.name for file in other.iterdir())
    for one, same in zip(
        *(parquet.read_table(at / "000000_train.parquet").to_pylist() for at in (alone, other)), strict=True
    ):
        assert one["tokens"] == same["tokens"]
        for name in ("logp", "max_logp", "entropy", "loss_T", "pull_T"):
            assert one[name] == pytest.approx(same[name], abs=1e-4), name
