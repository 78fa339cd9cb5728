"""Preferences do not depend on how the work is cut either: pairs and single responses on one process and on two."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pools import Result, assert_same, loaded, whole
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3ForSequenceClassification

from RL2.batch.packing import microbatches, nll_factors, sequence_weights
from RL2.config.programs import trained
from RL2.data.table import Ragged
from RL2.models.policy import Policy, named_weights
from RL2.models.value import VALUE, ValueModel
from RL2.objectives.preference import bradley_terry, dpo, ipo
from RL2.objectives.reference_free import orpo
from RL2.objectives.unpaired import kto
from RL2.parallel.processes import Processes
from RL2.trainer.dpo_loop import log_ratios
from RL2.trainer.supervised import Rows
from RL2.types import StatsRequest, TokenBatch
from RL2.workers.learner import Learner

TOLERANCE = 5e-6  # a margin is a difference of sums of log-probabilities, which costs a digit
LOSSES: dict[str, Any] = {
    "rm": bradley_terry,
    "dpo": partial(dpo, beta=0.3, label_smoothing=0.1),
    "ipo": partial(ipo, beta=0.3),
    "orpo": partial(orpo, beta=0.3),
    "kto": partial(kto, beta=0.3, undesirable_weight=0.7),
}
PAIRED = [loss for loss in LOSSES if loss != "kto"]

OVERRIDES = """actor.model_name={} actor.max_length_per_device=4096 actor.lr=1e-3 data.path=x.jsonl data.max_length=99
    data.batch_size=1 trainer.experiment_name=x"""


def make_batch(loss: str, number: int) -> TokenBatch:
    """Ragged pairs that begin alike, with made-up log-probabilities of a reference; for KTO their responses alone."""
    draw = random.Random(0)
    sides: list[tuple[list[int], list[bool]]] = []
    for _ in range(number):
        prompt = [draw.randrange(50) for _ in range(draw.randint(1, 20))]
        responses = [[draw.randrange(50) for _ in range(draw.randint(1, 40))] for _ in range(2)]
        sides += [(prompt + r, [False] * len(prompt) + [True] * len(r)) for r in responses]
    ids, trains = (
        Ragged.from_rows([ids for ids, _ in sides], np.int32),
        Ragged.from_rows([mask for _, mask in sides], np.bool_),
    )
    if loss == "kto":
        batch = Rows(ids, trains, per_row=1, good=np.arange(2 * number) % 3 > 0).draw(range(2 * number))
        batch = batch.with_(baseline_T=torch.full_like(batch.reward_T, 0.5))
    else:
        batch = Rows(ids, trains, per_row=2, scored=loss == "rm").draw(range(number))
    g = torch.Generator().manual_seed(0)
    ref_T = -5 * torch.rand(len(batch.labels_T), generator=g) * batch.action_T
    return batch.with_(weight_T=sequence_weights(batch), ref_logp_T=ref_T, nll_factor_T=nll_factors(batch))


def make_learner(
    loss: str, folder: Path, processes: Processes, dtype: str = "float32", sizes: dict[str, int] | None = None
) -> Learner:
    program = "rm" if loss == "rm" else "dpo"
    overrides = OVERRIDES.format(f"{folder}/{'value' if loss == 'rm' else 'causal'}")
    group, config = trained(loaded(program, overrides.replace("actor", "critic" if loss == "rm" else "actor")))
    config = replace(config, dtype=dtype, **(sizes or {}))
    return Learner(config, processes, 10, folder, group, ValueModel if loss == "rm" else Policy)


def request(loss: str) -> StatsRequest:
    return VALUE if loss == "rm" else StatsRequest(("logp",))


def gradients(learner: Learner, loss: str, batch: TokenBatch, max_tokens: int = 4096) -> Result:
    """Loss, metrics and whole gradients of one minibatch cut into microbatches of `max_tokens`."""
    learner.config = replace(learner.config, max_length_per_device=max_tokens)
    metrics = learner.backward(batch, LOSSES[loss], request(loss))
    grads = {
        name: whole(p.grad) if p.grad is not None else torch.zeros(p.shape) for name, p in learner.lm.named_parameters()
    }
    learner.optimizer.zero_grad()
    return {"metrics": metrics, "grads": grads}


def run_cases(folder: Path, processes: Processes) -> dict[str, Result]:
    """Every case on these processes."""
    results: dict[str, Result] = {}
    for loss in LOSSES:
        learner, batch = make_learner(loss, folder, processes), make_batch(loss, 9)
        results[loss] = gradients(learner, loss, batch)
        results[f"{loss} cut"] = gradients(learner, loss, batch, max_tokens=130)
        # with two processes one has no pair at all
        results[f"{loss} alone"] = gradients(learner, loss, make_batch(loss, 1))
        results[f"{loss} measured"] = {"metrics": learner.measure(batch, LOSSES[loss], request(loss)), "grads": {}}
        if loss == "kto":  # what its baseline and that of BCO are means of
            h_B = log_ratios(learner, loaded("dpo", OVERRIDES.format(f"{folder}/causal")), batch)
            results["baseline"] = {"metrics": {"z": float(h_B.mean())}, "grads": {"h": h_B}}
        for _ in range(3):
            learner.step(batch, LOSSES[loss], request(loss))
        results[f"{loss} after 3 steps"] = {"grads": {n: whole(w) for n, w in learner.weights()}, "metrics": {}}
    return results


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = Qwen3Config(
        vocab_size=50, intermediate_size=48, head_dim=8, initializer_range=0.2, pad_token_id=0, num_labels=1, **shape
    )
    Qwen3ForCausalLM(config).save_pretrained(folder / "causal")
    Qwen3ForSequenceClassification(config).save_pretrained(folder / "value")
    return folder


@pytest.mark.parametrize("loss", LOSSES)
def test_two_processes_are_one(loss: str, one: dict[str, Result], two: dict[str, Result]) -> None:
    assert one[loss]["metrics"]["loss"] > 0
    assert one[loss]["metrics"]["tokens"] == 18
    for case in ("", " cut", " alone", " measured"):
        assert_same(one[f"{loss}{case}"], two[f"{loss}{case}"], TOLERANCE)
    assert_same(one[loss], two[f"{loss} cut"], TOLERANCE)
    # Adam divides by the root of the second moment: where gradients are tiny, rounding is amplified
    assert_same(one[f"{loss} after 3 steps"], two[f"{loss} after 3 steps"], tolerance=1e-4)


def test_the_baseline_of_a_step_is_the_same_on_two_processes(one: dict[str, Result], two: dict[str, Result]) -> None:
    assert_same(one["baseline"], two["baseline"], TOLERANCE)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_measure_is_the_loss_of_a_step(loss: str, one: dict[str, Result]) -> None:
    assert_same(one[f"{loss} measured"], {**one[loss], "grads": {}}, TOLERANCE)
    assert "accuracy" in one[f"{loss} measured"]["metrics"]


@pytest.mark.parametrize("loss", PAIRED)
def test_microbatches_hold_whole_pairs_and_are_one_batch(
    loss: str, one: dict[str, Result], folder: Path, processes: Processes
) -> None:
    batch = make_batch(loss, 9)
    cuts = microbatches(batch, range(18), 130, 1)[0]
    assert len(cuts) > 3
    for ids in cuts:
        assert [b % 2 for b in ids] == [0, 1] * (len(ids) // 2)
    assert_same(one[loss], one[f"{loss} cut"], TOLERANCE)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_order_of_sequences_does_not_matter(
    loss: str, one: dict[str, Result], folder: Path, processes: Processes
) -> None:
    order = list(range(18))
    random.Random(1).shuffle(order)
    learner = make_learner(loss, folder, processes)
    assert_same(one[loss], gradients(learner, loss, make_batch(loss, 9).sequences(order)), TOLERANCE)


@pytest.mark.parametrize("loss", LOSSES)
def test_bfloat16_trains_float32_weights(loss: str, one: dict[str, Result], folder: Path, processes: Processes) -> None:
    half = make_learner(loss, folder, processes, "bfloat16")
    batch = make_batch(loss, 9)
    metrics = half.step(batch, LOSSES[loss], request(loss))
    assert metrics["loss"] == pytest.approx(one[loss]["metrics"]["loss"], rel=0.1)
    assert metrics["loss"] != one[loss]["metrics"]["loss"]
    assert {w.dtype for _, w in named_weights(half.lm)} == {torch.float32}
    if loss == "rm":  # values are not rounded to the steps of bfloat16
        values = half.stats(batch, VALUE, 4096).value[batch.action_T]
        assert (values != values.bfloat16().float()).float().mean() > 0.8
