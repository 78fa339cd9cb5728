"""Models are built without memory and read from safetensors: what transformers loads, or a clear error."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_config, tiny_model
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from RL2.errors import ConfigError
from RL2.models.loading import match_weights, refuse_no_model
from RL2.models.packed import PackedModel
from RL2.models.policy import Policy, export, load_model, load_tokenizer, max_length
from RL2.models.stored import check_values, stored_tensors
from RL2.models.value import ValueModel

SHAPE = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
ROPE = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
MODELS = {
    "tied": lambda: Qwen3ForCausalLM(Qwen3Config(tie_word_embeddings=True, **SHAPE)),
    "untied": lambda: Qwen3ForCausalLM(Qwen3Config(tie_word_embeddings=False, **SHAPE)),
    "rope": lambda: LlamaForCausalLM(
        LlamaConfig(rope_parameters={**ROPE, "original_max_position_embeddings": 512}, **SHAPE)
    ),
}


def make(folder: Path, name: str, **how: object) -> AutoModelForCausalLM:
    torch.manual_seed(0)
    lm = MODELS[name]()
    lm.save_pretrained(folder, **how)
    return lm


@pytest.mark.parametrize("how", ["float32", "bfloat16", "in parts"])
@pytest.mark.parametrize("name", MODELS)
def test_what_is_loaded_is_what_transformers_loads(name: str, how: str, tmp_path: Path) -> None:
    lm = make(tmp_path, name)
    if how == "bfloat16":
        lm.bfloat16().save_pretrained(tmp_path)
    elif how == "in parts":
        shutil.rmtree(tmp_path)
        lm.save_pretrained(tmp_path, max_shard_size="10KB")
        assert (tmp_path / "model.safetensors.index.json").exists()
    ours = load_model(str(tmp_path), torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert {n: (p.shape, p.dtype) for n, p in ours.named_parameters()} == {
        n: (p.shape, p.dtype) for n, p in theirs.named_parameters()
    }
    assert all(torch.equal(p, theirs.get_parameter(n)) for n, p in ours.named_parameters())
    assert all(torch.equal(b, theirs.get_buffer(n)) for n, b in ours.named_buffers())  # rotary frequencies
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == (name == "tied")
    assert ours.generation_config.to_dict() == theirs.generation_config.to_dict()


@pytest.mark.parametrize("file_bytes", [2**30, 10_000])
@pytest.mark.parametrize("name", MODELS)
def test_export_is_what_transformers_saves(name: str, file_bytes: int, tmp_path: Path, tokenizer: object) -> None:
    lm = make(tmp_path / "model", name)
    export(load_model(str(tmp_path / "model"), torch.float32), tokenizer, tmp_path / "out", True, file_bytes)  # type: ignore[arg-type]
    assert (len(list((tmp_path / "out").glob("*.safetensors"))) > 1) == (file_bytes < 2**30)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(p, again.get_parameter(n)) for n, p in lm.named_parameters())
    assert (tmp_path / "out" / "config.json").read_text() == (tmp_path / "model" / "config.json").read_text()


def test_a_backbone_that_was_saved_alone(tmp_path: Path) -> None:
    lm = make(tmp_path, "tied")
    alone = {name.removeprefix("model."): weight for name, weight in load_file(tmp_path / "model.safetensors").items()}
    save_file(alone, tmp_path / "model.safetensors")
    assert torch.equal(
        load_model(str(tmp_path), torch.float32).model.embed_tokens.weight, lm.get_input_embeddings().weight
    )


def test_what_cannot_be_loaded_is_said_in_a_line(tmp_path: Path) -> None:
    def message(change: str) -> str:
        folder = tmp_path / change
        make(folder, "untied")
        file = folder / "model.safetensors"
        if change == "no folder":
            shutil.rmtree(folder)
        elif change == "no weights":
            file.unlink()
        elif change == "cut off":
            file.write_bytes(file.read_bytes()[:-1000])
        elif change == "no safetensors":
            file.write_bytes(b"\x80\x02not a tensor")
        elif change == "a layer more":
            config = json.loads((folder / "config.json").read_text())
            del config["layer_types"]
            (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
        else:
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 64}))
        with pytest.raises(ConfigError) as caught:
            Policy.load(str(folder))
        said = str(caught.value)
        assert said.startswith(str(folder)) and "\n" not in said
        return said.removeprefix(str(folder))

    assert message("no folder").startswith(": there is no such folder")
    assert message("no weights").startswith(" has no weights in safetensors format (no *.safetensors in ")
    assert message("cut off").startswith(": model.safetensors is broken (")
    assert message("no safetensors").startswith(": model.safetensors is broken (")
    assert message("a layer more").startswith(" lacks 11 of the tensors of Qwen3ForCausalLM, among them ")
    assert "proj.weight has shape [48, 32] in model.safetensors, but [64, 32] in config.json" in message("wider")


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "generation_config.json"])
def test_a_pipe_in_the_folder_is_named_and_not_waited_for(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    os.mkfifo(tmp_path / name)
    with pytest.raises(ConfigError, match=f"{name} is a pipe, a socket or a device"):
        refuse_no_model(str(tmp_path))


def test_a_download_that_was_cut_off_is_named(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "snapshots" / "0a1b", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "77c0.incomplete").write_bytes(b"half")
    with pytest.raises(
        ConfigError, match=r"no weights in .* \(the download was cut off at 77c0.incomplete; download it again"
    ):
        stored_tensors(snapshot, "owner/name")


def test_what_the_hub_does_not_give_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: object, **settings: object) -> None:
        raise ConnectionError("no route to the hub\nand more")

    monkeypatch.setattr("RL2.models.loading.HfApi.model_info", unreachable)
    with pytest.raises(ConfigError) as caught:
        load_tokenizer("nobody/nothing")
    assert str(caught.value) == (
        "nobody/nothing: there is no such folder, and the hub does not provide it: no route to the hub"
    )


def saved(folder: Path, change: Callable[[dict[str, torch.Tensor]], None], tie: bool = False) -> Path:
    """Write a tiny model whose stored tensors went through `change`."""
    lm = tiny_model(tiny_config("qwen3", {"tie_word_embeddings": tie}))
    lm.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def quantised(tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(dtype)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda t: quantised(t, torch.float8_e4m3fn),
            "up_proj.weight is stored as F8_E4M3 (model.safetensors): the model",
        ),
        (
            lambda t: quantised(t, torch.int8),
            "up_proj.weight is stored as I8 (model.safetensors): the model is quantised",
        ),
        (lambda t: t.update({"model.norm.scale": torch.ones(2)}), "has 1 tensors that Qwen3ForCausalLM does not read"),
        (lambda t: t.update({"score.weight": torch.ones(1, 64)}), "among them score.weight"),
        (
            lambda t: t.pop("model.norm.weight"),
            "lacks 1 of the tensors of Qwen3ForCausalLM, among them model.norm.weight",
        ),
    ],
)
def test_what_a_checkpoint_has_and_lacks_is_read_or_refused(
    tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], None], said: str
) -> None:
    folder = saved(tmp_path, change)
    for load in (lambda: Policy.load(str(folder)), lambda: headers(folder)):
        with pytest.raises(ConfigError) as caught:
            load()
        assert said in str(caught.value)
        assert "\n" not in str(caught.value)


def headers(folder: Path) -> None:
    """Look at a checkpoint as a dry run does."""
    match_weights(Policy.build(str(folder)), stored_tensors(folder, str(folder)), str(folder))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("program", [Policy, ValueModel])
def test_a_value_that_is_no_number_is_refused(
    tmp_path: Path, program: type[PackedModel], dtype: torch.dtype, value: float
) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()})
        tensors["model.layers.1.mlp.up_proj.weight"][-1, -1] = value

    folder = saved(tmp_path, spoil)
    lm = program.build(str(folder))
    stored = stored_tensors(folder, str(folder))
    names = match_weights(lm, stored, str(folder), program(lm).initial, program.UNREAD).names
    for load in (lambda: program.load(str(folder)), lambda: list(check_values(names, stored, str(folder)))):
        with pytest.raises(
            ConfigError, match=r"^\S+: model\.layers\.1\.mlp\.up_proj\.weight in model\.safetensors has values that"
        ):
            load()


def test_all_values_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("RL2.models.stored.READ_AT_ONCE", 100)  # so that tensors come in pieces, the last one smaller
    folder = saved(tmp_path, lambda t: None)
    stored = stored_tensors(folder, str(folder))
    names = match_weights(Policy.build(str(folder)), stored, str(folder)).names
    assert sum(check_values(names, stored, "F")) == sum(
        t.nbytes for t in load_file(folder / "model.safetensors").values()
    )


def test_names_that_old_checkpoints_store_are_left_out(tmp_path: Path) -> None:
    folder = saved(tmp_path, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    headers(folder)
    Policy.load(str(folder))


def test_a_tied_head_that_is_stored_with_other_values_is_refused(tmp_path: Path) -> None:
    head = "lm_head.weight"
    same = saved(tmp_path / "same", lambda t: t.update({head: t["model.embed_tokens.weight"].clone()}), tie=True)
    headers(same)
    Policy.load(str(same))
    other = saved(tmp_path / "other", lambda t: t.update({head: t["model.embed_tokens.weight"] + 1e-3}), tie=True)
    for load in (lambda: Policy.load(str(other)), lambda: headers(other)):
        with pytest.raises(ConfigError, match=r"are tied .* set tie_word_embeddings to false in config\.json"):
            load()


def test_a_value_model_reads_a_language_model_but_for_its_head(tmp_path: Path) -> None:
    ValueModel.load(str(saved(tmp_path, lambda t: None)))


def half_and_stale(folder: Path) -> None:
    """Write shards with an index, and beside them a file that the index does not name, of the same tensors."""
    stale = {name: torch.zeros_like(x) for name, x in load_file(folder / "model.safetensors").items()}
    (folder / "model.safetensors").unlink()
    make(folder, "untied", max_shard_size="10KB")
    for name in ("a-old.safetensors", "z-old.safetensors"):
        save_file(stale, folder / name)


def whole_and_stale(folder: Path) -> None:
    """Write `model.safetensors`, and beside it shards with an index, of the same tensors with other values."""
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").unlink()
    lm = MODELS["untied"]()
    lm.save_pretrained(folder, max_shard_size="10KB")
    (folder / "model.safetensors").write_bytes(whole)


def another_layout(folder: Path) -> None:
    """Write beside the model what Mistral's checkpoints and peft's have."""
    save_file({"layers.0.attention.wq.weight": torch.ones(2)}, folder / "consolidated.safetensors")
    save_file({"base_model.model.lora_A.weight": torch.ones(2)}, folder / "adapter_model.safetensors")


@pytest.mark.parametrize("beside", [half_and_stale, whole_and_stale, another_layout])
def test_of_several_files_those_are_read_that_transformers_reads(
    tmp_path: Path, beside: Callable[[Path], None]
) -> None:
    make(tmp_path, "untied")
    beside(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    headers(tmp_path)
    ours = load_model(str(tmp_path), torch.float32)
    assert all(torch.equal(p, theirs.get_parameter(n)) for n, p in ours.named_parameters())


def test_a_tensor_that_two_files_have_is_refused(tmp_path: Path) -> None:
    make(tmp_path, "untied")
    shutil.copy(tmp_path / "model.safetensors", tmp_path / "two.safetensors")
    (tmp_path / "model.safetensors").rename(tmp_path / "one.safetensors")
    with pytest.raises(ConfigError, match=r"^\S+: \S+ is stored in one.safetensors and in two.safetensors; keep only"):
        stored_tensors(tmp_path, str(tmp_path))


DAMAGED = [
    ("config.json", "["),
    ("config.json", "[]"),
    ("config.json", "null"),
    ("config.json", {"hidden_size": "wide"}),
    ("config.json", {"num_hidden_layers": None}),
    ("config.json", {"layer_types": ["full_attention"]}),
    ("config.json", {"rope_parameters": [1]}),
    ("config.json", {"dtype": "float99"}),
    ("config.json", {"quantization_config": "fp8"}),
    ("tokenizer.json", "{}"),
    ("tokenizer_config.json", "[]"),
    ("generation_config.json", "{"),
    ("generation_config.json", "[]"),
    ("generation_config.json", '{"eos_token_id": "</s>"}'),
    ("generation_config.json", '{"max_new_tokens": -1}'),
    ("model.safetensors.index.json", "[]"),
    ("model.safetensors.index.json", '{"weight_map": {"model.norm.weight": null}}'),
]


@pytest.mark.parametrize(("file", "content"), DAMAGED, ids=str)
def test_a_damaged_file_is_named_in_one_line(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, file: str, content: str | dict[str, object]
) -> None:
    make(tmp_path, "untied", max_shard_size="10KB")
    tokenizer.save_pretrained(tmp_path)
    if isinstance(content, dict):
        content = json.dumps({**json.loads((tmp_path / file).read_text()), **content})
    (tmp_path / file).write_text(content)
    for read in (
        lambda: (load_tokenizer(str(tmp_path)), headers(tmp_path)),
        lambda: (max_length(str(tmp_path)), Policy.load(str(tmp_path)), load_tokenizer(str(tmp_path))),
    ):
        with pytest.raises(ConfigError) as caught:
            read()
        assert str(caught.value).startswith(str(tmp_path))
        assert "\n" not in str(caught.value)
        what = {"config.json": "its configuration", "model.safetensors.index.json": "null"}.get(file, file)
        assert what.split("_")[0].removesuffix(".json") in str(caught.value) or file in str(caught.value)
        assert not str(caught.value).endswith(":")


def test_a_checkpoint_and_an_adapter_are_named_as_such(tmp_path: Path) -> None:
    checkpoint, adapter = tmp_path / "step_000008", tmp_path / "adapter"
    for folder in (checkpoint, adapter):
        folder.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(
        ConfigError, match=f"; it is a checkpoint, of which `rl2 export {checkpoint} OUT` makes a model"
    ):
        refuse_no_model(str(checkpoint))
    with pytest.raises(
        ConfigError, match="; it is an adapter: `rl2 export` of the checkpoint, without --adapter, merges"
    ):
        refuse_no_model(str(adapter))
