"""How a vLLM server is launched."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PretrainedConfig

from RL2.config.rollout import Rollout
from RL2.engines.embedded.cache import bytes_per_position
from RL2.engines.embedded.engine import free_bytes
from RL2.engines.served.server_spec import Kind
from RL2.engines.vllm.client import SleepingVLLMClient, VLLMClient

PLUGIN = Path(__file__).parent / "plugin"

VLLM_SERVER = Kind(
    name="vLLM",
    key="vllm",
    client=VLLMClient,
    launcher=PLUGIN / "launch.py",
    token_variable="VLLM_API_KEY",
    prefix="VLLM_",
    environment={
        "VLLM_SERVER_DEV_MODE": "1",  # the routes that change weights
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
    },
    plugins=PLUGIN,
)
SLEEPING_VLLM_SERVER = replace(VLLM_SERVER, client=SleepingVLLMClient)
"""As it is launched on a GPU."""


def server_arguments(rollout: Rollout, model: PretrainedConfig, dtype: torch.dtype, max_length: int) -> list[str]:
    """The command line of a server for sequences of up to `max_length` tokens, but for its address."""
    settings = rollout.vllm
    arguments = {
        "model": rollout.model_name,
        "dtype": str(dtype).removeprefix("torch."),
        "max-model-len": max_length,
        "max-num-seqs": rollout.max_running_requests,
        # a sync brings the weights, and one that does not would show at once
        "load-format": "dummy",
        "generation-config": "vllm",  # not the model's, which would set a temperature of its own
        "logprobs-mode": "processed_logprobs",  # after temperature, top_p and top_k
        "weight-transfer-config": json.dumps({"backend": "rl2"}),
        "worker-extension-cls": "rl2_plugin.WorkerExtension",
        "middleware": "rl2_plugin.TokenRequired",
    }
    if torch.cuda.is_available():
        arguments["gpu-memory-utilization"] = rollout.gpu_memory_utilization
    else:
        arguments["distributed-executor-backend"] = "uni"
    if settings.kv_cache_mib is not None:
        arguments["kv-cache-memory-bytes"] = settings.kv_cache_mib * 2**20
    elif not torch.cuda.is_available():
        wanted = _kv_cache_bytes(rollout.max_running_requests, model, dtype, max_length)
        room = rollout.gpu_memory_utilization * free_bytes(torch.device("cpu")) / settings.num_servers
        arguments["kv-cache-memory-bytes"] = min(wanted, int(room))
    flags = ["--enable-scale-out", "--disable-uvicorn-access-log"]
    flags += ["--enable-sleep-mode"] if torch.cuda.is_available() else []
    flags += [] if torch.cuda.is_available() or rollout.compile else ["--enforce-eager"]
    return [*flags, *(str(x) for key, value in arguments.items() for x in (f"--{key}", value)), *settings.args]


CPU_BLOCK = 128
"""Positions that vLLM's KV cache is cut into on CPUs."""


def _kv_cache_bytes(num_sequences: int, model: PretrainedConfig, dtype: torch.dtype, max_length: int) -> int:
    blocks = num_sequences * -(-max_length // CPU_BLOCK) + 2
    return blocks * CPU_BLOCK * bytes_per_position(model, dtype)
