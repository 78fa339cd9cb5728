"""Results do not depend on how the work is cut: microbatches, packing order, processes. Real processes, gloo.

The cases run once in this process and once in a pool of two; each test reads what it needs from both.
"""

from __future__ import annotations

import math
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pools import Result, assert_same, loaded, whole
from safetensors.torch import load_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from RL2.batch.advantages import reinforce
from RL2.batch.packing import loss_weights, microbatches, pack
from RL2.config.model import Actor as ActorConfig
from RL2.models.policy import named_weights
from RL2.parallel.processes import Processes
from RL2.types import Sequence, StatsRequest, TokenBatch, Trajectory
from RL2.workers.actor import Actor
from RL2.workers.worker import InvariantError

TOLERANCE = 1e-6
PROGRAMS = ("sft", "spo", "spo_0p5", "ppo")


def actor_config(program: str, model: str, **changes: Any) -> ActorConfig:
    overrides = f"""actor.model_name={model} actor.max_length_per_device=4096 actor.lr=1e-3 actor.warmup_ratio=0
        actor.entropy.coef=0.01 train_data.path=x.jsonl train_data.prompts_per_rollout=2 rollout.env_path=x.py
        rollout.train_sampling_params.max_new_tokens=1 trainer.experiment_name=x"""
    name = "ppo" if program == "sft" else program
    return replace(loaded(name, overrides).actor, objective=program, tis_coef=2.0, **changes)


