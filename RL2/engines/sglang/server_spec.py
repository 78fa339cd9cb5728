"""How an SGLang server is launched."""

from __future__ import annotations

from pathlib import Path

import torch

from RL2.config.rollout import SGLANG_MAX_TOP_K, Rollout
from RL2.engines.served.server_spec import Kind
from RL2.engines.sglang.client import SGLangClient

SGLANG_SERVER = Kind(
    name="SGLang",
    key="sglang",
    client=SGLangClient,
    launcher=Path(__file__).parent / "launch.py",
    token_variable="SGLANG_API_KEY",
    prefix="SGLANG_",  # one is SGLANG_RETURN_ORIGINAL_LOGPROB, and those are not what was drawn from
    environment={"SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1"},  # for the spare positions, which stay empty
)

SPARE_POSITIONS = 8
"""A prompt may have 7 tokens less than a server's context, and a sequence 2."""


def server_arguments(rollout: Rollout, dtype: torch.dtype, max_length: int) -> list[str]:
    """The command line of a server for sequences of up to `max_length` tokens, but for its address."""
    arguments = {
        "model-path": rollout.model_name,
        "dtype": str(dtype).removeprefix("torch."),
        "context-length": max_length + SPARE_POSITIONS,
        "max-running-requests": rollout.max_running_requests,
        "mem-fraction-static": rollout.gpu_memory_utilization,
        # a sync brings the weights, and one that does not would show at once
        "load-format": "dummy",
        "sampling-mask-max-tokens": SGLANG_MAX_TOP_K,
        "log-level": "warning",
        "device": "cuda" if torch.cuda.is_available() else "cpu",
    }
    # seeds are read only in deterministic inference; metrics are what engine/queue_s comes from
    flags = ["--enable-deterministic-inference", "--enable-metrics"]
    flags += ["--enable-memory-saver"] if torch.cuda.is_available() else []
    pairs = [str(x) for key, value in arguments.items() for x in (f"--{key}", value)]
    return [*flags, *pairs, *rollout.sglang.args]
