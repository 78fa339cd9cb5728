"""The first batch that a model sees shows whether packing changes its numbers; if it does, nothing is trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import tiny_config, tiny_model
from torch import Tensor, nn

from RL2.batch.packing import pack_tokens
from RL2.config.load import load
from RL2.config.programs import trained
from RL2.models.packed import PackedModel
from RL2.models.policy import Policy
from RL2.models.value import ValueModel
from RL2.parallel.mesh import Mesh
from RL2.parallel.processes import Processes
from RL2.types import StatsRequest, TokenBatch
from RL2.workers.worker import InvariantError, Worker


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_model(tiny_config("qwen3")).save_pretrained(folder)
    return folder


def make(folder: Path, processes: Processes, kind: type[PackedModel], dtype: str = "float32") -> Worker:
    overrides = f"""data.path=x.jsonl data.max_length=99 data.batch_size=1 actor.model_name={folder}
        actor.max_length_per_device=4096 trainer.experiment_name=x"""
    _, config = trained(load("sft", overrides.split()))
    return Worker(str(folder), dtype, Mesh.make(processes, config), processes, "actor", kind)


def batch_of(lengths: list[int]) -> TokenBatch:
    generator = torch.Generator().manual_seed(0)
    return pack_tokens([torch.randint(4, 300, (length,), generator=generator).tolist() for length in lengths])


def leak(worker: Worker) -> None:
    """Let the first layer add to each token what stood before it, over the border of sequences."""

    def shift(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = args[0]
        return (hidden + 0.1 * hidden.roll(1, dims=1).index_fill(1, torch.tensor([0]), 0), *args[1:])

    worker.lm.base_model.layers[0].register_forward_pre_hook(shift)  # type: ignore[union-attr,operator]


@pytest.mark.parametrize("kind", [Policy, ValueModel])
@pytest.mark.parametrize("lengths", [[30, 20, 90], [8, 300], [40]])
def test_a_leak_between_sequences_stops_the_run(
    folder: Path, processes: Processes, kind: type[PackedModel], lengths: list[int]
) -> None:
    worker, batch = make(folder, processes, kind), batch_of(lengths)
    leak(worker)
    with pytest.raises(
        InvariantError, match=r"^actor.model_name=.*: in a packed batch its sequences get numbers that differ"
    ):
        worker.stats(batch, kind.CHECKED, 4096)


@pytest.mark.parametrize("kind", [Policy, ValueModel])
def test_an_exact_model_is_compared_once(folder: Path, processes: Processes, kind: type[PackedModel]) -> None:
    worker, batch = make(folder, processes, kind), batch_of([30, 20, 90])
    before = worker.lm.config._attn_implementation
    worker.stats(batch, kind.CHECKED, 4096)
    assert worker.packing_checked
    assert worker.lm.config._attn_implementation == before
    leak(worker)
    worker.stats(batch, kind.CHECKED, 4096)  # not again


def test_numbers_that_are_none_stop_the_run_too(folder: Path, processes: Processes) -> None:
    worker = make(folder, processes, Policy)
    with torch.no_grad():
        next(worker.lm.parameters())[5] = float("nan")
    with pytest.raises(InvariantError, match="the model's own numbers are not finite; look for NaN in its weights"):
        worker.stats(pack_tokens([[5, 6, 7], [8, 9, 5, 5]]), StatsRequest(("logp",)), 4096)


def test_rounding_in_a_deep_value_model_is_no_leak(tmp_path: Path, processes: Processes) -> None:
    """Values near 0 are rounded like large ones: their error is a share of the usual value, not of their own."""
    settings = {"num_hidden_layers": 28, "hidden_size": 256, "intermediate_size": 512, "initializer_range": 0.25}
    tiny_model(tiny_config("qwen3", settings)).save_pretrained(tmp_path)
    torch.manual_seed(0)
    make(tmp_path, processes, ValueModel, "bfloat16").stats(batch_of([30, 20, 90]), ValueModel.CHECKED, 4096)
