"""Keys of `rollout`, with its engines and servers, and of `reward`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from RL2.config.values import (
    NAME,
    NAME_RULE,
    POLICY,
    Count,
    Index,
    NonNegative,
    PositiveFloat,
    Range,
    Share,
    interpolated,
)
from RL2.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Settings of sampling."""

    temperature: NonNegative = 1.0
    """Sampling temperature; 0 takes the most likely token."""
    top_p: Annotated[float, Range(0, 1, open_low=True)] = 1.0
    """Sample from the most likely tokens that together have this probability, among those that top_k keeps; 1: from
    all. SGLang measures the probability in the whole distribution."""
    top_k: Index = 0
    """Sample from this many most likely tokens; 0: from all."""
    min_p: Annotated[float, Range(0, 0.999)] = 0.0
    """Sample from tokens with at least this share of the probability of the most likely one (arXiv 2407.01082), before
    top_k and top_p; 0: from all. Not with SGLang."""
    max_new_tokens: Count
    """Maximum length of a response, in tokens (of one turn, if there are several)."""
    stop: tuple[str, ...] | None = None
    """Strings that end a response: it stops at the token that completes one of them."""

    @property
    def is_cut(self) -> bool:
        """True if top_p, top_k or min_p exclude tokens, which makes the others more likely than under the model."""
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0


Transport = Literal["files", "delta", "ipc", "broadcast"]
"""Way in which weights are sent to servers."""


@dataclass(frozen=True, kw_only=True)
class Servers:
    """Keys that all servers have (docs/engines.md), below `rollout.KEY.`."""

    key = ""

    urls: tuple[str, ...] = ()
    """Addresses of running servers to attach to; empty: RL2 launches servers. $VLLM_API_KEY or $SGLANG_API_KEY holds
    their token, if they need one."""
    num_servers: Count = 1
    """Number of servers to launch on each machine."""
    python: str
    """Interpreter of the environment that holds the server's package; `make engine` builds one with vLLM for CPUs."""
    args: tuple[str, ...] = ()
    """Further command-line arguments of a launched server; they override RL2's."""
    env: dict[str, Any] = field(default_factory=dict)
    """Further environment variables of a launched server."""
    sync_dir: str | None = None
    """Folder for weight files, which the servers must see under the same path; it holds one copy of the
    model. null: shared memory, for servers on this machine."""
    bucket_mib: Count = 512
    """Amount of weights gathered in memory before they are written or sent, in MiB."""
    max_probe_gap: PositiveFloat | None = None
    """Maximum mean abs(trainer's logp - server's logp) over a fixed sequence of 64 tokens, in nats, checked after each
    weight sync; beyond it the run stops. null: 1e-4 where both compute in float32, else 0.1."""
    start_timeout_s: PositiveFloat = 600
    """Maximum time for a server to start, in seconds."""
    request_timeout_s: PositiveFloat = 1800
    """Maximum time for one sample, in seconds."""
    max_restarts: Index = 3
    """Maximum number of restarts of launched servers that died or hung, in the whole run; then the run stops."""

    def __post_init__(self) -> None:
        if self.urls and (self.args or self.env or self.num_servers > 1):
            raise ConfigError(
                f"rollout.{self.key}.args, env and num_servers apply only to servers that RL2 launches; unset "
                f"rollout.{self.key}.urls to use them"
            )


@dataclass(frozen=True, kw_only=True)
class VLLM(Servers):
    """vLLM servers; used with `rollout.engine=vllm`."""

    key = "vllm"

    python: str = ".venv-vllm/bin/python"
    """Interpreter of the environment that holds vLLM; `make engine` builds one for CPUs."""
    transport: Transport = "files"
    """Way in which weights are sent to the servers. files: through sync_dir. delta: the same, but only what changed
    since the weights before, confirmed by checksums; the trainer and each worker keep all weights in host memory. ipc:
    servers on this machine read the trainer's GPU memory. broadcast: through a process group of trainer and servers
    (NCCL on GPUs, gloo on CPUs). With ipc and broadcast, launched servers also keep a copy in files for restarts,
    unless max_restarts=0."""
    lora: Literal["merged", "adapter"] = "merged"
    """Weights that the servers get with actor.lora.rank > 0. merged: all, with the adapters merged. adapter: the base
    once, and then the adapters alone, which each server merges itself (with rollout.dtype=auto: to the same numbers);
    needs transport=files, and the base stays in sync_dir."""
    kv_cache_mib: Count | None = None
    """Size of a launched server's KV cache, in MiB. null: on CPUs, room for max_running_requests sequences of full
    length, up to gpu_memory_utilization of the free memory; on GPUs, what that share of the GPU leaves."""


