"""Make the engine that `rollout.engine` names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from transformers import PreTrainedModel

from RL2.config.rollout import VLLM, Rollout, SGLang, Transport
from RL2.engines.base import Engine
from RL2.engines.embedded.compiled import refuse_no_compiler
from RL2.engines.embedded.engine import EmbeddedEngine
from RL2.engines.served.engine import ServedEngine
from RL2.engines.sglang import server_spec as sglang
from RL2.engines.vllm import server_spec as vllm
from RL2.errors import ConfigError
from RL2.models.dtypes import compute_dtype
from RL2.models.policy import empty_model
from RL2.parallel.processes import Processes


class TrainedPolicy(Protocol):
    """The part of the actor that an engine needs."""

    processes: Processes
    dtype: torch.dtype
    """Compute dtype of the forward pass."""

    @property
    def lm(self) -> PreTrainedModel: ...

    @property
    def can_share_weights(self) -> bool:
        """Whether an engine of this process can sample from the parameters of `lm` without a copy."""
        ...

    def logps(self, token_ids: list[int]) -> list[float]:
        """Return the log-probability of each token but the first, at temperature 1 (collective)."""
        ...


def make_engine(
    rollout: Rollout, policy: TrainedPolicy, decode: Callable[[list[int]], str], max_length: int, log_dir: Path
) -> Engine:
    """Return the engine that samples from `policy` (collective): servers, or an engine in this process.

    `max_length` is the limit of a sequence in tokens. Servers write their logs into `log_dir`.
    """
    device = policy.processes.device
    dtype = policy.dtype if rollout.dtype == "auto" else compute_dtype(rollout.dtype, device)
    if rollout.servers is None:
        return _embedded(rollout, policy, decode, dtype)
    return _served(rollout, rollout.servers, policy, dtype, max_length, log_dir)


def _embedded(
    rollout: Rollout, policy: TrainedPolicy, decode: Callable[[list[int]], str], dtype: torch.dtype
) -> EmbeddedEngine:
    device = policy.processes.device
    # a rollout that overlaps training needs weights of its own: those of the actor change meanwhile
    shares = policy.can_share_weights and dtype == policy.lm.dtype and not rollout.is_async
    compiles = device.type == "cuda" if rollout.compile is None else rollout.compile
    if device.type == "cuda":
        compiles = compiles and not shares
    elif compiles:
        refuse_no_compiler()
    return EmbeddedEngine(
        policy.lm if shares else empty_model(policy.lm, dtype, device),
        decode=decode,
        max_running_requests=rollout.max_running_requests,
        memory_share=rollout.gpu_memory_utilization,
        owns_weights=not shares,
        compiles=compiles,
    )


def _served(
    rollout: Rollout,
    settings: VLLM | SGLang,
    policy: TrainedPolicy,
    dtype: torch.dtype,
    max_length: int,
    log_dir: Path,
) -> ServedEngine:
    transport: Transport = "files"
    if isinstance(settings, SGLang):
        kind, arguments = sglang.SGLANG_SERVER, sglang.server_arguments(rollout, dtype, max_length)
        router_url = settings.router_url
    else:
        transport, router_url = settings.transport, None
        if transport == "ipc" and policy.processes.device.type != "cuda":
            raise ConfigError("rollout.vllm.transport=ipc shares a GPU's memory, and there is no GPU: take broadcast")
        sleeps = torch.cuda.is_available() and not settings.urls
        kind = vllm.SLEEPING_VLLM_SERVER if sleeps else vllm.VLLM_SERVER
        arguments = vllm.server_arguments(rollout, policy.lm.config, dtype, max_length)
    exact = dtype == policy.dtype == torch.float32
    return ServedEngine(
        kind,
        settings,
        arguments=arguments,
        router_url=router_url,
        transport=transport,
        processes=policy.processes,
        trainer_logps=policy.logps,
        vocab_size=policy.lm.config.vocab_size,
        max_length=max_length,
        max_running_requests=rollout.max_running_requests,
        max_probe_gap=settings.max_probe_gap or (1e-4 if exact else 0.1),
        log_folder=log_dir,
    )
