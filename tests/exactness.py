"""Gradients, trainer and engine of a tiny model, compared with transformers' own forward of each sequence alone."""

from __future__ import annotations

import asyncio
import json
import math
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from model_tables import listed
from tiny_models import VARIANTS, tiny_config, tiny_model
from tiny_multimodal import MARKS, multimodal_config, multimodal_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from RL2.batch.packing import loss_weights, pack_arrays, pack_tokens, sequence_weights
from RL2.config.load import load
from RL2.engines.embedded.engine import EmbeddedEngine
from RL2.errors import ConfigError
from RL2.models.multimodal import multimodal
from RL2.objectives.preference import dpo
from RL2.objectives.registry import bind
from RL2.ops.attention import is_packed
from RL2.parallel.fsdp import whole
from RL2.parallel.processes import Processes
from RL2.types import Completion, Sampling, StatsRequest, TokenBatch, TokenStats
from RL2.workers.learner import Learner
from RL2.workers.metrics import LossFunction

GROUPS = ("**Exact, packed**", "**Exact, row by row through their own forward**", "**Text part trained exactly**")
"""Groups of models in docs/models.md."""
LIMITS = {**dict.fromkeys(("sft", "spo", "ppo", "dpo"), 1e-3), **dict.fromkeys(("logp", "engine"), 1e-4)}
"""Largest gaps: of gradients, relative to a parameter's, and of log-probabilities, in nats."""
ENGINE_LIMITS = {"qwen3_next": 3e-4}
"""Other limits of `engine`. The gated delta rule of transformers computes in float32 even in float64 models; when it is
changed to float64 too, the gap is 1e-6.
"""
PAIRS = ((20, 24, 9), (7, 33, 12), (31, 5, 28))
"""Tokens of a prompt and of its two responses; the first response has reward 1."""
MAX_TOKENS = 96
"""Tokens of a microbatch, which holds one pair."""
PROMPTS = (40, 23, 31)
"""Tokens of the prompts to sample from."""
REQUESTS = ((0, 64), (0, 9), (1, 64), (2, 20))
"""Prompt and number of new tokens of each request; the last one enters when the second leaves."""
ROWS = 3
"""Requests that the engine runs at a time."""
SMALL = 1e-4
"""Share of the norm of all gradients below which the gradient of a parameter counts as rounding."""
NO_RECOMPUTATION = ".gradient_checkpointing=true: "
"""Text in the error for models whose layers transformers cannot recompute."""

Results = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """The loss of a program on the pairs."""

    batch: TokenBatch
    loss: LossFunction
    request: StatsRequest


def save_model(name: str, folder: Path, tokenizer_of: Path) -> None:
    """Save the tiny model `name` of docs/models.md with the tokenizer in `tokenizer_of`."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_of)
    if name in listed(GROUPS[2]):
        lm = multimodal_model(multimodal_config(name, {"vocab_size": len(tokenizer) + len(MARKS)}))
    else:
        model_type, settings = VARIANTS.get(name, (name, {}))
        lm = tiny_model(tiny_config(model_type, {**settings, "vocab_size": len(tokenizer)}))
    lm.save_pretrained(folder)
    GenerationConfig(eos_token_id=2, pad_token_id=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_learner(folder: Path, processes: Processes, sizes: dict[str, int]) -> Learner:
    """Return a learner with the settings of `sft`; without recomputation if transformers has none for the model."""
    settings = [f"data.path={folder}", "data.max_length=99", "data.batch_size=1", "trainer.experiment_name=x"]
    settings += [f"actor.model_name={folder}", f"actor.max_length_per_device={MAX_TOKENS}"]
    config = replace(load("sft", settings).actor, **sizes)
    try:
        return Learner(config, processes, 10, folder)
    except ConfigError as error:
        if NO_RECOMPUTATION not in str(error):
            raise
        return Learner(replace(config, gradient_checkpointing=False), processes, 10, folder)


def load_plain(folder: Path, packed: bool) -> PreTrainedModel:
    """Return transformers' own model, of the multimodal class if that is what the folder has."""
    config = json.loads((folder / "config.json").read_text())
    kind = AutoModelForCausalLM
    if config["model_type"] in listed(GROUPS[2]):
        kind = type(multimodal_model(multimodal_config(config["model_type"])))
    settings = {"attn_implementation": "eager"} if packed else {}
    return kind.from_pretrained(folder, dtype=torch.float32, **settings).eval()