@dataclass(frozen=True, kw_only=True)
class SGLang(Servers):
    """SGLang servers; used with `rollout.engine=sglang`."""

    key = "sglang"

    python: str = ".venv-sglang/bin/python"
    """Interpreter of the environment that holds SGLang."""
    router_url: str | None = None
    """Address of SGLang's router in front of the servers of `urls`: requests go to the router, weights to the
    servers."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.router_url is not None and not self.urls:
            raise ConfigError(
                "rollout.sglang.router_url needs rollout.sglang.urls: weights go to the servers themselves"
            )


SGLANG_MAX_TOP_K = 4096
"""Largest top_k with which a server returns log-probabilities (its --sampling-mask-max-tokens)."""


@dataclass(frozen=True, kw_only=True)
class Branch:
    """Continuations of responses, with adv.estimator=branch (docs/branch.md)."""

    places: Literal["lines", "turns", "unlikely", "tokens"] = "lines"
    """Events in a response after which it may be continued. lines: a line ends. turns: a turn ends. unlikely: a token
    was sampled that had a probability under `below`. tokens: any token."""
    every: Count = 1
    """Number of events from one place to the next: with places=tokens every=32, after each 32 tokens."""
    below: Annotated[float, Range(0, 1, open_low=True)] = 0.9
    """Probability under which a token is unlikely, with places=unlikely."""
    max_places: Count = 4
    """Maximum number of places of a response; the first ones count."""
    samples: Count = 4
    """Number of continuations from each place."""
    train: bool = False
    """Train on the continuations too: responses are then trees, in which all tokens at one depth together weigh as much
    as one token of a plain response."""

    def __post_init__(self) -> None:
        if self.below != 0.9 and self.places != "unlikely":
            raise ConfigError(f"rollout.branch.below={self.below:g} has no effect with places={self.places}")


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """Settings of rollouts: the engine, the environment, and how trajectories are sampled."""

    engine: Literal["embedded", "vllm", "sglang"] = "embedded"
    """Engine that samples tokens. embedded: in the training process. vllm, sglang: by servers."""
    vllm: VLLM
    sglang: SGLang
    model_name: str = interpolated("${actor.model_name}")
    """Model that the engine serves; must equal actor.model_name."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute dtype of the engine; auto: actor.dtype."""
    tp_size: Literal[1] = 1
    """Tensor-parallel size of the engine; only 1 is supported."""
    gpu_memory_utilization: Annotated[float, Range(0, 1, open_low=True)] = 0.6
    """Share of the free device memory that the KV cache may use."""
    compile: bool | None = None
    """Compile with torch.compile, in the embedded engine and in vLLM servers on CPUs. The first steps take longer, and
    CPUs need a C++ compiler. null: true on GPUs, false on CPUs."""
    speculation: Literal["off", "auto", "always"] = "off"
    """Guess the next tokens from other samples of the prompt, earlier answers and the text so far, and verify several
    in one pass. The samples are those without. auto: where measured times say that it pays. always: wherever a guess is
    known. Only in the embedded engine, for models with packed attention."""
    max_running_requests: Count = 256
    """Maximum number of requests that are decoded at a time; the others wait."""
    train_sampling_params: SamplingParams
    test_sampling_params: SamplingParams
    max_turns: Count = 1
    """Maximum number of responses per episode."""
    env_path: str | None = None
    """Environment script, with `async def step(state, action, extra_info)`. null: with rollout.agent alone."""
    env_timeout_s: PositiveFloat = 60
    """Maximum time for one call of the environment, in seconds; after it the trajectory is unscored."""
    agent: str | None = None
    """Agent that plays the episodes, a program that asks for responses as from OpenAI's or Anthropic's API: a command,
    or path.py:function (docs/agents.md). null: the environment script alone."""
    agent_timeout_s: PositiveFloat = 600
    """Maximum time for one episode of an agent, in seconds; after it the agent is killed, and the trajectory is
    unscored."""
    agent_env: tuple[str, ...] = ()
    """Names of environment variables that agents get although their names mark a secret, such as [SEARCH_API_KEY]."""
    max_running_agents: Count = 16
    """Maximum number of agents that run at a time for each process of the trainer; the others wait."""
    opponents: dict[str, Any] = field(default_factory=dict)
    """Frozen models that play roles of the environment (docs/multi_agent.md), by role: `opponents.judge=MODEL`, a hub
    name or folder of a model, a checkpoint folder of this model (`ckpts/NAME/step_000100`), `start` (the policy before
    training) or `latest` (the policy of the last checkpoint, trainer.save_freq). The policy plays all other roles."""
    dynamic_filtering: bool = False
    """Drop groups whose rewards are all equal; they carry no signal for a group baseline."""
    dynamic_filtering_rounds: Count = 1
    """Maximum number of sampling rounds per step: each after the first samples one further prompt per missing group
    (DAPO's dynamic sampling, arXiv 2503.14476). 1: dropped groups are not replaced."""
    filter: str | None = None
    """Filter of your own, path.py:function: it gets the groups of a step and returns those that train
    (docs/own_filter.md). null: none."""
    branch: Branch = field(default_factory=Branch)
    overlong_filtering: bool = False
    """Exclude trajectories that reached a length limit from training and from their group's mean."""
    max_staleness: Index = 0
    """Maximum staleness of a token, in weight versions. 0 is on-policy; above 0, and without partial_rollout, rollouts
    overlap with training."""
    partial_rollout: Share = 0.0
    """Number of groups in flight beyond those of a step, as a share of prompts_per_rollout: the step takes the groups
    that finish first, and the others continue in the next step with its weights. 0: none."""

    @property
    def is_async(self) -> bool:
        """True if rollouts overlap with training."""
        return self.max_staleness > 0 and not self.partial_rollout

    def __post_init__(self) -> None:
        if self.partial_rollout and not self.max_staleness:
            raise ConfigError(
                f"rollout.partial_rollout={self.partial_rollout} continues what older weights began, and "
                "rollout.max_staleness=0 allows none of it; set that to at least 1"
            )
        if self.agent is None and (self.agent_timeout_s != 600 or self.max_running_agents != 16 or self.agent_env):
            raise ConfigError(
                "rollout.agent_timeout_s, agent_env and max_running_agents have no effect without rollout.agent"
            )
        check_opponents(self.opponents, "rollout.opponents")
        if own := self.opponents.keys() - without_policy(self.opponents).keys():
            raise ConfigError(f"rollout.opponents.{min(own)}=policy has no effect: the policy plays it anyway")
        for servers in (self.vllm, self.sglang):
            if self.engine != servers.key and (servers.urls or servers.args or servers.env):
                raise ConfigError(
                    f"rollout.{servers.key}.urls, args and env have no effect with rollout.engine={self.engine}"
                )
        if self.speculation != "off" and self.engine != "embedded":
            raise ConfigError(
                f"rollout.speculation={self.speculation} is for rollout.engine=embedded; vLLM's own speculation is set "
                "with rollout.vllm.args=[--speculative-config,...]"
            )
        for name in ("train_sampling_params", "test_sampling_params"):
            self.check_sampling(getattr(self, name), f"rollout.{name}")

    def check_sampling(self, sampling: SamplingParams, key: str) -> None:
        """Raise ConfigError if the engine cannot sample like this; `key` is the group of the settings."""
        if self.engine == "vllm" and 0 < sampling.temperature < 0.01:
            raise ConfigError(f"{key}.temperature is below 0.01, which vLLM would silently make 0.01")
        if self.engine == "sglang" and sampling.min_p > 0:
            raise ConfigError(
                f"{key}.min_p={sampling.min_p:g} needs rollout.engine=embedded or vllm: it is not known whether the "
                "log-probabilities of SGLang are those of the distribution that min_p cuts"
            )
        is_cut = sampling.temperature > 0 and sampling.is_cut
        if self.engine == "sglang" and is_cut and not 0 < sampling.top_k <= SGLANG_MAX_TOP_K:
            raise ConfigError(
                f"{key} has top_k={sampling.top_k} and top_p={sampling.top_p:g}, with which SGLang does not return "
                f"log-probabilities of the sampling distribution; set top_k to 1 to {SGLANG_MAX_TOP_K}, "
                "or both to keep all tokens (top_k=0, top_p=1)"
            )

    @property
    def servers(self) -> VLLM | SGLang | None:
        """Settings of the servers that sample; None with the embedded engine."""
        if self.engine == "embedded":
            return None
        return self.vllm if self.engine == "vllm" else self.sglang


