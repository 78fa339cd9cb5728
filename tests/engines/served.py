"""Engines as the trainer makes them, over a small model. Those marked `vllm` need what `make engine` builds."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from tiny_models import tiny_config, tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM

from RL2.config.load import load
from RL2.engines.base import Engine
from RL2.engines.make import make_engine
from RL2.engines.served.engine import ServedEngine
from RL2.engines.served.server_pool import ServerPool
from RL2.engines.vllm.client import VLLMClient
from RL2.parallel.processes import Processes
from RL2.rollout.continuation import decode
from RL2.types import Completion, Sampling
from RL2.workers.actor import Actor

ROOT = Path(__file__).resolve().parents[2]
VLLM_PYTHON = os.environ.get("VLLM_PYTHON", f"{ROOT}/.venv-vllm/bin/python")
MAX_LENGTH = 512
PROMPT = [5 + (7 * n) % 250 for n in range(40)]

STAND_IN = Path(__file__).parent / "stand_in"
"""Has an `sglang.launch_server` that speaks its routes; no real SGLang was ever run."""

OWN_FORWARD: dict[str, dict[str, Any]] = {"lfm2": {}, "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2}}
"""A hybrid and a mixture of experts, which run their own forward: settings by type of the model."""

ENGINES = [
    "embedded",
    *(pytest.param(f"embedded-{model_type}", marks=pytest.mark.slow) for model_type in OWN_FORWARD),
    "sglang",
    pytest.param("vllm", marks=pytest.mark.vllm),
    pytest.param("vllm-broadcast", marks=pytest.mark.vllm),
]
"""With the type of a model that runs its own forward, or the transport of the weights if it is not files."""


@dataclass
class Served:
    """An engine with the actor that it gets its weights from."""

    name: str
    engine: Engine
    actor: Actor
    tokenizer: PreTrainedTokenizerBase
    model: Path
    version: int = 0

    def sync(self) -> None:
        self.version += 1
        self.engine.load_weights(self.actor.weights(), self.version)

    def change_weights(self, seed: int) -> None:
        g = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.actor.lm.parameters():
                parameter.add_(0.03 * torch.randn(parameter.shape, generator=g))

    def generate(self, prompts: list[list[int]], sampling: Sampling) -> list[Completion]:
        """All at once; request i has seed 100 + i."""

        async def everything() -> list[Completion]:
            requests = (self.engine.generate(p, replace(sampling, seed=100 + i)) for i, p in enumerate(prompts))
            return await asyncio.gather(*requests)

        return asyncio.run(everything())

    def reference(self) -> PreTrainedModel:
        """transformers' own model with the present weights, in its own attention."""
        lm = AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32, attn_implementation="eager").eval()
        lm.load_state_dict(self.actor.lm.state_dict())
        return lm


def assert_agree(completions: list[Completion], expected: list[Completion]) -> None:
    """Fail if more than one has other tokens than expected.

    A forward pass with other requests beside it rounds differently, and now and then the number drawn lies so near to
    the border between two tokens that this decides. A lost seed or a wrong position would change many.
    """
    differ = [
        i
        for i, (ours, theirs) in enumerate(zip(completions, expected, strict=True))
        if ours.token_ids != theirs.token_ids
    ]
    assert len(differ) <= 1, f"{len(differ)} of {len(expected)} have other tokens: {differ}"


