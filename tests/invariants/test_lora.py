"""Adapters: gradients against peft in float64, any number of processes, what engines and files get of them."""

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
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM

from RL2.config.load import load
from RL2.errors import ConfigError
from RL2.models.policy import load_model
from RL2.parallel.processes import Processes
from RL2.types import StatsRequest
from RL2.workers.actor import Actor, AdapterFreeReference, RefActor

TOLERANCE = 1e-5
LAYOUTS: dict[str, dict[str, int]] = {"fsdp 2": {}, "sp 2": {"sp_size": 2}, "replicas 2": {"ddp_size": 2}}
LOGP = StatsRequest(("logp",))


def make_actor(folder: Path, processes: Processes, objective: str = "sft", **changes: Any) -> Actor:
    """With adapters that are more than their first value, which would be no adapter at all."""
    config = actor_config("ppo", str(folder / "model"), **changes)
    lora = replace(config.lora, rank=4, alpha=8, target_modules=("q_proj", "v_proj", "down_proj"))
    actor = Actor(replace(config, objective=objective, lora=lora), processes, 10, folder)
    for _ in range(2):
        actor.update(make_batch([1.0] * 8))
    return actor


def run_cases(folder: Path, processes: Processes) -> dict[str, dict[str, Result]]:
    results: dict[str, dict[str, Result]] = {}
    layouts = LAYOUTS if processes.world_size > 1 else {"alone": {}}
    for name, sizes in layouts.items():
        torch.manual_seed(0)  # the adapters' first values
        actor = make_actor(folder, processes, "spo", train_on="correct", **sizes)
        batch = make_batch([float(n % 3 == 0) for n in range(12)])
        results[name] = {
            "one step": gradients(actor, batch, 4096),
            "one correct": gradients(actor, make_batch([1.0] + [0.0] * 7), 4096),
            "trained": {"metrics": {}, "grads": {n: whole(w) for n, w in actor.weights()}},
            "base": {"metrics": {}, "grads": {"logp": base(folder, actor).logp(batch)}},
        }
    return results


def base(folder: Path, actor: Actor) -> AdapterFreeReference:
    config = load("ppo", settings(folder)).ref_actor
    return AdapterFreeReference(config, actor)


def settings(folder: Path) -> list[str]:
    return f"""actor.model_name={folder}/model actor.max_length_per_device=4096 train_data.path=x.jsonl
        train_data.prompts_per_rollout=2 rollout.env_path=x.py rollout.train_sampling_params.max_new_tokens=1
        trainer.experiment_name=x""".split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lora")
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = Qwen3Config(
        vocab_size=50, intermediate_size=48, head_dim=8, tie_word_embeddings=True, initializer_range=0.2, **shape
    )
    Qwen3ForCausalLM(config).save_pretrained(folder / "model")
    return folder


@pytest.fixture(scope="module")
def alone(folder: Path, processes: Processes) -> dict[str, Result]:
    return run_cases(folder, processes)["alone"]


@pytest.fixture(scope="module")
def actor(folder: Path, processes: Processes) -> Actor:
    return make_actor(folder, processes)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_processes_are_one(layout: str, alone: dict[str, Result], two: dict[str, dict[str, Result]]) -> None:
    for name, result in alone.items():
        # Adam divides by the root of the second moment: where gradients are tiny, rounding is amplified
        assert_same(result, two[layout][name], 1e-4 if name in ("trained", "one correct") else 10 * TOLERANCE)


def test_only_adapters_train(alone: dict[str, Result], folder: Path) -> None:
    moved = {name for name, grad in alone["one step"]["grads"].items() if grad.any()}
    assert moved == {name for name in alone["one step"]["grads"] if ".lora_" in name}
    before, after = load_file(folder / "model" / "model.safetensors"), alone["trained"]["grads"]
    changed = {name.rsplit(".", 2)[1] for name, weight in before.items() if not torch.equal(weight, after[name])}
    assert changed == {"q_proj", "v_proj", "down_proj"}


