"""Keys of `rollout`, with its engines and servers, and of `reward`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from RL2.config.values import NAME, NAME_RULE, Count, Index, NonNegative, PositiveFloat, Range, Share
from RL2.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    temperature: NonNegative
    """0 takes the most likely token."""
    top_p: Annotated[float, Range(0, 1, open_low=True)]
    """Only the most likely tokens that together have this probability, of those that top_k leaves; 1 keeps all. SGLang
    counts the probability in the whole distribution."""
    top_k: Index
    """0 keeps all tokens."""
    max_new_tokens: Count
    """Tokens of one response (of one turn, if there are several)."""
    stop: tuple[str, ...] | None
    """A response ends with the token that completes one of these strings."""

    @property
    def is_cut(self) -> bool:
        """Some tokens cannot be sampled, and the others are more likely than under the model."""
        return self.top_p < 1 or self.top_k > 0


Transport = Literal["files", "ipc", "broadcast"]

"""How weights reach servers."""


@dataclass(frozen=True, kw_only=True)
class Servers:
    """Servers as the engine (docs/engines.md): what all kinds have; `rollout.KEY.` stands before each name."""

    key = ""

    urls: tuple[str, ...]
    """Running servers to attach to; empty: they are launched. Their token, if they want one, is $VLLM_API_KEY or
    $SGLANG_API_KEY."""
    num_servers: Count
    """Servers that are launched on each machine."""
    python: str
    """Interpreter of the environment that they are installed in: `make engine` builds one with vLLM for CPUs."""
    args: tuple[str, ...]
    """Further arguments of the command line of a launched server; they win over ours."""
    env: dict[str, Any]
    """Further environment variables of a launched server."""
    sync_dir: str | None
    """Folder for weights on their way to the servers, which have to see it under the same name; it holds one copy of
    them. null: shared memory, for servers on this machine."""
    bucket_mib: Count
    """Weights that are gathered in memory before they are written or sent."""
    max_probe_gap: PositiveFloat | None
    """Limit of the mean abs(trainer's logp - server's logp) over a fixed sequence of 64 tokens, in nats, after each
    sync of the weights; beyond it the run stops. null: 1e-4 where both compute in float32, else 0.1."""
    start_timeout_s: PositiveFloat
    """Limit of a server's start."""
    request_timeout_s: PositiveFloat
    """Limit of one sample."""
    max_restarts: Index
    """Times that launched servers are started again after they have died or hung, in all; then the run stops."""

    def __post_init__(self) -> None:
        if self.urls and (self.args or self.env or self.num_servers > 1):
            raise ConfigError(
                f"rollout.{self.key}.args, env and num_servers are of servers that are launched; they have no effect "
                f"with rollout.{self.key}.urls"
            )


@dataclass(frozen=True, kw_only=True)
class VLLM(Servers):
    """vLLM servers; read with `rollout.engine=vllm`."""

    key = "vllm"

    transport: Transport
    """How weights reach the servers. files: in sync_dir. ipc: servers on this machine look at the trainer's GPU.
    broadcast: over a group of trainer and servers, of NCCL on GPUs and gloo on CPUs. Beside ipc and broadcast, launched
    servers have a copy in files to be started again with, unless max_restarts=0."""
    kv_cache_mib: Count | None
    """Memory of a launched server's KV cache. null: what max_running_requests sequences of full length take, up to
    gpu_memory_utilization of what is free (CPUs), or what that share of the GPU leaves."""