def save_model(folder: Path, tokenizer: PreTrainedTokenizerBase, tied: bool) -> Path:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=MAX_LENGTH,
        initializer_range=0.3,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        dtype="float32",
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_own_forward(folder: Path, tokenizer: PreTrainedTokenizerBase, model_type: str) -> Path:
    """A small model of a type in OWN_FORWARD."""
    tokens = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    tiny_model(tiny_config(model_type, OWN_FORWARD[model_type] | tokens)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def serve(
    engine: str, model: Path, folder: Path, tokenizer: PreTrainedTokenizerBase, processes: Processes, *overrides: str
) -> Served:
    engine, _, transport = engine.partition("-")
    launches_stand_in = engine == "sglang" and not any("sglang.urls" in override for override in overrides)
    config = load(
        "spo",
        [
            "train_data.path=none",
            "train_data.prompts_per_rollout=2",
            f"actor.model_name={model}",
            f"actor.max_length_per_device={MAX_LENGTH}",
            "rollout.train_sampling_params.max_new_tokens=16",
            "rollout.env_path=none",
            "rollout.max_running_requests=64",
            "rollout.max_staleness=1",  # or the embedded engine would sample from the actor's own tensors
            f"rollout.engine={engine}",
            f"rollout.vllm.python={VLLM_PYTHON}",
            f"rollout.sglang.python={sys.executable}",
            "trainer.experiment_name=test",
            *([f"rollout.vllm.transport={transport}"] if transport else []),
            *overrides,
            *([f"rollout.sglang.env.PYTHONPATH='{STAND_IN}:{ROOT}'"] if launches_stand_in else []),
        ],
    )
    actor = Actor(config.actor, processes, 1, folder)
    made = make_engine(config.rollout, actor, lambda ids: decode(tokenizer, ids), MAX_LENGTH, folder)
    return Served(engine, made, actor, tokenizer, model)


def two_servers(
    engine: str, folder: Path, tokenizer: PreTrainedTokenizerBase, processes: Processes
) -> Iterator[Served]:
    """Of a model with an untied head; they are closed after use."""
    model = save_model(folder / "model", tokenizer, tied=False)
    key = engine.partition("-")[0]
    several = (f"rollout.{key}.num_servers=2", f"rollout.{key}.max_restarts=100")  # tests kill many
    served = serve(engine, model, folder, tokenizer, processes, *several)
    served.sync()
    yield served
    served.engine.close()


def pool(served: Served) -> ServerPool:
    assert isinstance(served.engine, ServedEngine) and served.engine.pool is not None
    return served.engine.pool


def process_ids(served: Served, i: int) -> list[int]:
    """Of server i: the API server and its engine."""
    process = pool(served).servers[i].process
    assert process is not None
    return [process.pid, *(child.pid for child in psutil.Process(process.pid).children(recursive=True))]


def wait_for(condition: object, limit_s: float = 300) -> None:
    assert callable(condition)
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, f"waited for {limit_s} s"
        time.sleep(0.1)


@contextmanager
def started_by_hand(model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[VLLMClient]:
    """A vLLM server as docs/engines.md says; $VLLM_API_KEY has its token."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    plugin, wire = ROOT / "RL2/engines/vllm/plugin", ROOT / "RL2/engines/served/wire"
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", "1")
    monkeypatch.setenv("PYTHONPATH", f"{plugin}:{wire}")
    command = [VLLM_PYTHON, str(plugin / "launch.py"), *BY_HAND, "--model", str(model), "--port", str(port)]
    with (folder / f"{port}.log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        client = VLLMClient(f"http://127.0.0.1:{port}", "secret")
        wait_for(lambda: server.poll() is not None or client.is_healthy(5))
        assert server.poll() is None, (folder / f"{port}.log").read_text()
        yield client
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


BY_HAND = [
    *("--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager", "--distributed-executor-backend", "uni"),
    *("--max-model-len", str(MAX_LENGTH), "--kv-cache-memory-bytes", "100000000", "--enable-scale-out"),
    *("--generation-config", "vllm", "--logprobs-mode", "processed_logprobs"),
    *("--weight-transfer-config", '{"backend": "rl2"}', "--worker-extension-cls", "rl2_plugin.WorkerExtension"),
    *("--middleware", "rl2_plugin.TokenRequired"),
]


@torch.no_grad()
def logits_of(lm: PreTrainedModel, prompt: list[int], token_ids: list[int]) -> Tensor:
    """[n, V]: before each of `token_ids`, which follow the prompt."""
    return lm(torch.tensor([prompt + token_ids])).logits[0, len(prompt) - 1 : -1]


def logps_of(lm: PreTrainedModel, prompt: list[int], token_ids: list[int], sampling: Sampling) -> Tensor:
    """What the log-probabilities of a completion have to be."""
    logits_NV = logits_of(lm, prompt, token_ids) / (sampling.temperature or 1.0)
    if sampling.top_k:
        logits_NV = logits_NV.masked_fill(logits_NV < logits_NV.topk(sampling.top_k).values[:, -1:], -torch.inf)
    if sampling.top_p < 1:
        p_NV, order_NV = logits_NV.softmax(-1).sort(descending=True)
        is_kept_NV = p_NV.cumsum(-1) - p_NV < sampling.top_p
        logits_NV = logits_NV.masked_fill(~is_kept_NV.gather(1, order_NV.argsort()), -torch.inf)
    return logits_NV.log_softmax(-1).gather(1, torch.tensor(token_ids)[:, None])[:, 0]
