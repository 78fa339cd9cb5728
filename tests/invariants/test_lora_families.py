"""Adapters on experts and mixers: gradients against merged weights in float64, two processes, exports and more."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from pools import Result, assert_same, whole
from safetensors.torch import load_file
from test_cuts import actor_config, gradients, make_batch
from tiny_models import tiny_config, tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from RL2.data.cursor import Cursor
from RL2.io.checkpoint import Checkpoints, load
from RL2.models.lora import adapters_off
from RL2.models.policy import load_model
from RL2.parallel.processes import Processes
from RL2.types import StatsRequest
from RL2.workers.actor import Actor

TOLERANCE = 1e-5
EXPERTS = dict.fromkeys(("qwen3_moe", "mixtral", "olmoe", "glm4_moe", "gpt_oss"), ("all-linear", "all-experts"))
"""The last but one has linear layers beside experts, the last one biases and a transposed layout."""
MIXERS = {
    "lfm2": ("all-linear",),
    "qwen3_5_text": ("all-linear",),
    "mamba2": ("in_proj",),
    "bamba": ("q_proj", "in_proj"),
}
"""Short convolutions, gated delta rules, a recurrence, and one beside attention."""
MODELS = EXPERTS | MIXERS
DISTRIBUTED = ("qwen3_moe", "gpt_oss", "lfm2")
LOGP = StatsRequest(("logp",))
RANK, SCALE = 4, 2


def make_actor(folder: Path, processes: Processes, name: str, **changes: Any) -> Actor:
    """Return an actor with adapters; two updates have changed both factors."""
    config = actor_config("ppo", str(folder / name), **changes)
    lora = replace(config.lora, rank=RANK, alpha=SCALE * RANK, target_modules=MODELS[name])
    torch.manual_seed(0)  # the adapters' first values
    actor = Actor(replace(config, objective="sft", lora=lora), processes, 10, folder)
    for _ in range(2):
        actor.update(make_batch([1.0] * 8))
    return actor


def run_cases(folder: Path, processes: Processes) -> dict[str, Result]:
    results: dict[str, Result] = {}
    for name in DISTRIBUTED:
        actor = make_actor(folder, processes, name)
        results[name] = gradients(actor, make_batch([1.0] * 8), 4096)
        results[f"{name}, one"] = gradients(actor, make_batch([1.0]), 4096)
        results[f"{name}, trained"] = {"metrics": {}, "grads": {n: whole(w) for n, w in actor.weights()}}
    return results


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lora_experts")
    for name in MODELS:
        tiny_model(tiny_config(name)).save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def actors(folder: Path, processes: Processes) -> dict[str, Actor]:
    return {name: make_actor(folder, processes, name) for name in MODELS}


def own_logp(lm: Any) -> Tensor:
    """Return the log-probabilities of a sequence by transformers' own forward."""
    own = make_batch([1.0]).sequences([0])
    logp_TV = lm(input_ids=own.token_ids_T[None]).logits[0].log_softmax(-1)
    return logp_TV.gather(1, own.labels_T[:, None])[own.action_T, 0]


def trained_logp(actor: Actor) -> Tensor:
    own = make_batch([1.0]).sequences([0])
    return actor.stats(own, LOGP, 4096).logp[own.action_T]


def merged(weight: Tensor, A: Tensor, B: Tensor, is_transposed: bool) -> Tensor:
    """Return a weight with its adapter: of one layer, or of E experts."""
    if weight.ndim == 2:
        return weight + SCALE * B @ A
    experts = [B[:, e :: len(weight)] @ A[e * RANK : (e + 1) * RANK] for e in range(len(weight))]
    return weight + SCALE * torch.stack([x.T if is_transposed else x for x in experts])


def base_name(adapter: str) -> str:
    """Return the name of the weight that an adapter changes: the first of two weights of experts is wrapped first."""
    if adapter.endswith("experts.base_layer"):
        return adapter.replace("base_layer", "gate_up_proj")
    return f"{adapter}.{'down_proj' if adapter.endswith('experts') else 'weight'}"


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_merged_weights(name: str, actors: dict[str, Actor], folder: Path) -> None:
    actor = actors[name]
    actor.config = replace(actor.config, tis_coef=0.0)
    lm = AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float64, attn_implementation="eager")
    if name in EXPERTS:
        lm.set_experts_implementation("eager")
    base = {key: x.detach() for key, x in lm.named_parameters()}
    leaves = {
        key: whole(x.detach()).double().requires_grad_() for key, x in actor.lm.named_parameters() if ".lora_" in key
    }
    weights = {}
    for key, A in leaves.items():
        if ".lora_A." in key:
            adapted = base_name(key.partition(".lora_")[0])
            weights[adapted] = merged(base[adapted], A, leaves[key.replace("lora_A", "lora_B")], name == "gpt_oss")
    batch, total = make_batch([1.0] * 5), torch.zeros((), dtype=torch.float64)
    for b in range(batch.num_sequences):
        own = batch.sequences([b])
        inputs = {"input_ids": own.token_ids_T[None]}
        logp_TV = torch.func.functional_call(lm, weights, (), inputs).logits[0].log_softmax(-1)[own.action_T]
        total = total - logp_TV.gather(1, own.labels_T[own.action_T, None]).sum()
        total = total - 0.01 * torch.special.entr(logp_TV.exp()).sum()
    (total / batch.action_T.sum()).backward()
    ours = gradients(actor, batch, 300)["grads"]
    assert ".experts." not in str(base.keys() - weights.keys()) or name == "gpt_oss"  # it has biases of experts
    limit = 10 * TOLERANCE if name == "qwen3_5_text" else TOLERANCE  # its delta rule is in float32, in any model
    for key, leaf in leaves.items():
        assert leaf.grad is not None
        assert (ours[key] - leaf.grad).norm() <= limit * leaf.grad.norm(), key
    assert {key for key, grad in ours.items() if grad.any()} == leaves.keys()


