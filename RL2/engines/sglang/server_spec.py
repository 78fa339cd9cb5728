"""Launch of SGLang servers."""

from __future__ import annotations

from pathlib import Path

import torch

from RL2.config.rollout import SGLANG_MAX_TOP_K, Rollout
from RL2.engines.served.server_spec import ServerSpec
from RL2.engines.sglang.client import SGLangClient

SGLANG_SERVER = ServerSpec(
    name="SGLang",
    key="sglang",
    client=SGLangClient,
    launcher=Path(__file__).parent / "launch.py",
    token_variable="SGLANG_API_KEY",
    prefix="SGLANG_",  # such as SGLANG_RETURN_ORIGINAL_LOGPROB, which would ignore the temperature
    environment={"SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1"},  # for SPARE_POSITIONS, which stay empty
)

SPARE_POSITIONS = 8
"""Context beyond the longest sequence: SGLang limits prompts to its context less 7 tokens, and sequences less 2."""


def server_arguments(rollout: Rollout, dtype: torch.dtype, max_length: int) -> list[str]:
    """Return the command line of a server for sequences of up to `max_length` tokens, without its address."""
    arguments = {
        "model-path": rollout.model_name,
        "dtype": str(dtype).removeprefix("torch."),
        "context-length": max_length + SPARE_POSITIONS,
        "max-running-requests": rollout.max_running_requests,
        "mem-fraction-static": rollout.gpu_memory_utilization,
        # weights come with the first sync; random ones would fail its comparison
        "load-format": "dummy",
        "sampling-mask-max-tokens": SGLANG_MAX_TOP_K,
        "log-level": "warning",
        "device": "cuda" if torch.cuda.is_available() else "cpu",
    }
    # seeds take effect only in deterministic inference; engine/queue_s comes from the server's metrics
    flags = ["--enable-deterministic-inference", "--enable-metrics"]
    flags += ["--enable-memory-saver"] if torch.cuda.is_available() else []
    pairs = [str(x) for key, value in arguments.items() for x in (f"--{key}", value)]
    return [*flags, *pairs, *rollout.sglang.args]
