"""Make the engine that `rollout.engine` names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from transformers import PreTrainedModel

from RL2.config.rollout import VLLM, Rollout, SGLang
from RL2.engines.base import Engine
from RL2.engines.embedded.compiled import refuse_no_compiler
from RL2.engines.embedded.engine import EmbeddedEngine
from RL2.engines.served.apart import AdaptedPolicy, apart
from RL2.engines.served.engine import ServedEngine, make_probe
from RL2.engines.served.server_spec import EngineSpec
from RL2.engines.served.weight_sync import WeightCheck
from RL2.engines.sglang import server_spec as sglang
from RL2.engines.vllm import server_spec as vllm
from RL2.errors import ConfigError
from RL2.models.conversion import StoredLayout, stored_layout
from RL2.models.dtypes import compute_dtype
from RL2.models.multimodal import checkpoint_config
from RL2.models.other_parts import other_parts
from RL2.models.policy import empty_model
from RL2.models.quantised import quantisation_of
from RL2.ops.attention import is_packed
from RL2.parallel.experts import find_experts
from RL2.parallel.processes import Processes


class TrainedPolicy(AdaptedPolicy, Protocol):
    """The part of the actor that an engine needs."""

    processes: Processes
    dtype: torch.dtype
    """Compute dtype of the forward pass."""

    @property
    def can_share_weights(self) -> bool:
        """True if an engine of this process can sample from the parameters of `lm` without a copy."""
        ...

    def logps(self, token_ids: list[int]) -> list[float]:
        """Return the log-probability of each token but the first, at temperature 1 (collective)."""
        ...


def make_engine(
    rollout: Rollout,
    policy: TrainedPolicy,
    decode: Callable[[list[int]], str],
    max_length: int,
    log_dir: Path,
    records_experts: bool = False,
) -> Engine:
    """Return the engine that samples from `policy` (collective): servers, or an engine in this process.

    `max_length` is the limit of a sequence in tokens. Servers write their logs into `log_dir`. With `records_experts`,
    the engine in this process records the experts of each token.
    """
    device = policy.processes.device
    dtype = policy.dtype if rollout.dtype == "auto" else compute_dtype(rollout.dtype, device)
    settings = rollout.servers
    if settings is None:
        return _embedded(rollout, policy, decode, dtype, records_experts)
    spec = _engine_spec(rollout, settings, policy, dtype, max_length)
    layout = served_layout(policy.lm, rollout.engine)
    is_exact = dtype == policy.dtype == torch.float32
    check = WeightCheck(
        policy.logps,
        probe=make_probe(policy.lm.config.vocab_size, max_length),
        max_gap=settings.max_probe_gap or (1e-4 if is_exact else 0.1),
    )
    sends_adapters = isinstance(settings, VLLM) and settings.lora == "adapter"
    return ServedEngine(
        spec, check, policy.processes, log_dir, layout, apart(policy, layout) if sends_adapters else None
    )


def served_layout(lm: PreTrainedModel, engine: str) -> StoredLayout:
    """Return the layout in which servers read weights of `lm`, which is that of its checkpoint.

    Raise ConfigError if servers cannot read it.
    """
    if (quantised := quantisation_of(lm)) is not None:
        raise ConfigError(
            f"rollout.engine={engine}: servers would load the checkpoint's {quantised.method} weights, and trained "
            "weights are not quantised; use rollout.engine=embedded, or export the model first"
        )
    checkpoint = checkpoint_config(lm)
    if engine == "sglang" and checkpoint is not None:
        raise ConfigError(
            f"rollout.engine=sglang: {checkpoint.model_type} is multimodal, and text parts of such models were not "
            "tried with SGLang; use rollout.engine=vllm or embedded"
        )
    layout = stored_layout(lm)
    if layout is None:
        raise ConfigError(
            f"rollout.engine={engine}: a checkpoint of {lm.config.model_type} computes tensors from several "
            "parameters, which are not sent to servers; use rollout.engine=embedded"
        )
    parts = other_parts(lm)
    return layout if parts is None else parts.layout(lm)


def _embedded(
    rollout: Rollout,
    policy: TrainedPolicy,
    decode: Callable[[list[int]], str],
    dtype: torch.dtype,
    records_experts: bool,
) -> EmbeddedEngine:
    device = policy.processes.device
    # a rollout that overlaps training needs weights of its own: those of the actor change meanwhile
    shares = policy.can_share_weights and dtype == policy.lm.dtype and not rollout.is_async
    compilable = is_packed(policy.lm) and not find_experts(policy.lm)
    if rollout.compile and not compilable:
        why = "is a mixture of experts" if is_packed(policy.lm) else "samples through its own forward"
        raise ConfigError(
            f"rollout.compile=true compiles dense models with packed attention, and {policy.lm.config.model_type} "
            f"{why}; leave rollout.compile out"
        )
    if rollout.speculation != "off" and not is_packed(policy.lm):
        raise ConfigError(
            f"rollout.speculation={rollout.speculation} has to go back to where a guess went wrong, and "
            f"{policy.lm.config.model_type} samples through its own forward; leave rollout.speculation out"
        )
    compiles = compilable and (device.type == "cuda" if rollout.compile is None else rollout.compile)
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
        records_experts=records_experts,
        speculation=rollout.speculation,
        reuses_prefixes=rollout.max_turns > 1 or rollout.agent is not None,
    )


def _engine_spec(
    rollout: Rollout, settings: VLLM | SGLang, policy: TrainedPolicy, dtype: torch.dtype, max_length: int
) -> EngineSpec:
    limit = rollout.max_running_requests
    if isinstance(settings, SGLang):
        arguments = sglang.server_arguments(rollout, dtype, max_length)
        return EngineSpec(sglang.SGLANG_SERVER, settings, max_length, limit, arguments, router_url=settings.router_url)
    if settings.transport == "ipc" and policy.processes.device.type != "cuda":
        raise ConfigError("rollout.vllm.transport=ipc shares a GPU's memory, and there is no GPU: use broadcast")
    sleeps = torch.cuda.is_available() and not settings.urls
    server = vllm.SLEEPING_VLLM_SERVER if sleeps else vllm.VLLM_SERVER
    is_multimodal = checkpoint_config(policy.lm) is not None
    arguments = vllm.server_arguments(rollout, policy.lm.config, dtype, max_length, is_multimodal)
    return EngineSpec(server, settings, max_length, limit, arguments, transport=settings.transport)
