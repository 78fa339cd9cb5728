"""Text models within multimodal checkpoints: their numbers, the first batch's check, and what an export holds."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_models import tiny_config, tiny_model
from tiny_multimodal import multimodal_config, multimodal_model
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from RL2.batch.packing import loss_weights, pack_tokens
from RL2.config.load import load
from RL2.config.programs import trained
from RL2.engines.make import served_layout
from RL2.errors import ConfigError
from RL2.models.loading import match_weights
from RL2.models.multimodal import multimodal_line, note_checkpoint
from RL2.models.packed import PackedModel
from RL2.models.policy import Policy, export, max_length, named_weights
from RL2.models.stored import stored_tensors
from RL2.models.value import VALUE, ValueModel
from RL2.parallel.processes import Processes
from RL2.types import StatsRequest, TokenBatch, TokenStats
from RL2.workers.learner import Learner
from RL2.workers.worker import InvariantError

LOGP = StatsRequest(("logp",))
PROCESSOR = {"image_processor_type": "SiglipImageProcessor", "size": 28}


def make(folder: Path, model_type: str, text: dict[str, Any] | None = None) -> PreTrainedModel:
    """Save a multimodal model whose other parts are bfloat16, with the settings of a processor."""
    whole = multimodal_model(multimodal_config(model_type, text))
    whole.save_pretrained(folder)
    stored = load_file(folder / "model.safetensors")
    stored = {name: x.bfloat16() if "vis" in name else x for name, x in stored.items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "of the processor"}))
    whole.load_state_dict({name: x.bfloat16() if "vis" in name else x for name, x in whole.state_dict().items()})
    return whole


def batch_of(lengths: tuple[int, ...]) -> TokenBatch:
    generator = torch.Generator().manual_seed(0)
    batch = pack_tokens([torch.randint(4, 300, (length,), generator=generator).tolist() for length in lengths])
    return batch.with_(weight_T=loss_weights(batch))


def learner(
    folder: Path, processes: Processes, *overrides: str, group: str = "actor", kind: type[PackedModel] = Policy
) -> Learner:
    program = "sft" if group == "actor" else "rm"
    common = f"""data.path=x.jsonl data.max_length=99 data.batch_size=1 {group}.model_name={folder} {group}.lr=1e-2
        {group}.warmup_ratio=0 {group}.max_length_per_device=4096 {group}.dtype=float32 trainer.experiment_name=x"""
    _, config = trained(load(program, [*common.split(), *overrides]))
    return Learner(config, processes, 1, Path(), group, kind)


def nll(stats: TokenStats, batch: TokenBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    return -stats.logp, {}


@pytest.mark.parametrize("model_type", ["gemma3", "qwen3_5", "qwen3_5_moe", "mistral3", "idefics3"])
def test_a_step_trains_the_text_and_exports_the_whole(
    model_type: str, tmp_path: Path, processes: Processes, tokenizer: PreTrainedTokenizerBase
) -> None:
    whole = make(tmp_path / "model", model_type)
    there = learner(tmp_path / "model", processes)
    batch = batch_of((40, 28, 12))
    metrics = there.step(batch, nll, LOGP)
    assert there.packing_checked, "the first batch was compared with the multimodal class"
    assert metrics["grad_norm"] > 0
    there.export(tokenizer, tmp_path / "out")

    before, after = (load_file(tmp_path / each / "model.safetensors") for each in ("model", "out"))
    assert before.keys() == after.keys(), "all under their own names"
    others = [name for name in before if not re.search("language_model|text_model|lm_head", name)]
    assert len(others) > 10
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in others)
    assert any(before[name].dtype == torch.bfloat16 for name in others)
    config, their_config = (json.loads((tmp_path / each / "config.json").read_text()) for each in ("out", "model"))
    assert config == {**their_config, "dtype": "float32"}
    assert json.loads((tmp_path / "out" / "preprocessor_config.json").read_text()) == PROCESSOR
    assert not (tmp_path / "out" / "chat_template.json").exists(), "it would hide the template of training"

    again, loading = type(whole).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(loading.values()), loading
    ids = batch.token_ids_T[:40][None]
    with torch.no_grad():
        logp = again.eval()(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
        ours = there.stats(batch, LOGP, 4096).logp[:39]
        was = whole(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
    theirs, before_A = (x[:39].gather(1, batch.labels_T[:39, None])[:, 0] for x in (logp, was))
    assert float((ours - theirs).abs().max()) < 1e-4
    assert float(theirs.mean()) > float(before_A.mean())


@pytest.mark.parametrize("model_type", ["gemma3", "qwen3_5", "mistral3"])
def test_gradients_are_those_of_the_multimodal_class(model_type: str, tmp_path: Path) -> None:
    whole = make(tmp_path, model_type)
    policy = Policy.load(str(tmp_path)).train()
    sequences = [torch.arange(4 + n, 44 + n).tolist() for n in range(3)]
    policy(pack_tokens(sequences), None, LOGP)["logp"].sum().backward()
    for ids in sequences:
        logp = whole(input_ids=torch.tensor([ids[:-1]]), use_cache=False).logits[0].log_softmax(-1)
        logp.gather(1, torch.tensor(ids[1:])[:, None]).sum().backward()
    ours = {name.removeprefix("model."): p.grad for name, p in policy.lm.named_parameters()}
    theirs = {name.removeprefix("model.language_model."): p.grad for name, p in whole.named_parameters()}
    for name, grad in ours.items():
        assert grad is not None and float((grad - theirs[name]).norm()) < 1e-3 * float(theirs[name].norm()), name


def published(folder: Path, model_type: str) -> set[str]:
    """Rename the tensors of a saved model as published checkpoints have them; return the new names."""
    stored = load_file(folder / "model.safetensors")
    if model_type == "gemma3":
        stored = {name.replace("vision_tower.", "vision_tower.vision_model."): x for name, x in stored.items()}
    else:
        stored = {name: x for name, x in stored.items() if ".experts." not in name} | fused(stored)
        stored["mtp.fc.weight"] = torch.ones(3)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    return set(stored)


def fused(stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    found = {}
    for layer in range(2):
        prefix = f"model.language_model.layers.{layer}.mlp.experts"
        gate, up, down = (
            torch.stack([stored[f"{prefix}.{expert}.{name}_proj.weight"] for expert in range(4)])
            for name in ("gate", "up", "down")
        )
        found[f"{prefix}.gate_up_proj"], found[f"{prefix}.down_proj"] = torch.cat([gate, up], 1), down
    return found


@pytest.mark.parametrize("model_type", ["gemma3", "qwen3_5_moe"])
def test_names_of_published_checkpoints_are_kept(
    model_type: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    whole = make(tmp_path / "model", model_type)
    names = published(tmp_path / "model", model_type)
    policy = Policy.load(str(tmp_path / "model"))
    export(policy.lm, tokenizer, tmp_path / "out", True, file_bytes=100_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == names
    again = type(whole).from_pretrained(tmp_path / "out")
    assert all(torch.equal(x, again.state_dict()[name]) for name, x in whole.state_dict().items())


def test_a_tensor_of_neither_part_is_refused(tmp_path: Path) -> None:
    make(tmp_path, "gemma3")
    stored = load_file(tmp_path / "model.safetensors")
    save_file(stored | {"other.weight": torch.ones(2)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"has 1 tensors that Gemma3ForCausalLM does not read, among them other\.we"):
        match_weights(Policy.build(str(tmp_path)), stored_tensors(tmp_path, "F"), "F")


def test_the_first_batch_stops_a_multimodal_class_with_other_numbers(tmp_path: Path, processes: Processes) -> None:
    tiny_model(tiny_config("cohere2")).save_pretrained(tmp_path)
    there = learner(tmp_path, processes)
    note_checkpoint(there.lm, multimodal_config("aya_vision"))  # whose class leaves out the factor on the logits
    with pytest.raises(InvariantError, match="Cohere2ForCausalLM is not computed exactly here"):
        there.backward(batch_of((40, 28)), nll, LOGP)


def test_a_value_model_takes_the_text_and_is_exported_alone(
    tmp_path: Path, processes: Processes, tokenizer: PreTrainedTokenizerBase
) -> None:
    whole = make(tmp_path / "model", "gemma3")
    there = learner(tmp_path / "model", processes, group="critic", kind=ValueModel)
    assert multimodal_line(there.lm) == (
        "gemma3: trains the text model; the vision part is left out, and its export is text-only"
    )
    batch = batch_of((40, 28))
    value = there.stats(batch, VALUE, 4096).value
    hidden = whole.model(input_ids=batch.token_ids_T[:39][None]).last_hidden_state[0]
    torch.testing.assert_close(value[:39], hidden @ there.lm.score.weight[0], rtol=1e-4, atol=1e-4)
    there.export(tokenizer, tmp_path / "out")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert torch.equal(again.score.weight, there.lm.score.weight)
    assert again.config.model_type == "gemma3_text"


@pytest.mark.parametrize(("model_type", "targets"), [("gemma3", "q_proj"), ("qwen3_5_moe", "q_proj,all-experts")])
@pytest.mark.parametrize("save", ["merged", "adapter"])
def test_adapters_are_of_the_text_alone(
    save: str, model_type: str, targets: str, tmp_path: Path, processes: Processes, tokenizer: PreTrainedTokenizerBase
) -> None:
    whole = make(tmp_path / "model", model_type)
    there = learner(
        tmp_path / "model",
        processes,
        "actor.lora.rank=2",
        f"actor.lora.target_modules=[{targets}]",
        f"actor.lora.save={save}",
    )
    batch = batch_of((40, 28))
    there.step(batch, nll, LOGP)
    there.export(tokenizer, tmp_path / "out")
    if save == "adapter":
        again = PeftModel.from_pretrained(whole, tmp_path / "out").eval()
        assert not any("lora" in name for name, _ in again.named_parameters() if "vision" in name)
    else:
        again = type(whole).from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        logp = again(input_ids=batch.token_ids_T[:39][None], use_cache=False).logits[0].log_softmax(-1)
    theirs = logp.gather(1, batch.labels_T[:39, None])[:, 0]
    assert float((there.stats(batch, LOGP, 4096).logp[:39] - theirs).abs().max()) < 1e-4


def test_lines_name_the_parts(tmp_path: Path) -> None:
    multimodal_config("gemma4").save_pretrained(tmp_path)
    lm = Policy.build(str(tmp_path))
    assert multimodal_line(lm) == ("gemma4: trains the text model; the vision and audio parts are exported unchanged")
    assert multimodal_line(tiny_model(tiny_config("gemma3_text"))) is None
    assert max_length(str(tmp_path)) == 512
    with pytest.raises(ConfigError, match=r"^rollout.engine=sglang: gemma4 is multimodal, and text parts of such"):
        served_layout(lm, "sglang")


@pytest.mark.parametrize("model_type", ["gemma3", "qwen3_5_moe"])
def test_servers_get_the_weights_of_the_text_as_the_checkpoint_has_them(model_type: str, tmp_path: Path) -> None:
    make(tmp_path, model_type)
    stored = load_file(tmp_path / "model.safetensors")
    lm = Policy.load(str(tmp_path)).lm
    layout = served_layout(lm, "vllm")
    sent = {name: x for pair in named_weights(lm) for name, x in layout(*pair).items()}
    assert all(torch.equal(x, stored[name]) for name, x in sent.items())
    assert all("vis" in name or "multi_modal" in name for name in stored.keys() - sent.keys())


def test_ties_follow_the_multimodal_configuration(tmp_path: Path) -> None:
    config = multimodal_config("mistral3", {"tie_word_embeddings": False})
    config.tie_word_embeddings = True
    config.save_pretrained(tmp_path)
    lm = Policy.build(str(tmp_path))
    assert lm.lm_head.weight is lm.model.embed_tokens.weight
