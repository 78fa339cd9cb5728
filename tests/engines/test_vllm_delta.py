"""Weights that reach vLLM servers as changes, against servers that get all of them at each step."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from served import PROMPT, Served, pool, process_ids, save_model, serve
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerBase

from RL2.engines.vllm.client import VLLMClient
from RL2.parallel.processes import Processes
from RL2.types import Sampling

pytestmark = pytest.mark.vllm
STEPS, SHARE = 20, 0.02
SETTINGS = (
    *("actor.dtype=bfloat16", "rollout.dtype=bfloat16", "rollout.vllm.max_restarts=100"),
    # two servers and the tests share the cores
    *('rollout.vllm.env.OMP_NUM_THREADS="1"', "rollout.vllm.env.VLLM_CPU_OMP_THREADS_BIND=nobind"),
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "model", tokenizer, tied=False)


@pytest.fixture(scope="module")
def served(
    model: Path, tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase, processes: Processes
) -> Iterator[Served]:
    """One server that gets changes."""
    folder = tmp_path_factory.mktemp("changes")
    made = serve("vllm-delta", model, folder, tokenizer, processes, *SETTINGS)
    made.sync()
    yield made
    made.engine.close()


def step(served: Served, seed: int) -> None:
    """Change as many weights as a step at a small learning rate does, each by one bfloat16 step or a few."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in served.actor.lm.parameters():
            weight = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            chosen = torch.rand(weight.shape, generator=g) < SHARE
            weight.mul_(torch.where(chosen, 1 + 2**-7, 1.0))


def sync(served: Served) -> tuple[float, float]:
    """Return the share of all bytes that was sent, and the number of servers that got everything."""
    served.sync()
    metrics = served.engine.metrics()
    return metrics["engine/delta_share"], metrics["engine/sent_whole"]


def logps(served: Served) -> list[float]:
    (client,) = pool(served).clients
    assert isinstance(client, VLLMClient)
    return client.logps(PROMPT)


def test_twenty_steps_are_those_of_full_syncs_bit_for_bit(
    served: Served, model: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerBase, processes: Processes
) -> None:
    whole = serve("vllm", model, tmp_path, tokenizer, processes, *SETTINGS)
    try:
        whole.actor.lm.load_state_dict(served.actor.lm.state_dict())
        whole.sync()
        for seed in range(STEPS):
            step(served, seed)
            step(whole, seed)
            whole.sync()
            share, sent_whole = sync(served)
            assert 0.5 * SHARE < share < 0.05 and sent_whole == 0
            assert logps(served) == logps(whole)
        (one,), (other,) = (each.generate([PROMPT], Sampling(max_new_tokens=12)) for each in (served, whole))
        assert one.token_ids == other.token_ids
    finally:
        whole.engine.close()


def test_changes_that_were_damaged_on_the_way_are_refused(
    served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The checksums that come back are others, so the server gets everything; it computes with no damaged weight."""
    client = pool(served).clients[0]
    assert isinstance(client, VLLMClient)
    load_changes = client.load_changes

    def damaged(files: list[str], follows: str, *rest: object) -> None:
        if follows:
            file = pool(served).sync.folder / files[0]
            data = bytearray(file.read_bytes())
            data[-1] ^= 1
            file.write_bytes(data)
        load_changes(files, follows, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(client, "load_changes", damaged)
    step(served, seed=100)
    assert sync(served)[1] == 1
    assert "other checksums" in caplog.text
    monkeypatch.undo()
    step(served, seed=101)
    assert sync(served)[1] == 0, "and from there on changes again"
    assert served.engine.metrics()["engine/restarts"] == 0


@pytest.mark.parametrize("victim", [0, 1], ids=["api_server", "engine_core"])
def test_a_server_that_dies_while_changes_are_sent_gets_everything(served: Served, victim: int) -> None:
    restarts = served.engine.metrics()["engine/restarts"]
    step(served, seed=200 + victim)

    def weights() -> Iterator[tuple[str, Tensor]]:
        for i, weight in enumerate(served.actor.weights()):
            if i == 6:
                os.kill(process_ids(served, 0)[victim], signal.SIGKILL)
            yield weight

    served.version += 1
    served.engine.load_weights(weights(), served.version)
    metrics = served.engine.metrics()
    assert metrics["engine/restarts"] == restarts + 1 and metrics["engine/sent_whole"] == 1
    step(served, seed=210 + victim)
    share, sent_whole = sync(served)
    assert share < 0.05 and sent_whole == 0
    versions = {v for c in served.generate([PROMPT] * 2, Sampling(max_new_tokens=2)) for v in c.versions}
    assert versions == {served.version}
