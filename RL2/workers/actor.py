"""The policy of reinforcement learning: statistics of rollouts and updates on them, and its reference."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from RL2.batch.packing import imitation_weights, minibatches, observation_weights, pack_tokens
from RL2.config.model import Actor as ActorConfig
from RL2.config.model import Entropy
from RL2.config.model import RefActor as RefActorConfig
from RL2.errors import ConfigError
from RL2.models.lora import adapters_off
from RL2.models.policy import Policy
from RL2.models.routing import RoutingSums
from RL2.objectives.loss import total_loss, wanted_stats, with_weights
from RL2.objectives.registry import configured
from RL2.parallel.fsdp import local
from RL2.parallel.mesh import Mesh
from RL2.parallel.processes import Processes
from RL2.types import StatsRequest, TokenBatch, TokenStats
from RL2.workers.entropy_coef import EntropyCoef
from RL2.workers.learner import Learner
from RL2.workers.metrics import Metric, Totals, engine_gap, mean_over_updates
from RL2.workers.passes import Progress
from RL2.workers.worker import Worker


class Actor(Learner):
    """The policy, which an objective updates on rollouts."""

    config: ActorConfig

    def __init__(
        self,
        config: ActorConfig,
        processes: Processes,
        total_steps: int,
        save_dir: Path,
        max_logprob_gap: float = math.inf,
    ) -> None:
        """Make the policy; see `Learner`. An update stops if the mean gap to the engine exceeds `max_logprob_gap`."""
        super().__init__(config, processes, total_steps, save_dir)
        self.max_logprob_gap = max_logprob_gap
        self.objective = configured(config)
        self.request = wanted_stats(config, self.objective)
        self.objective.check(self.lm.config.vocab_size)
        self.entropy_coef = EntropyCoef(config.entropy)

    def add_old_logprobs(
        self, batch: TokenBatch, progress: Progress = lambda done: None, *, sum_p2: bool = False
    ) -> TokenBatch:
        """Return `batch` with the policy's log-probabilities, and the statistics that token selection needs.

        `sum_p2` adds the sums of squared probabilities.
        """
        select = self.config.select
        fields = ["logp"] + ["entropy"] * (select.entropy_quantile > 0) + ["max_logp"] * select.not_mode
        fields += ["sum_p2"] * sum_p2
        request = replace(self.request, fields=tuple(fields), top_k=0)
        routing = self.routing(records=self.config.moe.replay == "old")
        stats = self.stats(batch, request, self.config.max_inference_length_per_device, progress, routing)
        if routing is not None and routing.experts_T is not None:
            batch = batch.with_(experts_T=routing.experts_T)
        batch = batch.with_(old_logp_T=stats.logp)
        if sum_p2:
            batch = batch.with_(old_sum_p2_T=stats.sum_p2)
        if select.entropy_quantile > 0:
            batch = batch.with_(old_entropy_T=stats.entropy)
        return batch.with_(off_mode_T=stats.logp < stats.max_logp) if select.not_mode else batch

    def routing(self, records: bool = False) -> RoutingSums | None:
        """Return what routers do in a pass without gradients: take given experts or, with `records`, record theirs."""
        if not self.config.moe.follows:
            return None
        return RoutingSums(self.policy.routers, follows=not records, records=records)

    def logps(self, token_ids: list[int]) -> list[float]:
        """Return the log-probability of each of these tokens but the first, at temperature 1 (collective)."""
        request = replace(self.request, fields=("logp",), top_k=0, temperature=1.0)
        return self.stats(pack_tokens([token_ids]), request, self.config.max_inference_length_per_device).logp.tolist()

    def update(self, batch: TokenBatch, progress: Progress = lambda done: None) -> dict[str, float]:
        """Take `update_per_rollout` optimizer steps on one rollout; return their mean metrics."""
        if self.config.moe.replay != "none" and batch.experts_T is None:
            raise ConfigError(f"actor.moe.replay={self.config.moe.replay}: no experts were recorded with these tokens")
        updates = []
        for _, minibatch in self.minibatches(batch):
            adapted = {} if self.config.entropy.target is None else {"entropy_coef": self.entropy_coef.used}
            metrics = self.step(minibatch, self.loss, self.request, progress) | adapted
            if "entropy" in metrics:  # some token has a weight
                self.entropy_coef.follow(metrics["entropy"])
            metrics["trained_share"] = metrics["tokens"] / int(minibatch.action_T.sum())
            if metrics["grad_norm"] == 0:  # weight decay and momentum still move the weights, but nothing was learnt
                metrics |= {"trained_share": 0.0, "changed_share": 0.0}
            updates.append(metrics)
        return {f"actor/{name}": value for name, value in mean_over_updates(updates).items()}

    def minibatches(self, batch: TokenBatch) -> Iterator[tuple[list[int], TokenBatch]]:
        """Yield, for each optimizer step of `update`, its sequence numbers and its minibatch with weights."""
        for ids in minibatches(batch, self.config.update_per_rollout):
            minibatch = with_weights(batch.sequences(ids), self.config)
            if coef := self.config.observations.coef:
                minibatch = minibatch.with_(observation_weight_T=coef * observation_weights(minibatch))
            if coef := self.config.imitation.coef:
                minibatch = minibatch.with_(imitation_weight_T=coef * imitation_weights(minibatch))
            yield ids, minibatch

    @property
    def loss_config(self) -> ActorConfig:
        """The settings of the loss, with the present coefficient of the entropy."""
        return replace(self.config, entropy=Entropy(coef=self.entropy_coef.used))

    def loss(self, stats: TokenStats, batch: TokenBatch) -> tuple[Tensor, dict[str, Metric]]:
        """Return the loss of the objective and its regularizers, with metrics of the gap to the engine."""
        loss_T, metrics = total_loss(stats, batch, self.loss_config, self.objective)
        return loss_T, metrics | engine_gap(stats, batch)

    def fault(self, metrics: dict[str, float], totals: Totals) -> str:
        """Return an error if trainer and engine are further apart than `max_logprob_gap`."""
        gap = metrics.get("logp_gap", 0.0)
        if math.isnan(metrics.get("drift", 0.0)):  # tokens of older weights may differ, but must be numbers
            gap = math.nan
        if gap <= self.max_logprob_gap:  # False for NaN
            return ""
        return (
            f"trainer and engine are {gap:g} nats apart on average, more than trainer.max_logprob_gap="
            f"{self.max_logprob_gap:g}: {totals.largest('logp_gap_max')}"
        )


class Reference(Protocol):
    """The frozen policy that the KL divergence is measured from."""

    def logp(self, batch: TokenBatch, progress: Progress = lambda done: None) -> Tensor:
        """Return the log-probability of every sampled token under the reference, [T]."""
        ...


class AdapterFreeReference:
    """The actor without its adapters, a reference that takes no memory."""

    def __init__(self, config: RefActorConfig, actor: Actor) -> None:
        self.actor = actor
        self.request = replace(actor.request, fields=("logp",), top_k=0)
        self.limit = config.max_inference_length_per_device

    def logp(self, batch: TokenBatch, progress: Progress = lambda done: None) -> Tensor:
        with adapters_off(self.actor.lm):
            return self.actor.stats(batch, self.request, self.limit, progress).logp


class RefActor(Worker):
    """A separate model as the reference."""

    def __init__(self, config: RefActorConfig, actor: ActorConfig, mesh: Mesh, processes: Processes) -> None:
        """Load the reference; `actor` and `mesh` are the actor's."""
        where = mesh, processes, "ref_actor", Policy, actor.offload_model
        super().__init__(config.model_name, actor.dtype, *where, dequantize=config.dequantize)
        self.policy.requires_grad_(False)
        self.request = StatsRequest(("logp",), temperature=actor.temperature, budget_mib=actor.logits_budget_mib)
        self.limit = config.max_inference_length_per_device

    def logp(self, batch: TokenBatch, progress: Progress = lambda done: None) -> Tensor:
        return self.stats(batch, self.request, self.limit, progress).logp

    @torch.no_grad()
    def follow(self, actor: Actor) -> None:
        """Take the weights of `actor`, a model of the same kind and layout, without communication."""
        for mine, theirs in (
            (self.policy.parameters(), actor.policy.parameters()),
            (self.policy.buffers(), actor.policy.buffers()),
        ):
            for weight, other in zip(mine, theirs, strict=True):
                local(weight).copy_(local(other))
