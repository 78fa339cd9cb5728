"""Models that run row by row: their reason, what they do to logits, their checkpoints, and what stops them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_config, tiny_model
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from RL2.batch.packing import pack_tokens
from RL2.config.load import load
from RL2.config.programs import trained
from RL2.engines.make import served_layout
from RL2.errors import ConfigError
from RL2.models.inspection import logit_transform, own_forward_line, runs_packed
from RL2.models.packed import PackedModel
from RL2.models.policy import Policy, export, named_weights
from RL2.models.value import VALUE, ValueModel
from RL2.ops.token_stats import LogitTransform
from RL2.parallel.mesh import Mesh
from RL2.parallel.processes import Processes
from RL2.types import StatsRequest, TokenBatch
from RL2.workers.learner import Learner
from RL2.workers.worker import InvariantError, Worker


def saved(folder: Path, model_type: str) -> Path:
    tiny_model(tiny_config(model_type)).save_pretrained(folder)
    return folder


def batch_of(lengths: list[int]) -> TokenBatch:
    generator = torch.Generator().manual_seed(0)
    return pack_tokens([torch.randint(4, 300, (length,), generator=generator).tolist() for length in lengths])


def worker(folder: Path, processes: Processes, kind: type[PackedModel] = Policy) -> Worker:
    overrides = f"""data.path=x.jsonl data.max_length=99 data.batch_size=1 actor.model_name={folder}
        actor.max_length_per_device=4096 trainer.experiment_name=x"""
    _, config = trained(load("sft", overrides.split()))
    return Worker(str(folder), "float32", Mesh.make(processes, config), processes, "actor", kind)


def test_the_reason_continues_the_name_of_the_model(tmp_path: Path) -> None:
    lm = Policy.build(str(saved(tmp_path, "lfm2")))
    why = "mixes tokens outside attention (convolution in Lfm2ForCausalLM.model.layers.0.conv)"
    assert runs_packed(lm) == why
    assert own_forward_line(lm) == f"lfm2 runs row by row through its own forward (slower): it {why}"
    packed = Policy.build(str(saved(tmp_path / "packed", "qwen3")))
    assert runs_packed(packed) is None
    assert own_forward_line(packed) is None


@pytest.mark.parametrize(
    ("model_type", "settings", "wanted"),
    [
        ("gemma2", {"final_logit_softcapping": 7.0}, LogitTransform(softcap=7.0)),
        ("cohere2", {"logit_scale": 0.125}, LogitTransform(scale=0.125)),
        ("granitemoe", {"logits_scaling": 4.0}, LogitTransform(scale=0.25)),
        ("gpt2", {}, LogitTransform()),
        ("qwen3_next", {}, LogitTransform()),
    ],
)
def test_the_change_after_the_head_is_measured(
    model_type: str, settings: dict[str, float], wanted: LogitTransform
) -> None:
    lm = tiny_model(tiny_config(model_type, settings))
    assert logit_transform(lm) == wanted
    assert all(p.device.type == "cpu" for p in lm.parameters()), "the model itself is left as it is"


@pytest.mark.parametrize("model_type", ["cpmant", "xlnet"])
def test_the_first_batch_stops_a_model_that_sees_later_tokens(
    model_type: str, tmp_path: Path, processes: Processes
) -> None:
    there = worker(saved(tmp_path, model_type), processes)
    with pytest.raises(InvariantError, match="in a padded block its sequences get numbers that differ by"):
        there.stats(batch_of([30, 30, 30]), StatsRequest(("logp",)), 4096)


def test_a_model_with_padding_of_every_length_is_checked_and_exact(tmp_path: Path, processes: Processes) -> None:
    there = worker(saved(tmp_path, "lfm2"), processes)
    batch = batch_of([90, 7, 8, 60, 61, 2])
    stats = there.stats(batch, StatsRequest(("logp",)), 4096)
    alone = [there.stats(batch.sequences([b]), StatsRequest(("logp",)), 4096).logp for b in range(6)]
    assert there.packing_checked
    torch.testing.assert_close(stats.logp, torch.cat(alone), rtol=0, atol=1e-5)


def test_parameters_are_not_initialised_after_sharding(tmp_path: Path, processes: Processes) -> None:
    overrides = f"""data.path=x.jsonl data.max_length=99 data.batch_size=1 actor.model_name={saved(tmp_path, "rwkv")}
        actor.max_length_per_device=4096 trainer.experiment_name=x"""
    _, config = trained(load("sft", overrides.split()))
    half = Worker(str(tmp_path), "bfloat16", Mesh.make(processes, config), processes)
    plain = load_file(tmp_path / "model.safetensors")
    for name, weight in named_weights(half.lm):
        assert torch.equal(weight, plain[name]), name


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_neox"])  # the head of the second is called embed_out
def test_a_value_model_runs_row_by_row(model_type: str, tmp_path: Path, processes: Processes) -> None:
    torch.manual_seed(0)
    there = worker(saved(tmp_path, model_type), processes, ValueModel)
    batch = batch_of([40, 9, 33])
    values = there.stats(batch, VALUE, 4096).value
    alone = [there.stats(batch.sequences([b]), VALUE, 4096).value for b in range(3)]
    assert values.any()
    torch.testing.assert_close(values, torch.cat(alone), rtol=0, atol=1e-5)


@pytest.mark.parametrize("model_type", ["qwen3", "lfm2", "qwen3_moe", "mixtral"])
def test_servers_get_weights_as_checkpoints_have_them(model_type: str, tmp_path: Path) -> None:
    stored = load_file(saved(tmp_path, model_type) / "model.safetensors")
    lm = Policy.load(str(tmp_path)).lm
    layout = served_layout(lm, "vllm")
    sent = {name: x for pair in named_weights(lm) for name, x in layout(*pair).items()}
    assert sent.keys() == stored.keys()
    assert all(torch.equal(x, stored[name]) for name, x in sent.items())


def test_experts_that_do_not_fit_together_are_named(tmp_path: Path) -> None:
    file = saved(tmp_path, "qwen3_moe") / "model.safetensors"
    stored = load_file(file)
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    assert name in stored, "the experts are stored one by one"
    save_file({key: x for key, x in stored.items() if key != name}, file, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"^.*: model.layers.1.mlp.experts.0.gate_proj.weight and others do not"):
        Policy.load(str(tmp_path))


def test_a_value_of_an_expert_that_is_not_finite_is_named(tmp_path: Path) -> None:
    file = saved(tmp_path, "qwen3_moe") / "model.safetensors"
    stored = load_file(file)
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    stored[name][0, 0] = float("nan")
    save_file(stored, file, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=f".*: {name} in model.safetensors has values that are NaN"):
        Policy.load(str(tmp_path))


def test_adapters_on_a_weight_that_a_kernel_reads_are_refused(tmp_path: Path, processes: Processes) -> None:
    overrides = f"""data.path=x.jsonl data.max_length=99 data.batch_size=1 actor.max_length_per_device=4096
        actor.model_name={saved(tmp_path, "mamba2")} trainer.experiment_name=x"""
    config = load("sft", overrides.split()).actor
    lora = replace(config.lora, rank=2, target_modules=("in_proj", "out_proj"))
    with pytest.raises(ConfigError, match=r"actor.lora.target_modules has out_proj, whose weights Mamba2Mixer reads"):
        Learner(replace(config, lora=lora), processes, 1, tmp_path)


def test_a_table_of_positions_ends(tmp_path: Path, processes: Processes) -> None:
    tiny_model(tiny_config("gpt2", {"max_position_embeddings": 32})).save_pretrained(tmp_path)
    there = worker(tmp_path, processes)
    there.stats(batch_of([33, 5]), StatsRequest(("logp",)), 4096)
    with pytest.raises(ConfigError, match="a sequence has 33 tokens, but GPT2LMHeadModel has 32 positions"):
        there.stats(batch_of([34, 5]), StatsRequest(("logp",)), 4096)


def test_adapters_of_a_model_with_experts_are_exported_merged(
    tmp_path: Path, processes: Processes, tokenizer: PreTrainedTokenizerBase
) -> None:
    overrides = f"""data.path=x.jsonl data.max_length=99 data.batch_size=1 actor.max_length_per_device=4096
        actor.model_name={saved(tmp_path / "model", "qwen3_moe")} trainer.experiment_name=x"""
    config = load("sft", overrides.split()).actor
    lora = replace(config.lora, rank=2, target_modules=("q_proj", "o_proj"))
    learner = Learner(replace(config, lora=lora), processes, 1, tmp_path)
    for name, parameter in learner.lm.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter)
    export(learner.lm, tokenizer, tmp_path / "export", write=True)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype=torch.float32).state_dict()
    ours = dict(named_weights(learner.lm))
    assert ours.keys() == again.keys()
    assert all(torch.equal(again[name], weight) for name, weight in ours.items())
    base = load_file(tmp_path / "model" / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(again[name], base[name])
