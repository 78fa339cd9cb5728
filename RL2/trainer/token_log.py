"""Statistics of every token of some trajectories, computed beside the update for `rl2 view` (docs/viewer.md).

One more forward pass over the few trajectories of samples.jsonl, with the weights before the update. The update itself
neither sees nor waits for anything else. Shapes: T positions of a batch, N actions among them, K alternatives.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from RL2.batch.packing import pack
from RL2.config.programs import RLConfig
from RL2.config.rollout import SamplingParams
from RL2.io.report import Report
from RL2.objectives.loss import by_token
from RL2.rollout.continuation import decode
from RL2.types import TEACHER_MENU, TOP, StatsRequest, TokenBatch, TokenStats, Trajectory
from RL2.workers.actor import Actor

ALTERNATIVES = 5
"""Number of the most likely tokens that are kept of each distribution."""
SEEN = ("logp", "max_logp", "entropy", "rank", "top_logp", "top_id")


class TokenLog:
    """Statistics of tokens for `Report.tokens`; every method is collective and does the same on every process."""

    def __init__(self, config: RLConfig, actor: Actor, tokenizer: PreTrainedTokenizerBase, report: Report) -> None:
        self.config, self.actor, self.report = config, actor, report
        self.texts = TokenTexts(tokenizer)
        self.tests: list[tuple[list[Trajectory], SamplingParams]] = []
        """Trajectories of each test set since the last look, and how they were sampled."""

    def look(
        self,
        step: int,
        trajectories: Seq[Trajectory] = (),
        trained: Seq[Trajectory] = (),
        batch: TokenBatch | None = None,
    ) -> None:
        """Write statistics of the tests since the last call and, at some steps, of the rollout; the engine is asleep.

        `trained` are those of `trajectories` that filters keep, and `batch` is these, packed and annotated.
        """
        trainer = self.config.trainer
        tests, self.tests = self.tests, []
        if trainer.token_stats_freq is None:
            return
        rows = []
        for trajectories_of, sampling in tests:
            if with_tokens := [trajectory for trajectory in trajectories_of if trajectory.sequences]:
                rows += self._of_tests(with_tokens, sampling)
        self.report.tokens(step, "test", rows)
        frequencies = [trainer.token_stats_freq, *filter(None, [trainer.replay_freq])]
        if batch is not None and any(step % frequency == 0 for frequency in frequencies):
            self.report.tokens(step, "train", self._of_rollout(trajectories, trained, batch))

    def _of_tests(self, trajectories: list[Trajectory], sampling: SamplingParams) -> list[dict[str, Any]]:
        batch = pack(trajectories)
        # the most likely token was taken, of the model's own distribution
        stats = self._stats(
            batch, replace(self.actor.request, fields=(), top_k=0, temperature=sampling.temperature or 1.0)
        )
        return [
            self._row(trajectory, batch, stats, n, cut=sampling.is_cut) for n, trajectory in enumerate(trajectories)
        ]

    def _of_rollout(
        self, trajectories: Seq[Trajectory], trained: Seq[Trajectory], batch: TokenBatch
    ) -> list[dict[str, Any]]:
        """Return rows for the first trajectories that train."""
        actor, sampling = self.actor, self.config.rollout.train_sampling_params
        shown = {(each.group, each.sample) for each in trajectories[: self.config.trainer.samples_per_step]}
        rows = []
        for ids, minibatch in actor.minibatches(batch):
            of_B = [trained[int(batch.trajectory_B[b])] for b in ids]
            chosen = [i for i, each in enumerate(of_B) if (each.group, each.sample) in shown]
            if not chosen:
                continue
            part = minibatch.sequences(chosen)
            stats = self._stats(part, actor.request)
            actions, own = part.positions(part.action_T), vars(stats)
            if actor.objective.top_k:
                own = own | {name: own[name][:, : actor.objective.top_k] for name in ("top_logp", "top_id")}
            loss_N, pull_N = by_token(TokenStats(**own), actions, actor.loss_config, actor.objective)
            assert actions.weight_T is not None
            trains_N = actions.weight_T != 0
            for n in part.trajectory_B.unique().tolist():
                row = self._row(trained[n], part, stats, n, cut=sampling.is_cut)
                mine_N = actions.trajectory_B[actions.sequence_T] == n
                row["loss_T"], row["pull_T"] = _list((loss_N * trains_N)[mine_N]), _list(pull_N[mine_N])
                trained_N = mine_N & trains_N
                row["loss"] = float(loss_N[trained_N].mean()) if trained_N.any() else None
                rows.append(row)
        return rows

    def _stats(self, batch: TokenBatch, request: StatsRequest) -> TokenStats:
        """Return statistics of the actions of `batch`, [N]: those shown, and those of `request`."""
        actor, top_k = self.actor, min(ALTERNATIVES, self.actor.lm.config.vocab_size)
        fields = tuple(dict.fromkeys((*request.fields, *SEEN)))
        # a tail bucket depends on K, which is then the objective's
        top_k = request.top_k if set(TOP) & set(TEACHER_MENU) & set(fields) else max(request.top_k, top_k)
        request = replace(request, fields=fields, top_k=top_k)
        limit = actor.config.max_inference_length_per_device
        return actor.stats(batch, request, limit, routing=actor.routing()).at(batch.action_T)

    def _row(
        self, trajectory: Trajectory, batch: TokenBatch, stats: TokenStats, n: int, *, cut: bool
    ) -> dict[str, Any]:
        """Return the row of trajectory `n`; with `cut`, top_p or top_k make the engine's numbers differ."""
        actions = batch.positions(batch.action_T)
        mine_N = actions.trajectory_B[actions.sequence_T] == n
        assert actions.engine_logp_T is not None
        top_id_NK = stats.top_id[mine_N, :ALTERNATIVES]
        token_ids = [token for sequence in trajectory.sequences for token in sequence.token_ids.tolist()]
        return {
            "row": trajectory.row,
            "group": trajectory.group,
            "sample": trajectory.sample,
            "role": trajectory.role,
            "reward": trajectory.reward,
            "score": trajectory.score,
            "length": trajectory.num_tokens,
            "token_ids": token_ids,
            "tokens": [self.texts[token] for token in token_ids],
            "sampled": [sampled for sequence in trajectory.sequences for sampled in sequence.action_mask.tolist()],
            "logp": _list(stats.logp[mine_N]),
            "max_logp": _list(stats.max_logp[mine_N]),
            "rank": stats.rank[mine_N].long().tolist(),
            "entropy": _list(stats.entropy[mine_N]),
            "engine_logp": None if cut else _list(actions.engine_logp_T[mine_N]),
            "top_logp": [_list(top_K) for top_K in stats.top_logp[mine_N, :ALTERNATIVES]],
            "top": [[self.texts[token] for token in ids] for ids in top_id_NK.tolist()],
        }


class TokenTexts:
    """A mapping of token ids to the text that each adds."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.known: dict[int, str] = {}

    def __getitem__(self, token: int) -> str:
        if token not in self.known:
            # after another token, as some tokenizers drop the space before a text's first word
            before = decode(self.tokenizer, [token])
            self.known[token] = decode(self.tokenizer, [token, token])[len(before) :]
        return self.known[token]


def _list(values_N: Tensor) -> list[float]:
    return values_N.to(torch.float32).tolist()