def draw(generator: torch.Generator, number: int) -> np.ndarray:
    """Return `number` random token ids that are neither special nor beyond any tokenizer of these tests."""
    return torch.randint(4, 256, (number,), generator=generator).numpy()


def make_pairs() -> TokenBatch:
    """Return two responses to each of three prompts."""
    generator = torch.Generator().manual_seed(1)
    ids, actions = [], []
    for prompt, *responses in PAIRS:
        start = draw(generator, prompt)
        for response in responses:
            ids.append(np.concatenate([start, draw(generator, response)]))
            actions.append(np.arange(prompt + response) >= prompt)
    return pack_arrays(ids, actions, [1.0, 0.0] * len(PAIRS), [n // 2 for n in range(len(ids))])


def stats_alone(lm: PreTrainedModel, batch: TokenBatch) -> TokenStats:
    """Return statistics of the actions of `batch` by the model's own forward of each sequence alone, in float64."""
    starts = batch.cu_seqlens.tolist()
    logps = []
    for start, end in pairwise(starts):
        logits_TV = lm(input_ids=batch.token_ids_T[None, start:end], use_cache=False).logits[0].double()
        logps.append(logits_TV.log_softmax(-1)[batch.action_T[start:end]])
    logp_AV = torch.cat(logps)
    logp_A = logp_AV.gather(1, batch.labels_T[batch.action_T][:, None])[:, 0]
    max_logp_A = logp_AV.max(-1).values
    log1mp_A, max_log1mp_A = (torch.log(-torch.expm1(x_A)) for x_A in (logp_A, max_logp_A))
    found = {"logp": logp_A, "max_logp": max_logp_A, "log1mp": log1mp_A, "max_log1mp": max_log1mp_A}
    return TokenStats(**{name: x_A.float() for name, x_A in found.items()})


def make_cases(batch: TokenBatch, logp_A: Tensor) -> dict[str, Case]:
    """Return the losses of the four programs; old and reference policy are near `logp_A`, at the actions."""
    generator = torch.Generator().manual_seed(2)
    old_T, ref_T = (
        torch.zeros_like(batch.reward_T).masked_scatter(
            batch.action_T, (logp_A + size * torch.randn(logp_A.shape, generator=generator)).clamp(max=0)
        )
        for size in (0.1, 0.3)
    )
    advantage_T = torch.randn(batch.num_sequences, generator=generator)[batch.sequence_T]
    batch = batch.with_(old_logp_T=old_T, engine_logp_T=old_T, ref_logp_T=ref_T, advantage_T=advantage_T)
    cases = {"dpo": Case(batch.with_(weight_T=sequence_weights(batch)), dpo, StatsRequest(("logp",)))}
    for name in ("sft", "spo", "ppo"):
        weight_T = loss_weights(batch, train_on="correct" if name == "spo" else "all")
        objective = bind(name, {})
        fields = tuple(dict.fromkeys((*objective.fields, "logp")))
        cases[name] = Case(batch.with_(weight_T=weight_T), objective.loss, StatsRequest(fields))
    return cases


def gradients_alone(plain: PreTrainedModel, stats: TokenStats, case: Case) -> dict[str, Tensor]:
    """Return the gradients of a case by name, from `stats` of the unmodified model."""
    actions = case.batch.positions(case.batch.action_T)
    assert actions.weight_T is not None
    loss_A, _ = case.loss(stats, actions)
    (loss_A * actions.weight_T).sum().backward(retain_graph=True)
    found = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    plain.zero_grad()
    return found


def gradients(learner: Learner, case: Case) -> dict[str, Tensor]:
    """Return the gradients of a case by the name in transformers' model (collective)."""
    learner.backward(case.batch, case.loss, case.request)
    parts = multimodal(learner.lm)
    found = {
        name if parts is None else parts.whole_name(name): whole(p.grad).clone()
        for name, p in learner.lm.named_parameters()
        if p.grad is not None
    }
    learner.optimizer.zero_grad()
    return found


def gradient_gap(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> tuple[float, str]:
    """Return the largest relative difference of the gradient of a parameter, and its name."""
    total = math.sqrt(sum(float(grad.square().sum()) for grad in theirs.values()))
    found = [(math.inf, "all gradients are 0")] if not total > 0 else []
    for name in ours.keys() | theirs.keys():
        mine, its = (torch.zeros(()) if (grad := grads.get(name)) is None else grad for grads in (ours, theirs))
        gap = float((mine - its).norm()) / max(float(its.norm()), SMALL * total)
        found.append((gap if math.isfinite(gap) else math.inf, name))
    return max(found)


def engine_gaps(learner: Learner, plain: PreTrainedModel) -> dict[str, float]:
    """Return the largest differences of log-probabilities of sampled tokens, and the tokens of the longest response.

    `logp` is between trainer and unmodified model, `engine` between engine and trainer. If one of them is beyond its
    limit, `engine in float64` is between engine and unmodified model, both in float64, where rounding is small.
    """
    requests, completions = sampled(learner.lm)
    batch = pack_tokens(requests)
    trainer_T = learner.stats(batch, StatsRequest(("logp",)), 4096).logp
    found = {
        "logp": float((trainer_T - logp_alone(plain, batch))[is_text(learner.lm, batch)].abs().max()),
        "engine": gap_to_engine(completions, trainer_T, batch),
        "new_tokens": max(len(completion.token_ids) for completion in completions),
    }
    if not max(found["logp"], found["engine"]) <= LIMITS["engine"]:
        for lm in (learner.lm, plain):
            lm.double().set_experts_implementation("eager")  # the others have no float64
        requests, completions = sampled(learner.lm)
        batch = pack_tokens(requests)
        found["engine in float64"] = gap_to_engine(completions, logp_alone(plain, batch), batch)
    return found


def sampled(lm: PreTrainedModel) -> tuple[list[list[int]], list[Completion]]:
    """Return the tokens of each of REQUESTS with its completion by the embedded engine, and the completion."""
    generator = torch.Generator().manual_seed(3)
    prompts = [draw(generator, number).tolist() for number in PROMPTS]

    async def everything() -> list[Completion]:
        engine = EmbeddedEngine(lm, decode=str, max_running_requests=ROWS, memory_share=0.2)
        asked = (engine.generate(prompts[p], Sampling(number, seed=n)) for n, (p, number) in enumerate(REQUESTS))
        done = await asyncio.gather(*asked)
        engine.close()
        return done

    done = asyncio.run(everything())
    return [prompts[p] + one.token_ids for (p, _), one in zip(REQUESTS, done, strict=True)], done


def logp_alone(plain: PreTrainedModel, batch: TokenBatch) -> Tensor:
    with torch.no_grad():
        return stats_alone(plain, batch).logp


def gap_to_engine(completions: list[Completion], logp_T: Tensor, batch: TokenBatch) -> float:
    """Return the largest difference of the engine's log-probabilities from `logp_T`."""
    theirs = logp_T.split(batch.lengths_B.tolist())
    pairs = zip(completions, theirs, strict=True)
    return max(float((torch.tensor(one.logps) - logp[-len(one.logps) :]).abs().max()) for one, logp in pairs)


def is_text(lm: PreTrainedModel, batch: TokenBatch) -> Tensor:
    """Return which positions of `batch` follow text alone, bool [T].

    Multimodal classes may read a token for images that was sampled without an image as another token.
    """
    first = lm.config.vocab_size - (0 if multimodal(lm) is None else len(MARKS))
    parts = batch.token_ids_T.split(batch.lengths_B.tolist())
    return torch.cat([(ids >= first).cumsum(0) == 0 for ids in parts])


def numbers(folder: Path, processes: Processes, sizes: dict[str, int]) -> Results:
    """Return the gaps of a saved model in one layout of the processes; the first process compares (collective)."""
    learner = make_learner(folder, processes, sizes)
    plain, pairs = load_plain(folder, is_packed(learner.lm)), make_pairs()
    stats = stats_alone(plain, pairs)
    found: Results = {"packed": is_packed(learner.lm), "recomputes": learner.config.gradient_checkpointing}
    cases = make_cases(pairs, stats.logp.detach())
    if processes.world_size > 1:  # the others train through the same statistics
        cases = {name: cases[name] for name in ("spo", "dpo")}
    ours = {name: gradients(learner, case) for name, case in cases.items()}
    if processes.is_first:
        for name, case in cases.items():
            gap, parameter = gradient_gap(ours[name], gradients_alone(plain, stats, case))
            found |= {name: gap} | ({f"{name}_parameter": parameter} if gap > LIMITS[name] else {})
    return found if processes.world_size > 1 else found | engine_gaps(learner, plain)
