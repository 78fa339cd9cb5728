"""The same kept batch through every objective: gradients with respect to the logits of each token.

`trainer.replay_freq` keeps steps for it. What is measured is the objective alone, with the weights of its tokens; KL,
entropy and importance weights of the run are left out, since they would be in all of them. Shape letters: T positions,
N actions, D hidden size, V vocabulary, O objectives.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from RL2.batch.packing import microbatches
from RL2.config.programs import RLConfig
from RL2.errors import UserError, first_line
from RL2.models.policy import Policy, head
from RL2.objectives.loss import with_weights
from RL2.objectives.objective import Objective
from RL2.objectives.registry import ALL, OBJECTIVES, BoundObjective, configured, reads_old_policy
from RL2.ops.token_stats import reference_stats
from RL2.parallel.fsdp import local
from RL2.parallel.processes import Processes
from RL2.tools.replay import read_batch, run_config, with_advantages
from RL2.trainer.run import REPLAY_BATCH, replay_folder
from RL2.types import StatsRequest, TokenBatch, TokenStats
from RL2.workers.actor import Actor

SEEN = ("logp", "entropy", "rank")
NO_OLD_POLICY = "reads log-probabilities of the policy before the first update, and the step has none"
LIMIT_TOKENS = 4096
"""Maximum number of tokens that are measured."""
AT_ONCE = 1 << 20
"""Logits that are in memory at a time, for each objective."""
SAME = 1e-6
"""Objectives whose cosine is at least 1 minus this coincide."""


@dataclass(frozen=True)
class Effect:
    """The effect of one objective on the tokens of the batch."""

    title: str
    loss: float
    norm: float
    """Euclidean norm of the gradient with respect to all logits."""
    tokens: int
    """Number of measured tokens that have a weight."""
    pull_N: Tensor
    """Minus the derivative of the weighted loss by the logit of the sampled token."""
    entropy_N: Tensor
    """First-order change of each token's entropy for a step of length 1 against the gradient of all logits."""
    prob_N: Tensor
    """The same for the probability of the sampled token."""


@dataclass(frozen=True)
class Atlas:
    """All objectives on one kept step."""

    run: str
    step: int
    batch: TokenBatch
    """The measured sequences."""
    logp_N: Tensor
    entropy_N: Tensor
    rank_N: Tensor
    effects: list[Effect]
    cosines_OO: Tensor
    """Cosines between the gradients with respect to all logits; NaN for an objective without a gradient."""
    left_out: dict[str, str]
    """Objective -> what the batch lacks."""
    num_tokens: int
    """Number of actions of the whole batch."""

    @property
    def clusters(self) -> list[list[str]]:
        """Titles of objectives that coincide on this batch, by falling size; each is in one list."""
        left, found = list(range(len(self.effects))), []
        while left:
            first, *others = left
            same = [first, *(n for n in others if self.cosines_OO[first, n] >= 1 - SAME)]
            found.append([self.effects[n].title for n in same])
            left = [n for n in left if n not in same]
        return sorted(found, key=len, reverse=True)


def measure(run: Path, step: int, processes: Processes, more: Sequence[str] = (), limit: int = LIMIT_TOKENS) -> Atlas:
    """Return the effects of all built-in objectives, and of `more` titles "NAME [KEY=VALUE ...]" as in replay.

    Whole sequences, evenly spaced, are measured up to `limit` tokens. The weights are those of the whole batch.
    Raise UserError for a step that cannot be read, and for one of `more` that cannot be measured.
    """
    folder = replay_folder(run, step)
    whole = read_batch(folder / REPLAY_BATCH)
    ids = some_sequences(whole, limit)
    subjects, left_out = _subjects(run, folder, whole, more)
    if not subjects:
        raise UserError(f"no objective can be measured on {folder}: {'; '.join(dict.fromkeys(left_out.values()))}")
    config = next(iter(subjects.values()))[0]
    actor = Actor(config.actor, processes, 1, folder)
    batch = whole.sequences(ids)
    actions = batch.positions(batch.action_T)
    hidden_ND = hidden_states(actor, batch, config.actor.max_inference_length_per_device)
    bounds = {title: bound for title, (_, bound, _) in subjects.items()}
    request = _request(list(bounds.values()), actor.lm.config.vocab_size, config.actor.temperature)
    device = next(actor.policy.parameters()).device
    with torch.no_grad():
        found = actor.policy.stats_of(hidden_ND.to(device), actions.labels_T.to(device), request)
    stats = TokenStats(**found).map(lambda x: x.cpu())
    pulls, losses, tokens = dict[str, dict[str, Tensor]](), dict[str, float](), dict[str, int]()
    for title, (_, bound, weighed) in subjects.items():
        mine = weighed.sequences(ids)
        mine = mine.positions(mine.action_T)
        weight_N = _objective_weight(mine)
        losses[title], pulls[title] = _by_statistic(bound, stats, mine, weight_N)
        tokens[title] = int((weight_N != 0).sum())
    gram_OO, parts = _through_logits(actor, hidden_ND, actions.labels_T, request, pulls)
    norm_O = gram_OO.diagonal().sqrt()
    unit_O = norm_O.clamp(min=1e-30)  # an objective without a gradient here changes nothing
    cosines_OO = gram_OO / (norm_O[:, None] * norm_O)
    effects = [
        Effect(title, losses[title], float(norm), tokens[title], pull_N, entropy_N / unit, prob_N / unit)
        for (title, (pull_N, entropy_N, prob_N)), norm, unit in zip(parts.items(), norm_O, unit_O, strict=True)
    ]
    seen = (stats.logp, stats.entropy, stats.rank)
    return Atlas(str(run), step, batch, *seen, effects, cosines_OO, left_out, int(whole.action_T.sum()))