@dataclass(frozen=True, kw_only=True)
class Reward:
    """Weights of the parts of a reward."""

    weights: dict[str, Any] = field(default_factory=dict)
    """Weights of the parts of a reward, if the environment's `step` returns a dict of them: `weights.format=0.1`. The
    default weight is 1; 0 only records a part, and a negative weight makes it a cost."""

    def __post_init__(self) -> None:
        check_weights(self.weights, "reward.weights")


def without_policy(opponents: dict[str, Any]) -> dict[str, Any]:
    """Return the opponents without the roles that the policy plays."""
    return {role: name for role, name in opponents.items() if name != POLICY}


def check_opponents(opponents: dict[str, Any], key: str) -> None:
    """Raise ConfigError unless `opponents` maps names of roles to models."""
    for role, name in opponents.items():
        if not NAME.fullmatch(str(role)):
            raise ConfigError(f"{key}.{role}: no role has this name; {NAME_RULE}")
        if not isinstance(name, str) or not name:
            raise ConfigError(f"{key}.{role}={name!r}; expected a model, a checkpoint folder, start or latest")


MAX_WEIGHT = 1e6
"""Largest absolute value of a weight; anything larger is taken for a mistake."""


def check_weights(weights: dict[str, Any], key: str) -> None:
    """Raise ConfigError unless `weights` maps names of reward parts to numbers."""
    for name, weight in weights.items():
        if not NAME.fullmatch(str(name)):
            raise ConfigError(f"{key}.{name}: no part of a reward has this name; {NAME_RULE}")
        if type(weight) not in (int, float) or not abs(weight) <= MAX_WEIGHT:
            raise ConfigError(f"{key}.{name}={weight!r}; expected a number of at most {MAX_WEIGHT:g} in size")
