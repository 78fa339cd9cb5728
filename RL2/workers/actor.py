"""The policy as reinforcement learning sees it: statistics of a rollout, and updates on it."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from torch import Tensor

from RL2.config import Actor as ActorConfig
from RL2.config import RefActor as RefActorConfig
from RL2.objectives.declare import Loss
from RL2.objectives.table import configured
from RL2.objectives.terms import importance_weight, kl_estimate
from RL2.packing import loss_weights, minibatches
from RL2.parallel.processes import Processes
from RL2.types import StatsRequest, TokenBatch, TokenStats
from RL2.workers.worker import Learner, Progress, Worker


class Actor(Learner):
    """The policy."""

    config: ActorConfig

    def __init__(self, config: ActorConfig, processes: Processes, total_steps: int, save_dir: Path) -> None:
        super().__init__(config, processes, total_steps, save_dir)
        self.objective = configured(config)
        # entropy is always reported, and logp watched against the engine's
        fields = tuple(dict.fromkeys((*self.objective.fields, "logp", "entropy")))
        self.request = StatsRequest(fields, self.objective.top_k, config.temperature)

    def logp(self, batch: TokenBatch) -> Tensor:
        """Log-probability of every sampled token under the present weights, [T]."""
        return _logp(self, batch, self.config.temperature, self.config.max_inference_length_per_device)

    def update(self, batch: TokenBatch, progress: Progress = lambda done: None) -> dict[str, float]:
        """`update_per_rollout` optimizer steps on one rollout; returns their mean metrics."""
        config = self.config
        history: dict[str, list[float]] = defaultdict(list)
        for ids in minibatches(batch, config.update_per_rollout):
            minibatch = batch.sequences(ids)
            weight_T = loss_weights(
                minibatch, train_on=config.train_on, level=config.avg_level, average_over=config.average_over
            )
            minibatch = minibatch.with_(weight_T=weight_T)
            metrics = self.step(minibatch, self.loss, self.request, progress)
            metrics["trained_share"] = metrics["tokens"] / int(minibatch.action_T.sum())
            for name, value in metrics.items():
                history[name].append(value)
        return {f"actor/{name}": sum(values) / len(values) for name, values in history.items()}

    def loss(self, stats: TokenStats, batch: TokenBatch) -> Loss:
        """The objective and what stands around it: importance weight, KL to the reference, entropy."""
        config = self.config
        logp_T, entropy_T, engine_logp_T = stats.logp, stats.entropy, batch.engine_logp_T
        assert engine_logp_T is not None
        loss_T, metrics = self.objective.loss(stats, batch)
        # the policy's own log-probability when the rollout arrived
        arrived_T = logp_T.detach() if batch.old_logp_T is None else batch.old_logp_T
        if config.tis_coef > 0:
            loss_T = loss_T * importance_weight(arrived_T, engine_logp_T, config.tis_coef)
        if batch.ref_logp_T is not None:
            kl_T = kl_estimate(logp_T, batch.ref_logp_T, config.kl.estimator)
            metrics = metrics | {"kl": kl_T}
            if config.kl.type == "loss":
                loss_T = loss_T + config.kl.coef * kl_T
        if config.entropy.coef != 0:
            loss_T = loss_T - config.entropy.coef * entropy_T
        return loss_T, metrics | {"entropy": entropy_T, "logp_gap": (arrived_T - engine_logp_T).abs()}


class RefActor(Worker):
    """The frozen policy that the KL divergence is measured from."""

    def __init__(self, config: RefActorConfig, actor: ActorConfig, processes: Processes) -> None:
        super().__init__(config.model_name, actor.dtype, actor.ddp_size, processes, "ref_actor.model_name")
        self.policy.requires_grad_(False)
        self.temperature, self.limit = actor.temperature, config.max_inference_length_per_device

    def logp(self, batch: TokenBatch) -> Tensor:
        """As `Actor.logp`, under the reference."""
        return _logp(self, batch, self.temperature, self.limit)


def _logp(worker: Worker, batch: TokenBatch, temperature: float, max_tokens: int) -> Tensor:
    return worker.stats(batch, StatsRequest(("logp",), temperature=temperature), max_tokens).logp
