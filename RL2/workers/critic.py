"""The critic of PPO: value estimates of rollouts, and updates towards their returns."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from RL2.batch.packing import loss_weights, minibatches
from RL2.config.model import Critic as CriticConfig
from RL2.models.value import VALUE, ValueModel, mark_padding
from RL2.objectives.value import clipped_value
from RL2.parallel.processes import Processes
from RL2.types import TokenBatch
from RL2.workers.learner import Learner
from RL2.workers.metrics import mean_over_updates
from RL2.workers.passes import Progress


class Critic(Learner):
    """A value model with its own optimizer."""

    config: CriticConfig

    def __init__(self, config: CriticConfig, processes: Processes, total_steps: int, save_dir: Path) -> None:
        super().__init__(config, processes, total_steps, save_dir, "critic", ValueModel)

    def values(self, batch: TokenBatch, progress: Progress = lambda done: None) -> Tensor:
        """Return the value estimate before every action, [T]."""
        return self.stats(batch, VALUE, self.config.max_inference_length_per_device, progress).value

    def update(self, batch: TokenBatch, progress: Progress = lambda done: None) -> dict[str, float]:
        """Take `update_per_rollout` optimizer steps on one rollout; return their mean metrics."""
        loss = partial(clipped_value, clip=self.config.clip)
        updates = []
        for ids in minibatches(batch, self.config.update_per_rollout):
            minibatch = batch.sequences(ids)
            weight_T = loss_weights(minibatch, train_on="all", level=self.config.avg_level, average_over="all")
            updates.append(self.step(minibatch.with_(weight_T=weight_T), loss, VALUE, progress))
        metrics = mean_over_updates(updates) | explained_variance(batch)
        return {f"critic/{name}": value for name, value in metrics.items()}

    def export(self, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
        mark_padding(self.lm, tokenizer)
        super().export(tokenizer, folder)


def explained_variance(batch: TokenBatch) -> dict[str, float]:
    """Return the explained variance of the returns: 1 is perfect, 0 is no better than their mean."""
    assert batch.value_T is not None
    assert batch.return_T is not None
    return_A, value_A = batch.return_T[batch.action_T].double(), batch.value_T[batch.action_T].double()
    variance = float(return_A.var(correction=0)) if len(return_A) else 0.0
    return {"explained_variance": 1 - float((return_A - value_A).var(correction=0)) / variance} if variance else {}
