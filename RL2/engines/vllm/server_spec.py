"""Launch of vLLM servers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PretrainedConfig

from RL2.config.rollout import Rollout
from RL2.engines.memory import bytes_per_position, free_bytes
from RL2.engines.served.server_spec import ServerSpec
from RL2.engines.served.wire import rl2_wire
from RL2.engines.vllm.client import SleepingVLLMClient, VLLMClient

PLUGIN = Path(__file__).parent / "plugin"
WIRE = Path(rl2_wire.__file__).parent

VLLM_SERVER = ServerSpec(
    name="vLLM",
    key="vllm",
    client=VLLMClient,
    launcher=PLUGIN / "launch.py",
    token_variable="VLLM_API_KEY",
    prefix="VLLM_",
    environment={
        "VLLM_SERVER_DEV_MODE": "1",  # opens the routes that change weights
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
    },
    import_path=(PLUGIN, WIRE),
)
SLEEPING_VLLM_SERVER = replace(VLLM_SERVER, client=SleepingVLLMClient)
"""A server launched on a GPU: while it is paused, others can use its memory."""


def server_arguments(
    rollout: Rollout, model: PretrainedConfig, dtype: torch.dtype, max_length: int, is_multimodal: bool = False
) -> list[str]:
    """Return the command line of a server for sequences of up to `max_length` tokens, without its address.

    `model` is the configuration of a text model; of a multimodal one, the other parts are not loaded.
    """
    settings = rollout.vllm
    arguments = {
        "model": rollout.model_name,
        "dtype": str(dtype).removeprefix("torch."),
        "max-model-len": max_length,
        "max-num-seqs": rollout.max_running_requests,
        # weights come with the first sync; random ones would fail its comparison
        "load-format": "dummy",
        "generation-config": "vllm",  # the model's would set a temperature of its own
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
    flags += ["--language-model-only"] if is_multimodal else []
    flags += ["--enable-sleep-mode"] if torch.cuda.is_available() else []
    flags += [] if torch.cuda.is_available() or rollout.compile else ["--enforce-eager"]
    return [*flags, *(str(x) for key, value in arguments.items() for x in (f"--{key}", value)), *settings.args]


CPU_BLOCK = 128
"""Positions in one block of vLLM's KV cache on CPUs."""


def _kv_cache_bytes(num_sequences: int, model: PretrainedConfig, dtype: torch.dtype, max_length: int) -> int:
    blocks = num_sequences * -(-max_length // CPU_BLOCK) + 2
    return blocks * CPU_BLOCK * bytes_per_position(model, dtype)