def make_batch(rewards: list[float]) -> TokenBatch:
    """Ragged sequences, four of a group with one prompt, some of several turns; made-up engine log-probabilities."""
    draw = random.Random(0)
    trajectories: list[Trajectory] = []
    for n, reward in enumerate(rewards):
        if n % 4 == 0:
            start = [draw.randrange(50) for _ in range(draw.randint(1, 20))]
        prompt, response = len(start), draw.randint(1, 40)
        mask = [False] * prompt + [True] * response
        if response > 20:
            mask[prompt + 5 : prompt + 9] = [False] * 4  # an observation
        ids = start + [draw.randrange(50) for _ in range(response)]
        values = [0.0] * (len(mask) - 1) + [reward]
        sequence = Sequence(ids, mask, [draw.uniform(-5, 0) if a else 0.0 for a in mask], values)
        trajectories.append(Trajectory(row=n, group=n // 4, sample=n % 4, sequences=[sequence]))
    batch = pack(trajectories)
    return batch.with_(advantage_T=reinforce(batch, global_norm=False, norm_var=False))


def mixed() -> TokenBatch:
    return make_batch([float(n % 3 == 0) for n in range(24)])


def gradients(actor: Actor, batch: TokenBatch, max_tokens: int) -> Result:
    """Loss, metrics and whole gradients of one minibatch cut into microbatches of `max_tokens`."""
    actor.config = replace(actor.config, max_length_per_device=max_tokens)
    weight_T = loss_weights(
        batch,
        train_on=actor.config.train_on,
        level=actor.config.avg_level,
        average_over=actor.config.average_over,
    )
    metrics = actor.backward(batch.with_(weight_T=weight_T), actor.loss, actor.request)
    grads = {
        name: whole(p.grad) if p.grad is not None else torch.zeros(p.shape) for name, p in actor.lm.named_parameters()
    }
    actor.optimizer.zero_grad()
    return {"metrics": metrics, "grads": grads}


def stopped(actor: Actor, batch: TokenBatch, processes: Processes) -> Result:
    """What is said on every process when a law is broken, and how many weights moved nevertheless."""
    before, said = {name: whole(w) for name, w in actor.weights()}, {}
    for what in ("engine", "statistics"):
        if what == "engine":  # the engine's numbers are made up, so it is far from the trainer
            actor.max_logprob_gap = 0.1
        else:
            actor.max_logprob_gap = math.inf
            torch.nn.init.constant_(actor.lm.model.norm.weight, math.nan)
            before["model.norm.weight"].fill_(math.nan)
        try:
            actor.update(batch)
        except InvariantError as error:
            said[what] = str(error)
        actor.optimizer.zero_grad()
    moved = sum(int((whole(w).nan_to_num() != before[n].nan_to_num()).sum()) for n, w in actor.weights())
    return {"messages": processes.gather([said]), "moved": moved, "step": actor.steps}


def run_cases(folder: Path, processes: Processes) -> dict[str, Result]:
    """Every case on these processes."""
    model, batch = str(folder / "model"), mixed()
    longest = int(batch.lengths_B.max())
    results: dict[str, Result] = {}
    for program in PROGRAMS:
        actor = Actor(actor_config(program, model), processes, 10, folder)
        results[program] = gradients(actor, batch, 4096)
        results[f"{program} cut"] = gradients(actor, batch, 3 * longest)
        if program == "spo":
            results["one correct"] = gradients(actor, make_batch([1.0] + [0.0] * 7), 4096)
            results["none correct"] = gradients(actor, make_batch([0.0] * 8), 4096)
            results["few sequences"] = gradients(actor, make_batch([1.0]), 4096)
            stats = actor.stats(batch, StatsRequest(("logp", "entropy"), temperature=0.7), 2 * longest)
            results["stats"] = {"grads": {"logp": stats.logp, "entropy": stats.entropy}, "metrics": {}}
            half = Actor(actor_config(program, model, dtype="bfloat16"), processes, 10, folder)
            half.stats(batch, StatsRequest(("logp",)), 4096)
            results["after statistics"] = {"grads": {n: whole(w) for n, w in named_weights(half.lm)}, "metrics": {}}
            replicas = Actor(actor_config(program, model, ddp_size=processes.world_size), processes, 10, folder)
            results["replicas"] = gradients(replicas, batch, 4096)
            for _ in range(3):
                actor.update(batch)
            results["after 3 steps"] = {"grads": {n: whole(w) for n, w in actor.weights()}, "metrics": {}}
            results["stopped"] = stopped(actor, batch, processes)
    return results


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("invariants")
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = Qwen3Config(
        vocab_size=50, intermediate_size=48, head_dim=8, tie_word_embeddings=True, initializer_range=0.2, **shape
    )
    Qwen3ForCausalLM(config).save_pretrained(folder / "model")
    return folder


@pytest.mark.parametrize("program", PROGRAMS)
def test_two_processes_are_one(program: str, one: dict[str, Result], two: dict[str, Result]) -> None:
    assert one[program]["metrics"]["loss"] != 0
    assert_same(one[program], two[program], TOLERANCE)
    assert_same(one[program], two[f"{program} cut"], TOLERANCE)


@pytest.mark.parametrize("number", [2, 5])
@pytest.mark.parametrize("program", PROGRAMS)
def test_microbatches_are_one_batch(
    program: str, number: int, one: dict[str, Result], folder: Path, processes: Processes
) -> None:
    batch = mixed()
    actor = Actor(actor_config(program, str(folder / "model")), processes, 10, folder)
    actor.check_packing(batch)  # which takes forwards of its own, once
    counted: list[int] = []
    whole_step = actor.policy.forward

    def counting(*args: Any, **kwargs: Any) -> Any:
        counted.append(1)
        return whole_step(*args, **kwargs)

    actor.policy.forward = counting  # type: ignore[method-assign]
    weights = loss_weights(batch, train_on=actor.config.train_on, level="token", average_over="all")
    trained = batch.sequence_T[weights != 0].unique().tolist()
    limit = next(m for m in range(4096, 0, -1) if len(microbatches(batch, trained, m, 1)[0]) == number)
    result = gradients(actor, batch, limit)
    assert len(counted) == number
    assert_same(one[program], result, TOLERANCE)


@pytest.mark.parametrize("program", PROGRAMS)
def test_packing_order_does_not_matter(
    program: str, one: dict[str, Result], folder: Path, processes: Processes
) -> None:
    batch = mixed()
    order = list(range(batch.num_sequences))
    random.Random(1).shuffle(order)
    actor = Actor(actor_config(program, str(folder / "model")), processes, 10, folder)
    assert_same(one[program], gradients(actor, batch.sequences(order), 4096), TOLERANCE)


def test_replicas_are_shards(one: dict[str, Result], two: dict[str, Result]) -> None:
    assert_same(one["spo"], two["replicas"], TOLERANCE)


def test_a_rank_without_a_correct_sequence(one: dict[str, Result], two: dict[str, Result]) -> None:
    assert_same(one["one correct"], two["one correct"], TOLERANCE)
    assert_same(one["few sequences"], two["few sequences"], TOLERANCE)


def test_no_correct_sequence_is_a_step_of_zero(one: dict[str, Result], two: dict[str, Result]) -> None:
    for results in (one, two):
        assert results["none correct"]["metrics"]["loss"] == 0
        assert not any(grad.any() for grad in results["none correct"]["grads"].values())


def test_statistics_come_back_in_place(one: dict[str, Result], two: dict[str, Result]) -> None:
    assert_same(one["stats"], two["stats"], TOLERANCE)
    batch = mixed()
    logp_T = one["stats"]["grads"]["logp"]
    assert not logp_T[~batch.action_T].any()
    assert (logp_T[batch.action_T] < 0).all()


def test_weights_are_whole_after_statistics(one: dict[str, Result], two: dict[str, Result], folder: Path) -> None:
    """Computing in bfloat16 must not leave its rounded copies behind as the weights."""
    lm = Qwen3ForCausalLM.from_pretrained(folder / "model")
    for results in (one, two):
        for name, weight in results["after statistics"]["grads"].items():
            assert torch.equal(weight, lm.get_parameter(name)), name


def test_weights_after_three_steps(one: dict[str, Result], two: dict[str, Result]) -> None:
    # Adam divides by the root of the second moment: where gradients are tiny, rounding is amplified
    assert_same(one["after 3 steps"], two["after 3 steps"], tolerance=1e-4)


def test_a_broken_law_stops_every_process_before_the_step(
    one: dict[str, Result], two: dict[str, Result], folder: Path
) -> None:
    for results, size in ((one, 1), (two, 2)):
        result = results["stopped"]
        step = result["step"]
        assert result["moved"] == 0
        assert len(result["messages"]) == size
        assert all(said == result["messages"][0] for said in result["messages"])
        saved = f"the step was not taken, and its batch is in {folder}/broken_law_step_{step}.safetensors"
        engine, statistics = result["messages"][0]["engine"], result["messages"][0]["statistics"]
        assert re.match(
            rf"optimizer step {step}: trainer and engine are [0-9.]+ nats apart on average, more than "
            r"trainer.max_logprob_gap=0.1: the largest is [0-9.]+ at action \d+ \(token \d+\) of sequence \d+; ",
            engine,
        )
        law = r"-inf < logp <= 0 does not hold: nan at action 0 \(token (\d+)\) of sequence (\d+); "
        where = re.search(law, statistics)
        assert where is not None
        token, own = int(where[1]), mixed().sequences([int(where[2])])
        assert token == int(own.labels_T[own.action_T][0])
        assert engine.endswith(saved) and statistics.endswith(saved)
    batch = load_file(folder / f"broken_law_step_{one['stopped']['step']}.safetensors")
    assert batch["token_ids_T"].shape == mixed().token_ids_T.shape


def test_the_loss_is_the_sum_over_tokens(one: dict[str, Result], folder: Path) -> None:
    """Thesis 3.1 by hand: a mean over each correct sequence's tokens, divided by the number of all sequences."""
    lm = Qwen3ForCausalLM.from_pretrained(folder / "model").double().eval()
    batch = mixed()
    total = torch.zeros((), dtype=torch.float64)
    for b in range(batch.num_sequences):
        own = batch.sequences([b])
        if own.reward_T.sum() <= 0:
            continue
        logits_TV = lm(input_ids=own.token_ids_T[None]).logits[0][own.action_T]
        labels_T = own.labels_T[own.action_T]
        p_TV = logits_TV.double().softmax(-1)
        p_a, p_m = p_TV.gather(1, labels_T[:, None])[:, 0], p_TV.max(-1).values
        kl_T = p_m * (p_m / p_a).log() + (1 - p_m) * ((1 - p_m) / (1 - p_a)).log()
        entropy_T = -(p_TV * p_TV.log()).sum(-1)
        assert own.engine_logp_T is not None
        tis_T = (p_a.log() - own.engine_logp_T[own.action_T]).exp().clamp(max=2.0)
        total += (kl_T * tis_T - 0.01 * entropy_T).mean().detach() / batch.num_sequences
    assert one["spo"]["metrics"]["loss"] == pytest.approx(total.item(), rel=1e-4)


def test_bfloat16_trains_float32_weights(folder: Path, processes: Processes) -> None:
    """Updates of 1e-6 are far below bfloat16's resolution at the weights' size, and must not be lost."""
    batch = mixed()
    config = actor_config("ppo", str(folder / "model"), dtype="bfloat16", lr=1e-6, weight_decay=0.0)
    half, whole_precision = (
        Actor(config, processes, 10, folder),
        Actor(replace(config, dtype="float32"), processes, 10, folder),
    )
    before = {name: whole(w) for name, w in named_weights(half.lm)}
    metrics, exact = half.update(batch), whole_precision.update(batch)
    assert metrics["actor/entropy"] == pytest.approx(exact["actor/entropy"], rel=0.02)
    assert metrics["actor/entropy"] != exact["actor/entropy"]
    after = {name: whole(w) for name, w in named_weights(half.lm)}
    assert {w.dtype for w in after.values()} == {torch.float32}
    changed = sum(int((after[n] != before[n]).sum()) for n in before) / sum(w.numel() for w in before.values())
    assert changed > 0.95
    assert max((after[n] - before[n]).abs().max().item() for n in before) < 2e-6