def test_gradients_are_those_of_peft(actor: Actor, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    actor.config = replace(actor.config, lora=replace(actor.config.lora, save="adapter"))
    actor.export(tokenizer, folder / "adapter")
    lm = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float64)
    theirs = PeftModel.from_pretrained(lm, folder / "adapter", is_trainable=True).double()
    batch = make_batch([1.0] * 5)
    total = torch.zeros((), dtype=torch.float64)
    for b in range(batch.num_sequences):
        own = batch.sequences([b])
        logp_TV = theirs(input_ids=own.token_ids_T[None]).logits[0].log_softmax(-1)
        total = total - logp_TV.gather(1, own.labels_T[:, None])[own.action_T].sum()
        total = total - 0.01 * torch.special.entr(logp_TV[own.action_T].exp()).sum()
    (total / batch.action_T.sum()).backward()
    actor.config = replace(actor.config, tis_coef=0.0)
    ours = gradients(actor, batch, 300)["grads"]
    compared = 0
    for name, parameter in theirs.named_parameters():
        if parameter.grad is not None:
            grad = ours[name.removeprefix("base_model.model.")]
            assert (grad - parameter.grad).norm() <= TOLERANCE * parameter.grad.norm(), name
            compared += 1
    assert compared == 2 * 3 * 2  # A and B of three layers in two blocks


def test_the_base_is_the_reference_and_the_adapters_come_back(actor: Actor, folder: Path, processes: Processes) -> None:
    batch = make_batch([1.0] * 8)
    configs = load("ppo", settings(folder))
    with_adapters = actor.stats(batch, LOGP, 4096).logp
    of_a_model_of_its_own = RefActor(configs.ref_actor, configs.actor, actor.mesh, processes).logp(batch)
    assert torch.equal(base(folder, actor).logp(batch), of_a_model_of_its_own)
    assert torch.equal(actor.stats(batch, LOGP, 4096).logp, with_adapters)
    assert (with_adapters - of_a_model_of_its_own).abs().max() > 1e-3


def test_what_an_engine_gets_is_what_trains(actor: Actor, folder: Path, tmp_path: Path) -> None:
    lm = load_model(str(folder / "model"), torch.float32)
    lm.load_state_dict(dict(actor.weights()), strict=False)
    lm.save_pretrained(tmp_path / "served")
    served = AutoModelForCausalLM.from_pretrained(tmp_path / "served")
    own = make_batch([1.0]).sequences([0])
    logp_T = served(input_ids=own.token_ids_T[None]).logits[0].log_softmax(-1).gather(1, own.labels_T[:, None])[:, 0]
    torch.testing.assert_close(actor.stats(own, LOGP, 4096).logp[own.action_T], logp_T[own.action_T], atol=1e-5, rtol=0)


@pytest.mark.parametrize("save", ["merged", "adapter"])
def test_what_is_saved_loads_elsewhere_with_equal_outputs(
    save: str, actor: Actor, folder: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    actor.config = replace(actor.config, lora=replace(actor.config.lora, save=save))
    actor.export(tokenizer, tmp_path)
    if save == "merged":
        lm = AutoModelForCausalLM.from_pretrained(tmp_path)
    else:
        assert not (tmp_path / "model.safetensors").exists()
        lm = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "model"), tmp_path)
    own = make_batch([1.0]).sequences([0])
    logp_T = lm(input_ids=own.token_ids_T[None]).logits[0].log_softmax(-1).gather(1, own.labels_T[:, None])[:, 0]
    torch.testing.assert_close(actor.stats(own, LOGP, 4096).logp[own.action_T], logp_T[own.action_T], atol=1e-5, rtol=0)


def test_half_precision_keeps_float32_adapters(folder: Path, processes: Processes) -> None:
    actor = make_actor(folder, processes, dtype="bfloat16")
    dtypes = {(".lora_" in name, parameter.dtype) for name, parameter in actor.lm.named_parameters()}
    assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}
    whole_precision = make_actor(folder, processes)
    batch = make_batch([1.0] * 8)
    assert actor.update(batch)["actor/loss"] == pytest.approx(whole_precision.update(batch)["actor/loss"], rel=0.02)


def test_a_layer_that_is_not_there(folder: Path, processes: Processes) -> None:
    config = actor_config("ppo", str(folder / "model"))
    config = replace(config, lora=replace(config.lora, rank=4, target_modules=("q_proj", "c_attn")))
    with pytest.raises(ConfigError, match=r"^actor.lora.target_modules has c_attn, but the linear layers of Qwen3"):
        Actor(config, processes, 10, folder)
