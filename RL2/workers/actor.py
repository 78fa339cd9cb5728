"""The policy as reinforcement learning sees it: statistics of a rollout, and updates on it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from torch import Tensor

from RL2.batch.packing import minibatches, pack_tokens
from RL2.config.model import Actor as ActorConfig
from RL2.config.model import RefActor as RefActorConfig
from RL2.models.lora import adapters_off
from RL2.models.policy import Policy
from RL2.objectives.loss import total_loss, with_weights
from RL2.objectives.objective import Loss
from RL2.objectives.registry import configured
from RL2.parallel.mesh import Mesh
from RL2.parallel.processes import Processes
from RL2.types import StatsRequest, TokenBatch, TokenStats
from RL2.workers.worker import ON_POLICY, Learner, Progress, Worker


def wanted_stats(config: ActorConfig) -> StatsRequest:
    """The statistics of an update: entropy is always reported, and logp watched against the engine's."""
    objective = configured(config)
    fields = tuple(dict.fromkeys((*objective.fields, "logp", "entropy")))
    return StatsRequest(fields, objective.top_k, config.temperature, config.logits_budget_mib)


class Actor(Learner):
    """The policy."""

    config: ActorConfig

    def __init__(
        self,
        config: ActorConfig,
        processes: Processes,
        total_steps: int,
        save_dir: Path,
        max_logprob_gap: float = math.inf,
    ) -> None:
        super().__init__(config, processes, total_steps, save_dir)
        self.max_logprob_gap = max_logprob_gap
        self.objective = configured(config)
        self.request = wanted_stats(config)
        self.objective.check(self.lm.config.vocab_size)

    def add_old_logprobs(self, batch: TokenBatch, progress: Progress = lambda done: None) -> TokenBatch:
        """`batch` with the policy's log-probabilities, and what token selection looks at."""
        select = self.config.select
        fields = ["logp"] + ["entropy"] * (select.entropy_quantile > 0) + ["max_logp"] * select.not_mode
        request = replace(self.request, fields=tuple(fields), top_k=0)
        stats = self.stats(batch, request, self.config.max_inference_length_per_device, progress)
        batch = batch.with_(old_logp_T=stats.logp)
        if select.entropy_quantile > 0:
            batch = batch.with_(old_entropy_T=stats.entropy)
        return batch.with_(off_mode_T=stats.logp < stats.max_logp) if select.not_mode else batch

    def logps(self, token_ids: list[int]) -> list[float]:
        """Log-probability of each of these tokens but the first, at temperature 1 (collective)."""
        request = replace(self.request, fields=("logp",), top_k=0, temperature=1.0)
        return self.stats(pack_tokens([token_ids]), request, self.config.max_inference_length_per_device).logp.tolist()

    def update(self, batch: TokenBatch, progress: Progress = lambda done: None) -> dict[str, float]:
        """`update_per_rollout` optimizer steps on one rollout; returns their mean metrics."""
        history: dict[str, list[float]] = defaultdict(list)
        for _, minibatch in self.minibatches(batch):
            metrics = self.step(minibatch, self.loss, self.request, progress)
            metrics["trained_share"] = metrics["tokens"] / int(minibatch.action_T.sum())
            if metrics["grad_norm"] == 0:  # weight decay and momentum still move the weights, but nothing was learnt
                metrics |= {"trained_share": 0.0, "changed_share": 0.0}
            for name, value in metrics.items():
                history[name].append(value)
        return {f"actor/{name}": sum(values) / len(values) for name, values in history.items()}

    def minibatches(self, batch: TokenBatch) -> Iterator[tuple[list[int], TokenBatch]]:
        """Of each optimizer step of `update`: which sequences of `batch`, and these with their weights."""
        for ids in minibatches(batch, self.config.update_per_rollout):
            yield ids, with_weights(batch.sequences(ids), self.config)

    def loss(self, stats: TokenStats, batch: TokenBatch) -> Loss:
        """The objective with what stands around it."""
        assert batch.engine_logp_T is not None
        loss_T, metrics = total_loss(stats, batch, self.config, self.objective)
        arrived_T = stats.logp.detach() if batch.old_logp_T is None else batch.old_logp_T
        gap_T = (arrived_T - batch.engine_logp_T).abs()
        if batch.age_T is None:
            return loss_T, metrics | {"logp_gap": gap_T}
        # what older weights sampled is apart for another reason
        present_T = (batch.age_T == 0).float()
        return loss_T, metrics | {"logp_gap": gap_T * present_T, ON_POLICY: present_T, "drift": gap_T * (1 - present_T)}


class Reference(Protocol):
    """The frozen policy that the KL divergence is measured from."""

    def logp(self, batch: TokenBatch, progress: Progress = lambda done: None) -> Tensor:
        """Log-probability of every sampled token under it, [T]."""
        ...


class AdapterFreeReference:
    """An actor with adapters, without them: a reference that needs no memory."""

    def __init__(self, config: RefActorConfig, actor: Actor) -> None:
        self.actor = actor
        self.request = replace(actor.request, fields=("logp",), top_k=0)
        self.limit = config.max_inference_length_per_device

    def logp(self, batch: TokenBatch, progress: Progress = lambda done: None) -> Tensor:
        with adapters_off(self.actor.lm):
            return self.actor.stats(batch, self.request, self.limit, progress).logp


class RefActor(Worker):
    """A model of its own as the reference."""

    def __init__(self, config: RefActorConfig, actor: ActorConfig, mesh: Mesh, processes: Processes) -> None:
        """`mesh` is the actor's."""
        super().__init__(
            config.model_name, actor.dtype, mesh, processes, "ref_actor.model_name", Policy, actor.offload_model
        )
        self.policy.requires_grad_(False)
        self.request = StatsRequest(("logp",), temperature=actor.temperature, budget_mib=actor.logits_budget_mib)
        self.limit = config.max_inference_length_per_device

    def logp(self, batch: TokenBatch, progress: Progress = lambda done: None) -> Tensor:
        return self.stats(batch, self.request, self.limit, progress).logp