@pytest.mark.parametrize("name", DISTRIBUTED)
def test_two_processes_are_one(name: str, one: dict[str, Result], two: dict[str, Result]) -> None:
    for case in ("", ", one"):
        assert_same(one[name + case], two[name + case], 10 * TOLERANCE)
    # Adam divides by the root of the second moment: where gradients are tiny, rounding is amplified
    assert_same(one[f"{name}, trained"], two[f"{name}, trained"], 1e-3)


def test_recomputation_changes_nothing(folder: Path, processes: Processes, one: dict[str, Result]) -> None:
    actor = make_actor(folder, processes, "qwen3_moe", gradient_checkpointing=False)
    assert_same(one["qwen3_moe"], gradients(actor, make_batch([1.0] * 8), 4096), 10 * TOLERANCE)


@pytest.mark.parametrize("name", MODELS)
def test_what_an_engine_gets_is_what_trains(name: str, actors: dict[str, Actor], folder: Path) -> None:
    lm = load_model(str(folder / name), torch.float32)
    lm.set_attn_implementation("eager")  # its own forward, without packed attention
    before = {key: x.clone() for key, x in lm.state_dict().items()}
    sent = dict(actors[name].weights())
    assert sent.keys() <= before.keys()
    assert all(not torch.equal(x, before[key]) for key, x in sent.items() if ".experts." in key and x.ndim == 3)
    lm.load_state_dict(sent, strict=False)
    actor = actors[name]
    torch.testing.assert_close(trained_logp(actor), own_logp(lm), atol=1e-5, rtol=0)
    lm.load_state_dict(before)
    with adapters_off(actor.lm):  # as for the reference
        torch.testing.assert_close(trained_logp(actor), own_logp(lm), atol=1e-5, rtol=0)
    assert (trained_logp(actor) - own_logp(lm)).abs().max() > 1e-3


@pytest.mark.parametrize("save", ["merged", "adapter"])
@pytest.mark.parametrize("name", MODELS)
def test_what_is_saved_loads_elsewhere_with_equal_outputs(
    save: str, name: str, actors: dict[str, Actor], folder: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    actor = actors[name]
    actor.config = replace(actor.config, lora=replace(actor.config.lora, save=save))
    actor.export(tokenizer, tmp_path)
    if save == "merged":
        lm = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert load_file(tmp_path / "model.safetensors").keys() == load_file(folder / name / "model.safetensors").keys()
    else:
        lm = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / name), tmp_path)
    torch.testing.assert_close(trained_logp(actor), own_logp(lm), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", DISTRIBUTED)
def test_half_precision_keeps_float32_adapters(name: str, folder: Path, processes: Processes) -> None:
    actor, whole_precision = (make_actor(folder, processes, name, dtype=dtype) for dtype in ("bfloat16", "float32"))
    dtypes = {(".lora_" in key, parameter.dtype) for key, parameter in actor.lm.named_parameters()}
    assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}
    loss = whole_precision.update(make_batch([1.0] * 8))["actor/loss"]
    assert actor.update(make_batch([1.0] * 8))["actor/loss"] == pytest.approx(loss, rel=0.02)


def test_a_checkpoint_holds_the_adapters(folder: Path, processes: Processes, tmp_path: Path) -> None:
    actor = make_actor(folder, processes, "olmoe")
    before = trained_logp(actor)
    checkpoints = Checkpoints(tmp_path, processes)
    checkpoints.save(2, actor, Cursor(24, 4, seed=0))
    checkpoints.finish()
    actor.update(make_batch([1.0] * 8))
    assert not torch.equal(trained_logp(actor), before)
    assert load(tmp_path / "step_000002", actor, Cursor(24, 4, seed=0), processes) == 2
    assert torch.equal(trained_logp(actor), before)