def some_sequences(batch: TokenBatch, limit: int) -> list[int]:
    """Return evenly spaced sequences of `batch` with at most `limit` actions in all, but at least one."""
    actions_B = torch.zeros_like(batch.lengths_B).index_add_(0, batch.sequence_T, batch.action_T.long())
    number = batch.num_sequences
    while number > 1:
        ids = torch.linspace(0, batch.num_sequences - 1, number).round().long()
        if int(actions_B[ids].sum()) <= limit:
            return [int(b) for b in ids]
        number = max(1, number * 9 // 10)
    return [0]


def _subjects(
    run: Path, folder: Path, batch: TokenBatch, more: Sequence[str]
) -> tuple[dict[str, tuple[RLConfig, BoundObjective, TokenBatch]], dict[str, str]]:
    """Return configuration, objective and weighted batch of each objective, and why others are left out."""
    found, left_out = dict[str, tuple[RLConfig, BoundObjective, TokenBatch]](), dict[str, str]()
    same = {id(objective): name for name, objective in reversed(OBJECTIVES.items())}
    for title in dict.fromkeys((*ALL, *more)):
        objective = ALL.get(title)
        if objective is not None:
            if why := _lacks(objective, batch):
                left_out[title] = why
                continue
            if same.get(id(objective), title) != title:
                left_out[title] = f"another name of {same[id(objective)]}"
                continue
        try:
            config = run_config(run, folder, title)
            bound = configured(config.actor)
            if why := _lacks(bound.objective, batch):
                raise UserError(f"{title} {why}")
            if reads_old_policy(config.actor) and batch.old_logp_T is None:
                raise UserError(f"{title} {NO_OLD_POLICY}")
            mine = with_weights(with_advantages(batch, config), config.actor)
        except UserError as error:
            if title in more:
                raise
            left_out[title] = first_line(error)
            continue
        if mine.weight_T is None or not _objective_weight(mine).any():
            left_out[title] = "no token of the batch has a weight: no rollout earned a reward"
            continue
        found[title] = config, bound, mine
    return found, left_out


def _lacks(objective: Objective, batch: TokenBatch) -> str:
    """Return what the kept batch does not have for an objective; '' if it lacks nothing."""
    if objective.needs_teacher:
        return "reads the distribution of a teacher, and the step has none"
    if objective.trains_on == "pairs":
        return "trains on pairs of a chosen and a rejected response, and the step has rollouts"
    if objective.trains_on == "labels":
        return "trains on responses with labels and a baseline, and the step has rollouts"
    if objective.reference and batch.ref_logp_T is None:
        return "reads log-probabilities of a reference, and the run had none"
    if objective.covariance and batch.old_logp_T is None:
        return NO_OLD_POLICY
    return ""


def _objective_weight(batch: TokenBatch) -> Tensor:
    assert batch.weight_T is not None
    return batch.weight_T if batch.objective_factor_T is None else batch.weight_T * batch.objective_factor_T


def hidden_states(actor: Actor, batch: TokenBatch, max_tokens: int) -> Tensor:
    """Return the last hidden states of the actions of `batch`, [N, D], on the CPU."""
    starts, found = batch.cu_seqlens.tolist(), list[tuple[Tensor, Tensor]]()
    device = next(actor.policy.parameters()).device
    actor.policy.eval()
    for ids in microbatches(batch, range(batch.num_sequences), max_tokens, 1)[0]:
        part = batch.sequences(ids)
        shared = part.shared()
        with torch.no_grad():
            on_device = None if shared is None else shared.to(device)
            hidden_ND, _ = actor.policy.hidden_of_actions(part.to(device), on_device, None)
        places = torch.cat([torch.arange(starts[b], starts[b + 1]) for b in ids])[part.action_T]
        found.append((places, hidden_ND.float().cpu()))
    order_N = torch.cat([places for places, _ in found]).argsort()
    return torch.cat([hidden_ND for _, hidden_ND in found])[order_N]


def _request(bounds: Sequence[BoundObjective], vocabulary: int, temperature: float) -> StatsRequest:
    """Return the statistics that any of the objectives reads, and those that are shown."""
    fields = tuple(dict.fromkeys((*SEEN, *(field for bound in bounds for field in bound.fields))))
    return StatsRequest(fields, min(vocabulary, max(bound.top_k for bound in bounds)), temperature)


def _by_statistic(
    bound: BoundObjective, stats: TokenStats, batch: TokenBatch, weight_N: Tensor
) -> tuple[float, dict[str, Tensor]]:
    """Return the weighted loss, and its derivative by each statistic that the objective reads, [N] or [N, K]."""
    leaves = {}
    for name in bound.fields:
        value = getattr(stats, name).detach().clone()
        value = value[:, : bound.top_k] if value.ndim == 2 else value
        leaves[name] = value.requires_grad_(value.is_floating_point() and name != "rank")
    loss_N, _ = bound.loss(TokenStats(**leaves), batch)
    loss = (loss_N * weight_N).sum()
    free = {name: value for name, value in leaves.items() if value.requires_grad}
    grads = torch.autograd.grad(loss, list(free.values()), allow_unused=True)
    return loss.item(), {name: grad for name, grad in zip(free, grads, strict=True) if grad is not None}


def _through_logits(
    actor: Actor, hidden_ND: Tensor, labels_N: Tensor, request: StatsRequest, pulls: dict[str, dict[str, Tensor]]
) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor, Tensor]]]:
    """Return the inner products of the gradients by the logits, [O, O], and pull, entropy and probability of each."""
    gram_OO = torch.zeros(len(pulls), len(pulls), dtype=torch.float64)
    parts: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {title: [] for title in pulls}
    fields = tuple(dict.fromkeys(name for pull in pulls.values() for name in pull))
    for tile, logits_nV in _tiles(actor, hidden_ND, request.temperature):
        logits_nV.requires_grad_()
        stats = reference_stats(logits_nV, labels_N[tile], fields, request.top_k)
        p_nV = logits_nV.detach().softmax(-1)
        entropy_n = torch.special.entr(p_nV).sum(-1, keepdim=True)
        by_entropy_nV = torch.special.entr(p_nV) - p_nV * entropy_n
        at_n = labels_N[tile][:, None]
        p_n = p_nV.gather(1, at_n)[:, 0]
        rows = []
        for title, pull in pulls.items():
            values, given = [], []
            for name, grad in pull.items():
                value = getattr(stats, name)
                values.append(value[:, : grad.shape[1]] if grad.ndim == 2 else value)
                given.append(grad[tile].to(value.dtype))
            (grad_nV,) = torch.autograd.grad(values, logits_nV, given, retain_graph=True)
            own_n = grad_nV.gather(1, at_n)[:, 0]
            prob_n = -p_n * (own_n - (p_nV * grad_nV).sum(-1))
            parts[title].append((-own_n, -(grad_nV * by_entropy_nV).sum(-1), prob_n))
            rows.append(grad_nV.flatten())
        rows_OM = torch.stack(rows)
        gram_OO += (rows_OM @ rows_OM.T).double()
    whole = {title: tuple(torch.cat(x).float() for x in zip(*found, strict=True)) for title, found in parts.items()}
    return gram_OO, whole  # type: ignore[return-value]


def _tiles(actor: Actor, hidden_ND: Tensor, temperature: float) -> Iterator[tuple[slice, Tensor]]:
    """Yield the logits of a few tokens at a time, with the places of the tokens.

    They are float64 for a small vocabulary, and float32 for a large one.
    """
    policy = actor.policy
    assert isinstance(policy, Policy)
    layer = head(policy.lm)
    weight_VD = local(layer.weight).detach().cpu()
    dtype = torch.float64 if len(weight_VD) <= 8192 else torch.float32
    weight_VD, size = weight_VD.to(dtype), max(1, AT_ONCE // len(weight_VD))
    for first in range(0, len(hidden_ND), size):
        tile = slice(first, min(first + size, len(hidden_ND)))
        logits_nV = hidden_ND[tile].to(dtype) @ weight_VD.T
        if layer.bias is not None:
            logits_nV = logits_nV + local(layer.bias).detach().cpu().to(dtype)
        yield tile, (policy.logit_transform(logits_nV) / temperature).detach()