@dataclass(frozen=True, kw_only=True)
class SGLang(Servers):
    """SGLang servers; read with `rollout.engine=sglang`."""

    key = "sglang"

    router_url: str | None
    """SGLang's router in front of the servers of `urls`: it gets the requests for samples, they the weights."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.router_url is not None and not self.urls:
            raise ConfigError(
                "rollout.sglang.router_url needs rollout.sglang.urls: weights go to the servers themselves"
            )


SGLANG_MAX_TOP_K = 4096

"""What a server lets a request ask for (its --sampling-mask-max-tokens)."""


@dataclass(frozen=True, kw_only=True)
class Rollout:
    engine: Literal["embedded", "vllm", "sglang"]
    """Where tokens are sampled: in this process, or by servers."""
    vllm: VLLM
    sglang: SGLang
    model_name: str
    """The model that the engine serves: actor.model_name."""
    dtype: Literal["auto", "float32", "bfloat16"]
    """auto: actor.dtype."""
    tp_size: Literal[1]
    """Tensor parallelism of the engine: not available yet."""
    gpu_memory_utilization: Annotated[float, Range(0, 1, open_low=True)]
    """Share of the free device memory that the KV cache may take."""
    compile: bool | None
    """Join small kernels by torch.compile, in the embedded engine and in vLLM servers on CPUs. It takes a while at
    first, and a C++ compiler on CPUs. null: on GPUs."""
    max_running_requests: Count
    """Requests that are decoded together; the others wait."""
    train_sampling_params: SamplingParams
    test_sampling_params: SamplingParams
    max_turns: Count
    """Responses of one episode at most."""
    env_path: str
    """Script with `async def step(state, action, extra_info)`."""
    env_timeout_s: PositiveFloat
    """Limit of one call of the environment; past it the trajectory is unscored."""
    dynamic_filtering: bool
    """Drop groups whose rewards are all equal (they carry no signal for a group baseline)."""
    dynamic_filtering_rounds: Count
    """Rounds of sampling in a step at most: each after the first rolls out as many further prompts as groups are
    missing (DAPO's dynamic sampling, arXiv 2503.14476). 1: what is dropped is not replaced."""
    filter: str | None = None
    """path.py:function that gets the groups of a step and returns those that train (docs/own_filter.md). null: none."""
    overlong_filtering: bool
    """Leave trajectories that ran into a length limit out of training, and so out of their group's mean."""
    max_staleness: Index
    """By how many versions the weights that sampled a token may be older than those that it trains. 0: on-policy. Above
    0, and without partial_rollout, rollouts run beside the training."""
    partial_rollout: Share
    """Groups under way beyond those that a step trains on, as a share of prompts_per_rollout: the step takes those that
    end first, the others go on in the next one, with its weights. 0: none."""

    @property
    def is_async(self) -> bool:
        return self.max_staleness > 0 and not self.partial_rollout

    def __post_init__(self) -> None:
        if self.partial_rollout and not self.max_staleness:
            raise ConfigError(
                f"rollout.partial_rollout={self.partial_rollout} goes on with what older weights began, and "
                "rollout.max_staleness=0 allows none of it; set that to 1 at least"
            )
        for servers in (self.vllm, self.sglang):
            if self.engine != servers.key and (servers.urls or servers.args or servers.env):
                raise ConfigError(
                    f"rollout.{servers.key}.urls, args and env have no effect with rollout.engine={self.engine}"
                )
        for name in ("train_sampling_params", "test_sampling_params"):
            self.check_sampling(getattr(self, name), f"rollout.{name}")

    def check_sampling(self, sampling: SamplingParams, key: str) -> None:
        """Raise ConfigError for what the engine cannot sample; `key` is the group of the settings."""
        if self.engine == "vllm" and 0 < sampling.temperature < 0.01:
            raise ConfigError(f"{key}.temperature is below 0.01, which vLLM would silently make 0.01")
        is_cut = sampling.temperature > 0 and sampling.is_cut
        if self.engine == "sglang" and is_cut and not 0 < sampling.top_k <= SGLANG_MAX_TOP_K:
            raise ConfigError(
                f"{key}: SGLang gives the log-probabilities of what was drawn from only with a top_k of 1 "
                f"to {SGLANG_MAX_TOP_K} (which top_p may cut further), or without top_k and top_p; here are "
                f"top_k={sampling.top_k} and top_p={sampling.top_p:g}"
            )

    @property
    def servers(self) -> VLLM | SGLang | None:
        """The settings of the servers that sample, if it is not this process."""
        if self.engine == "embedded":
            return None
        return self.vllm if self.engine == "vllm" else self.sglang


@dataclass(frozen=True, kw_only=True)
class Reward:
    weights: dict[str, Any] = field(default_factory=dict)
    """Weights of the parts of a reward, where `step` returns a dict of them: `weights.format=0.1`. A part without one
    counts once; 0 only watches a part, and below 0 it is a cost."""

    def __post_init__(self) -> None:
        check_weights(self.weights, "reward.weights")


MAX_WEIGHT = 1e6

"""Size of a weight beyond which it is no weight but a mistake."""


def check_weights(weights: dict[str, Any], key: str) -> None:
    """Raise ConfigError unless each of `weights`, by the name of a part of a reward, is a number."""
    for name, weight in weights.items():
        if not NAME.fullmatch(str(name)):
            raise ConfigError(f"{key}.{name}: no part of a reward has this name; {NAME_RULE}")
        if type(weight) not in (int, float) or not abs(weight) <= MAX_WEIGHT:
            raise ConfigError(f"{key}.{name}={weight!r}; expected a number of at most {MAX_WEIGHT:g} in size")
