"""Every layout of the processes gives the numbers of one process alone. Real processes, gloo.

The models have an untied head, a vocabulary that two does not divide, and fewer key/value heads than some layouts have
sequence-parallel processes. The teacher of `opd` and `gkd` has other sizes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pools import Result, assert_same, in_pool, whole
from test_cuts import actor_config, make_batch
from test_cuts import gradients as of_policy
from test_pair_cuts import LOSSES, make_learner, request
from test_pair_cuts import gradients as of_pairs
from test_pair_cuts import make_batch as make_pairs
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3ForSequenceClassification

from RL2.config.model import Teacher
from RL2.parallel.processes import Processes
from RL2.workers.actor import Actor
from RL2.workers.learner import Learner
from RL2.workers.teacher import AveragedTeacher, make_teacher

TOLERANCE = 1e-5
DIFFERENCES = {"rank_jsd": 3e-5}
"""Its gradient is of differences between the log-probabilities of neighbouring ranks, which are nearly equal."""
LAYOUTS: dict[str, tuple[int, dict[str, int]]] = {
    "fsdp 2": (2, {}),
    "replicas 2": (2, {"ddp_size": 2}),
    "tp 2": (2, {"tp_size": 2}),
    "sp 2": (2, {"sp_size": 2}),
    "fsdp 4": (4, {}),
    "hsdp 2x2": (4, {"ddp_size": 2}),
    "fsdp 2 x tp 2": (4, {"tp_size": 2}),
    "fsdp 2 x sp 2": (4, {"sp_size": 2}),
    "tp 2 x sp 2": (4, {"tp_size": 2, "sp_size": 2}),
    "replicas 2 x tp 2": (4, {"ddp_size": 2, "tp_size": 2}),
    "sp 4": (4, {"sp_size": 4}),
}
"""Name -> number of processes, and the sizes that are set."""

OBJECTIVES = ("sft", "spo", "ppo", "rank_jsd", "gspo", "opd", "gkd")
LONG, FEW, TRAINED = ("ppo", "rank_jsd", "gkd"), ("sft", "spo", "opd"), ("spo", "ppo", "gkd")
"""Objectives that are also tried with microbatches of one sequence; with few sequences or few that train; and for steps
of the optimizer. The gradient of each is compared, so that these need no more than a tied and an untied head.
"""
PAIRS = ("rm", "dpo")
OF_FOUR = ("spo", "ppo", "gkd", "dpo")
"""What layouts of four processes are tried with: they combine two layouts of two, which are tried with everything. Of
`gkd` they have the gradient alone."""
STEPS = 3


def cases(size: int) -> tuple[str, ...]:
    """Return the objectives and losses that layouts of so many processes are tried with."""
    return OF_FOUR if size == 4 else (*OBJECTIVES, *PAIRS)


def run_layout(folder: Path, processes: Processes, sizes: dict[str, int]) -> dict[str, Result]:
    """Every case in one layout."""
    results: dict[str, Result] = {}
    tried = cases(processes.world_size)
    mixed = make_batch([float(n % 3 == 0) for n in range(12)])
    # so small that one sequence is longer than what is here of a microbatch, where there is sequence parallelism
    longest = int(mixed.lengths_B.max())
    for objective in (objective for objective in OBJECTIVES if objective in tried):
        tied = objective in ("spo", "gspo")
        config = actor_config("ppo", str(folder / ("tied" if tied else "causal")), **sizes)
        train_on = "correct" if objective in ("spo", "rank_jsd") else "all"
        config = replace(config, objective=objective, train_on=train_on)
        actor = Actor(config, processes, 10, folder)
        if actor.objective.needs_teacher:
            actor.teacher = make_teacher(Teacher(model_name=str(folder / "teacher")), actor, config.temperature)
        results[objective] = of_policy(actor, mixed, 4096)
        if processes.world_size == 4 and actor.objective.needs_teacher:
            continue
        if objective in LONG:
            results[f"{objective}, long"] = of_policy(actor, mixed, -(-longest // config.sp_size))
        if objective in FEW:
            results[f"{objective}, one sequence"] = of_policy(actor, make_batch([1.0]), 4096)
            results[f"{objective}, one correct"] = of_policy(actor, make_batch([0.0] * 5 + [1.0] + [0.0] * 2), 4096)
        stats = actor.stats(mixed, actor.request, 4096)
        results[f"{objective}, statistics"] = {"grads": {n: x.double() for n, x in vars(stats).items()}, "metrics": {}}
        if objective in TRAINED:
            metrics = [actor.update(mixed) for _ in range(STEPS)]
            results[f"{objective}, trained"] = {"grads": weights(actor), "metrics": metrics[-1]}
        if objective == "gkd":  # the average of the policy, at another temperature, which gives it a gradient
            average = AveragedTeacher(Teacher(model_name="ema", ema_decay=0.7, temperature=0.5), actor, 1.0)
            actor.teacher = average
            metrics = [actor.update(mixed) for _ in range(2)]
            found = {name: whole(w) for name, w in average.weights()}
            several = Teacher(models={"a": str(folder / "teacher"), "b": str(folder / "tied")})
            actor.teacher = make_teacher(several, actor, 1.0)
            few = make_batch([1.0] * 4).with_(teacher_B=torch.tensor([0, 1, 1, 1]))
            results["gkd, two teachers"] = of_policy(actor, few, -(-longest // config.sp_size))
            results["gkd, averaged, trained"] = {"grads": found, "metrics": metrics[-1]}
    for loss in (loss for loss in PAIRS if loss in tried):
        learner = make_learner(loss, folder, processes, sizes=sizes)
        pairs = make_pairs(loss, 5)
        results[loss] = of_pairs(learner, loss, pairs)
        results[f"{loss}, one pair"] = of_pairs(learner, loss, make_pairs(loss, 1))
        steps = [learner.step(pairs, LOSSES[loss], request(loss)) for _ in range(STEPS)]
        results[f"{loss}, trained"] = {"grads": weights(learner), "metrics": steps[-1]}
    return results


def weights(learner: Learner) -> dict[str, torch.Tensor]:
    return {name: whole(w) for name, w in learner.weights()}


def run_layouts(folder: Path, processes: Processes) -> dict[str, dict[str, Result]]:
    """All layouts of so many processes."""
    return {
        name: run_layout(folder, processes, sizes)
        for name, (size, sizes) in LAYOUTS.items()
        if size == processes.world_size
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("layouts")
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    make = partial(Qwen3Config, vocab_size=51, intermediate_size=48, head_dim=8, initializer_range=0.2, **shape)
    Qwen3ForCausalLM(make(tie_word_embeddings=False)).save_pretrained(folder / "causal")
    Qwen3ForCausalLM(make(tie_word_embeddings=True)).save_pretrained(folder / "tied")
    # another hidden size, and a padded vocabulary, which other processes hold other parts of
    teacher = {"hidden_size": 24, "vocab_size": 54, "num_hidden_layers": 1, "num_attention_heads": 4}
    Qwen3ForCausalLM(make(**teacher)).save_pretrained(folder / "teacher")
    value = make(num_labels=1, pad_token_id=0)
    Qwen3ForSequenceClassification(value).save_pretrained(folder / "value")
    return folder


@pytest.fixture(scope="module")
def alone(folder: Path, processes: Processes) -> dict[str, Result]:
    return run_layout(folder, processes, {})


@pytest.fixture(scope="module")
def layouts(folder: Path) -> Callable[[str], dict[str, Result]]:
    """The results of a layout; pools of processes start when the first of their layouts is asked for."""
    run = functools.cache(lambda size: in_pool(run_layouts, folder, size)[0])
    return lambda name: run(LAYOUTS[name][0])[name]


@pytest.mark.parametrize(
    ("layout", "case"), [(layout, case) for layout, (size, _) in LAYOUTS.items() for case in cases(size)]
)
def test_a_layout_is_one_process(
    layout: str, case: str, alone: dict[str, Result], layouts: Callable[[str], dict[str, Result]]
) -> None:
    ours = layouts(layout)
    wanted = [name for name in alone if name.split(",")[0] == case]
    if LAYOUTS[layout][0] == 4 and case == "gkd":
        wanted = [case]
    for name in wanted:
        # Adam divides by the root of the second moment: where gradients are tiny, rounding is amplified
        assert_same(alone[name], ours[name], 1e-4 if name.endswith("trained") else DIFFERENCES.get(case, TOLERANCE))
    assert alone[case]["metrics"]["loss"] != 0
    assert any(grad.any() for grad in alone[case]["grads"].values())


def test_a_part_that_is_missing_would_be_seen(alone: dict[str, Any]) -> None:
    """The comparison is not blind: a gradient without one process's part of a norm's is further off than allowed."""
    broken = {**alone["ppo"], "grads": dict(alone["ppo"]["grads"])}
    broken["grads"]["model.layers.0.self_attn.q_norm.weight"] = (
        0.5 * broken["grads"]["model.layers.0.self_attn.q_norm.weight"]
    )
    with pytest.raises(AssertionError, match="q_norm"):
        assert_same(alone["ppo"], broken, TOLERANCE)
