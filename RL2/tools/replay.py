"""Replay one step of a run with several objectives: gradients of each on the same rollouts and weights.

`trainer.replay_freq` keeps steps for it. Shape letters: T positions of a batch, N actions among them.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from rich.console import Group
from rich.table import Table
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from RL2.batch.advantages import reinforce, reward_of_sequences
from RL2.batch.registry import configured as estimator_of
from RL2.config.load import words
from RL2.config.model import Actor as ActorConfig
from RL2.config.programs import RLConfig
from RL2.config.values import build
from RL2.errors import UserError, first_line, in_table
from RL2.objectives.loss import by_token, total_loss, wanted_stats, with_weights
from RL2.objectives.objective import Loss
from RL2.objectives.registry import configured, reads_old_policy
from RL2.parallel.fsdp import whole
from RL2.parallel.processes import Processes
from RL2.trainer.run import REPLAY_BATCH, replay_folder
from RL2.trainer.unused_settings import check_teacher, reads_advantages
from RL2.types import StatsRequest, TokenBatch, TokenStats
from RL2.workers.actor import Actor
from RL2.workers.teacher import make_teacher
from RL2.workers.worker import Teacher


@dataclass(frozen=True)
class Replayed:
    """The effect of one objective in the step."""

    title: str
    loss: float
    norm: float
    """Euclidean norm of the gradient over all weights."""
    tokens: int
    """Number of tokens that train."""
    entropy: float
    """First-order change of the mean entropy, in nats, for a step of length 1 in weight space along the descent."""
    correct: float
    """The same for the mean log-probability of the correct rollouts, in nats; NaN if there are none."""
    wrong: float
    """The same for those without a reward."""
    weight_N: Tensor
    """For each action, how much the loss falls as the log-probability of the sampled token alone rises."""


@dataclass(frozen=True)
class Replay:
    step: int
    objectives: list[Replayed]
    cosines: dict[tuple[str, str], float]
    """Cosine between the gradients of two objectives."""


def replay(run: Path, step: int, wanted: Sequence[str], processes: Processes) -> Replay:
    """Return the effect of each objective of `wanted`, "NAME [KEY=VALUE ...]", in the step `step` of the run in `run`.

    NAME is a value of `actor.objective`. An objective that reads no advantages trains on correct rollouts. Another one
    trains on all, with the advantages of the run, or with rewards minus the mean of their group if those have no
    baseline. KEY=VALUE changes the configuration of the run. Runs on one process. Raise UserError for a step, an
    objective or a key that does not exist.
    """
    folder = replay_folder(run, step)
    configs = {title: run_config(run, folder, title) for title in wanted}
    batch = read_batch(folder / REPLAY_BATCH)
    actor = Actor(next(iter(configs.values())).actor, processes, 1, folder)

    reading = {title for title, config in configs.items() if reads_old_policy(config.actor)}
    with_old = with_old_policy(batch, actor) if reading else batch

    def only(field: str) -> StatsRequest:
        return replace(actor.request, fields=(field,), top_k=0)

    right_B = reward_of_sequences(batch) > 0
    directions = {
        "entropy": _gradient(actor, _mean(batch, batch.action_T), _entropy, only("entropy")),
        "correct": _gradient(actor, _of_sequences(batch, right_B), _logp, only("logp")),
        "wrong": _gradient(actor, _of_sequences(batch, ~right_B), _logp, only("logp")),
    }
    found, gradients = [], {}
    for title, config in configs.items():
        actor.teacher = teacher_of(config, title, actor)
        mine = with_weights(with_advantages(with_old if title in reading else batch, config), config.actor)
        gradients[title] = _gradient(
            actor, mine, _loss(config.actor), wanted_stats(config.actor, configured(config.actor))
        )
        norm = _dot(gradients[title], gradients[title]) ** 0.5
        changes = {name: -_dot(gradients[title], of) / norm if norm else 0.0 for name, of in directions.items()}
        changes |= {name: math.nan for name, of_B in (("correct", right_B), ("wrong", ~right_B)) if not of_B.any()}
        loss, weight_N = _weights_of_tokens(actor, mine, config.actor)
        assert mine.weight_T is not None
        found.append(Replayed(title, loss, norm, int((mine.weight_T != 0).sum()), **changes, weight_N=weight_N))
    cosines = {}
    for a, b in combinations(found, 2):
        product = _dot(gradients[a.title], gradients[b.title])
        cosines[a.title, b.title] = product / (a.norm * b.norm) if a.norm and b.norm else math.nan
    cosines |= {(a.title, a.title): _dot(gradients[a.title], gradients[a.title]) / a.norm**2 for a in found if a.norm}
    return Replay(step, found, cosines)


def save(replayed: Replay, file: Path) -> None:
    """Write the replay as JSON, with the weights of all tokens."""
    objectives = [vars(one) | {"weight_N": one.weight_N.tolist()} for one in replayed.objectives]
    cosines = [{"of": a, "and": b, "cosine": value} for (a, b), value in replayed.cosines.items()]
    file.write_text(json.dumps({"step": replayed.step, "objectives": objectives, "cosines": cosines}))


def table(replayed: Replay) -> Group:
    """Return tables for the terminal: the effect of each objective, and the cosines between their gradients."""
    what = Table(title=f"step {replayed.step}, a step of length 1 against each gradient", title_justify="left")
    for heading in ("objective", "loss", "norm", "tokens", "entropy", "log p correct", "log p wrong"):
        what.add_column(heading, justify="left" if heading == "objective" else "right")
    for number, one in enumerate(replayed.objectives, 1):
        changes = (f"{change:+.3g}" for change in (one.entropy, one.correct, one.wrong))
        title = f"{number} {in_table(one.title)}"
        what.add_row(title, f"{one.loss:.4g}", f"{one.norm:.4g}", str(one.tokens), *changes)
    titles = [one.title for one in replayed.objectives]
    between = Table(title="cosines of the gradients", title_justify="left")
    for heading in ("objective", *(f"{number}" for number in range(1, len(titles) + 1))):
        between.add_column(heading)
    for number, a in enumerate(titles, 1):
        found = [replayed.cosines.get((a, b), replayed.cosines.get((b, a), math.nan)) for b in titles]
        between.add_row(f"{number} {in_table(a)}", *(f"{cosine:+.4f}" for cosine in found))
    return Group(what, between)


def read_batch(file: Path) -> TokenBatch:
    """Return the batch in `file`. Raise UserError if it is not the batch of a run."""
    try:
        tensors: dict[str, Any] = load_file(file)
        return TokenBatch(**tensors)
    except (OSError, SafetensorError, TypeError) as error:
        raise UserError(f"{file} is damaged: {first_line(error)}") from error


def with_old_policy(batch: TokenBatch, actor: Actor) -> TokenBatch:
    """Return `batch` with the statistics of the policy before the update that it lacks; `actor` has its weights."""
    request = replace(actor.request, fields=("logp", "entropy", "max_logp"), top_k=0)
    stats = actor.stats(batch, request, actor.config.max_inference_length_per_device, routing=actor.routing())
    found = {"old_logp_T": stats.logp, "old_entropy_T": stats.entropy, "off_mode_T": stats.logp < stats.max_logp}
    return batch.with_(**{name: value for name, value in found.items() if getattr(batch, name) is None})


def run_config(run: Path, folder: Path, title: str, engine: str = "embedded") -> RLConfig:
    """Return the configuration of `run` with the objective and the overrides of `title`, and the model in `folder`.

    `engine` is the one that samples; the default is for tools that do not sample, and empty stands for the run's. Raise
    UserError if the file is missing, or if a setting does not fit.
    """
    try:
        name, *overrides = shlex.split(title)
    except ValueError as error:
        raise UserError(f"{title!r} is not NAME [KEY=VALUE ...]: {first_line(error)}") from error
    given, file = words(overrides), run / "config.yaml"
    keys = {override.partition("=")[0] for override in overrides}
    try:
        fresh: Any = OmegaConf.to_container(OmegaConf.load(file))
        # settings of the objective of the run
        fresh["actor"] |= {"objective": name, "objective_args": {}, "clip": None}
        fresh["actor"]["path"] = dict.fromkeys(fresh["actor"]["path"])
        values: Any = OmegaConf.to_container(OmegaConf.merge(fresh, given))
        values["actor"] |= {"model_name": str(folder), "ddp_size": 1, "sp_size": 1, "tp_size": 1, "ep_size": 1}
        values["actor"]["lora"] |= {"rank": 0, "save": "merged"}  # the adapters are merged into the kept weights
        values["rollout"]["engine"] = engine or values["rollout"]["engine"]
        # the same term in every gradient would be in all cosines
        values["actor"]["moe"] = (values["actor"].get("moe") or {}) | {"aux_coef": 0.0, "z_coef": 0.0}
        values["rollout"]["model_name"] = values["ref_actor"]["model_name"] = str(folder)
        values["actor"]["dequantize"] = values["ref_actor"]["dequantize"] = False  # the kept weights are not quantised
    except Exception as error:  # errors of YAML and OmegaConf, and of keys that should be groups
        raise UserError(f"{file} is not the configuration of an RL run: {first_line(error)}") from error
    config: RLConfig = build(RLConfig, values, "")
    on_all = reads_advantages(configured(config.actor))
    fitting = {"train_on": "all", "average_over": "all"} if on_all else {"train_on": "correct"}
    if on_all and not config.actor.select.is_on:  # then all tokens are kept
        fitting["regularize_on"] = "kept"
    values["actor"] |= {key: value for key, value in fitting.items() if f"actor.{key}" not in keys}
    return build(RLConfig, values, "")


def teacher_of(config: RLConfig, title: str, actor: Actor) -> Teacher | None:
    """Return the teacher of `config` if its objective, that of `title`, needs one.

    Raise UserError if that is the policy at another step, whose weights are not kept.
    """
    if config.actor.kl.is_exact:
        raise UserError(
            f"{title}: actor.kl.estimator=exact needs the reference, which is not kept; set actor.kl.coef=0"
        )
    if not (objective := configured(config.actor)).needs_teacher:
        return None
    check_teacher(config.teacher, objective)
    if not config.teacher.named or config.teacher.hint:
        what = "teacher.hint=true" if config.teacher.hint else f"teacher.model_name={config.teacher.model_name}"
        raise UserError(f"{title}: {what} is not kept with a step; pass the folder of a model, and no hint")
    return make_teacher(config.teacher, actor, config.actor.temperature)


def with_advantages(batch: TokenBatch, config: RLConfig) -> TokenBatch:
    """Return `batch` with the advantages of the run, or for an objective that reads advantages with a group baseline.

    That is needed where the estimator of the run has none. Raise UserError if its groups are single rollouts.
    """
    bound = estimator_of(config.adv)
    has_baseline = bound.estimator.baseline or bound.needs_critic
    if has_baseline or not reads_advantages(configured(config.actor)):
        return batch
    sizes = batch.group_B.unique(return_counts=True)[1]
    if int(sizes.max()) == 1:
        raise UserError(
            f"{config.actor.objective} reads advantages, and a group of this run is one rollout, its own mean; "
            "take a run with train_data.responses_per_prompt above 1"
        )
    return batch.with_(advantage_T=reinforce(batch))


def _gradient(
    actor: Actor,
    batch: TokenBatch,
    loss: Callable[[TokenStats, TokenBatch], Loss],
    request: StatsRequest,
) -> list[Tensor]:
    """Return the gradient of (loss_T * weight_T).sum(), on the CPU."""
    actor.optimizer.zero_grad()
    actor.backward(batch, loss, request)
    return [
        torch.zeros(p.shape) if p.grad is None else whole(p.grad).float().cpu().clone()
        for p in actor.policy.parameters()
    ]


def _dot(a: list[Tensor], b: list[Tensor]) -> float:
    return sum(float((x.double() * y.double()).sum()) for x, y in zip(a, b, strict=True))


def _loss(config: ActorConfig) -> Callable[[TokenStats, TokenBatch], Loss]:
    objective = configured(config)
    return lambda stats, batch: total_loss(stats, batch, config, objective)


def _weights_of_tokens(actor: Actor, batch: TokenBatch, config: ActorConfig) -> tuple[float, Tensor]:
    """Return the loss, and the effect of the log-probability of each action on it (`by_token`)."""
    limit = config.max_inference_length_per_device
    stats = actor.stats(batch, wanted_stats(config, configured(config)), limit, routing=actor.routing()).at(
        batch.action_T
    )
    actions = batch.positions(batch.action_T)
    assert actions.weight_T is not None
    loss_N, weight_N = by_token(stats, actions, config, configured(config))
    return float((loss_N * actions.weight_T).sum()), weight_N


def _entropy(stats: TokenStats, batch: TokenBatch) -> Loss:
    return stats.entropy, {}


def _logp(stats: TokenStats, batch: TokenBatch) -> Loss:
    return stats.logp, {}


def _mean(batch: TokenBatch, chosen_T: Tensor) -> TokenBatch:
    return batch.with_(weight_T=chosen_T.float() / max(1, int(chosen_T.sum())))


def _of_sequences(batch: TokenBatch, chosen_B: Tensor) -> TokenBatch:
    """Return `batch` with weights that sum over the actions of each chosen sequence and average over sequences."""
    chosen_T = batch.action_T & chosen_B[batch.sequence_T]
    return batch.with_(weight_T=chosen_T.float() / max(1, int(chosen_B.sum())))
