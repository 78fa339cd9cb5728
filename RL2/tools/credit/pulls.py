"""Pulls of objectives on the logits of sampled tokens, from dense logits.

Shapes: T positions of an answer, N actions among them, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from RL2.config.programs import RLConfig
from RL2.errors import UserError
from RL2.objectives.loss import total_loss, wanted_stats, with_weights
from RL2.objectives.registry import configured, reads_old_policy
from RL2.ops.token_stats import reference_stats
from RL2.tools.replay import run_config, with_advantages
from RL2.types import TokenBatch
from RL2.workers.actor import Actor


class Objectives:
    """Objectives, each with its weighted batch of a kept step."""

    def __init__(
        self, run: Path, folder: Path, batch: TokenBatch, titles: Sequence[str], *, engine: str, all_needed: bool
    ) -> None:
        """Take objectives "NAME [KEY=VALUE ...]", as for `rl2 replay`, of the step in `folder` of `run`.

        `engine` is as for `run_config`.

        Raise UserError for one that does not exist or does not fit the run; without `all_needed`, leave out those that
        do not fit.
        """
        self.batch = batch
        self.configs: dict[str, RLConfig] = {}
        self.batches: dict[str, TokenBatch] = {}
        self.left_out: dict[str, str] = {}
        for title in titles:
            try:
                config = run_config(run, folder, title, engine)
                if configured(config.actor).needs_teacher or config.actor.kl.is_exact:
                    raise UserError("it reads a second distribution, which credit does not compute")
                if reads_old_policy(config.actor) and batch.old_logp_T is None:
                    raise UserError("it reads the policy before the update, which the step has not kept")
                weighted = with_weights(with_advantages(batch, config), config.actor)
            except UserError as error:
                if all_needed:
                    raise
                self.left_out[title] = str(error)
                continue
            self.configs[title], self.batches[title] = config, weighted

    def pulls(self, actor: Actor, sequence: int) -> dict[str, list[float]]:
        """Return for each objective -d loss / dz at each action of a sequence, z the logit of the sampled token.

        The loss is that of the whole step, with its weights and the run's regularizers. A step against the gradient
        raises the logit where this is above 0. All effects of the logit count: those through the most likely token, the
        rank and the entropy too.
        """
        found = {}
        logp_NV = log_probabilities(actor, self.batch.sequences([sequence]))
        for title, config in self.configs.items():
            part = self.batches[title].sequences([sequence])
            objective = configured(config.actor)
            actions, request = part.positions(part.action_T), wanted_stats(config.actor, objective)
            z_NV = (logp_NV * request.temperature).requires_grad_()
            stats = reference_stats(z_NV / request.temperature, actions.labels_T, request.fields, request.top_k)
            loss_N, _ = total_loss(stats, actions, config.actor, objective)
            assert actions.weight_T is not None
            loss = (loss_N * actions.weight_T).sum()
            gradient_NV = torch.zeros_like(z_NV)
            if loss.requires_grad:
                (gradient_NV,) = torch.autograd.grad(loss, z_NV, materialize_grads=True)
            found[title] = (-gradient_NV.gather(1, actions.labels_T[:, None])[:, 0]).tolist()
        return found


def log_probabilities(actor: Actor, part: TokenBatch) -> Tensor:
    """Return log p of all tokens at each action of a batch, float32 [N, V] on the CPU, at the actor's temperature."""
    vocabulary = actor.lm.config.vocab_size
    request = replace(actor.request, fields=("top_logp", "top_id"), top_k=vocabulary)
    limit = actor.config.max_inference_length_per_device
    stats = actor.stats(part, request, limit, routing=actor.routing()).at(part.action_T)
    return torch.zeros_like(stats.top_logp).scatter(1, stats.top_id, stats.top_logp)
