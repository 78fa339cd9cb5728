"""Quantised checkpoints: read as value * scale on request, against numbers computed by hand in float64, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_config, tiny_model
from tiny_multimodal import multimodal_config, multimodal_model
from tiny_quantised import by_hand, change, quantise
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from RL2.batch.packing import pack_tokens
from RL2.config.load import load
from RL2.config.programs import DPOConfig
from RL2.data.table import Ragged
from RL2.engines.make import served_layout
from RL2.errors import ConfigError
from RL2.models.loading import match_weights, tensors_for
from RL2.models.policy import Policy, export
from RL2.models.quantised import quantised_line
from RL2.models.stored import check_values
from RL2.models.value import ValueModel
from RL2.parallel.processes import Processes
from RL2.trainer.dpo_loop import with_reference
from RL2.trainer.supervised import Rows
from RL2.types import StatsRequest

SIZES = {"hidden_size": 96, "intermediate_size": 160}
"""Sizes that blocks of 64 do not divide."""
FP8 = {"quant_method": "fp8", "weight_block_size": [64, 64], "activation_scheme": "dynamic"}
PER_TENSOR = {"quant_method": "fp8", "weight_block_size": None, "activation_scheme": "static"}


def compressed(**weights: Any) -> dict[str, Any]:
    groups = {"group_0": {"weights": {"num_bits": 8, "symmetric": True, "strategy": "channel", **weights}}}
    return {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": groups}


def make(folder: Path, model_type: str = "qwen3", **settings: Any) -> Path:
    tiny_model(tiny_config(model_type, {**SIZES, **settings})).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("read_at_once", [2**24, 1000])
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("block", FP8),
        ("tensor", PER_TENSOR),
        ("channel", compressed()),
        ("int8", {**compressed(), "format": "int-quantized"}),
        ("group", compressed(strategy="group", group_size=16)),
        ("group", compressed(group_size=64)),
        ("channel", {"quant_method": "fbgemm_fp8"}),
        ("tensor", {"quant_method": "modelopt", "quant_algo": "FP8"}),
    ],
)
def test_weights_are_value_times_scale(
    kind: str, settings: dict[str, Any], read_at_once: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("RL2.models.stored.READ_AT_ONCE", read_at_once)  # so that pieces end within blocks
    wanted = quantise(make(tmp_path), settings, kind)
    assert len(wanted) == 14
    lm = Policy.load(str(tmp_path), dequantize=True).lm
    assert all(torch.equal(lm.get_parameter(name), x) for name, x in wanted.items())
    plain = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(lm.model.embed_tokens.weight, plain)


def test_an_export_is_not_quantised(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    wanted = quantise(make(tmp_path / "model"), FP8, "block")
    lm = Policy.load(str(tmp_path / "model"), dequantize=True).lm
    assert quantised_line(lm) == "its fp8 weights are read as value * scale, and an export is not quantised"
    export(lm, tokenizer, tmp_path / "out", write=True)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(again.get_parameter(name), x) for name, x in wanted.items())
    assert quantised_line(Policy.load(str(tmp_path / "out")).lm) is None


def test_experts_are_read_with_their_scales(tmp_path: Path) -> None:
    wanted = quantise(make(tmp_path, "qwen3_moe", moe_intermediate_size=80), FP8, "block")
    lm = Policy.load(str(tmp_path), dequantize=True).lm
    prefix = "model.layers.1.mlp.experts"
    assert f"{prefix}.3.up_proj.weight" in wanted, "the experts are stored one by one"
    gate, up = (wanted[f"{prefix}.3.{name}_proj.weight"] for name in ("gate", "up"))
    assert torch.equal(lm.get_parameter(f"{prefix}.gate_up_proj")[3], torch.cat([gate, up]))
    assert torch.equal(lm.get_parameter(f"{prefix}.down_proj")[2], wanted[f"{prefix}.2.down_proj.weight"])


def test_a_value_model_reads_them_too(tmp_path: Path) -> None:
    wanted = quantise(make(tmp_path), FP8, "block")
    lm = ValueModel.load(str(tmp_path), dequantize=True).lm
    assert all(torch.equal(lm.get_parameter(name), x) for name, x in wanted.items())


def test_the_reference_of_dpo_reads_them_too(tmp_path: Path, processes: Processes) -> None:
    quantise(make(tmp_path), FP8, "block")
    given = f"""data.path=x.jsonl data.max_length=99 data.batch_size=1 trainer.experiment_name=x
        actor.model_name={tmp_path} actor.max_length_per_device=99 actor.dtype=float32 actor.dequantize=true"""
    config = load("dpo", given.split())
    assert isinstance(config, DPOConfig)
    pair = [list(range(4, 12)), list(range(4, 16))]
    ids = Ragged.from_rows(pair, np.int64)
    trains = Ragged.from_rows([[0] + [1] * (len(each) - 1) for each in pair], np.bool_)
    found = with_reference(Rows(ids, trains, per_row=2), config, processes).ref_logp
    assert found is not None
    wanted = Policy.load(str(tmp_path), dequantize=True)(pack_tokens(pair), None, StatsRequest(("logp",)))["logp"]
    assert np.allclose(np.concatenate([found[0], found[1]]), wanted.detach(), atol=1e-5)


def test_a_multimodal_checkpoint_is_exported_without_its_quantisation(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    whole = multimodal_model(multimodal_config("mistral3"))
    whole.save_pretrained(tmp_path / "model")
    wanted = quantise(tmp_path / "model", PER_TENSOR, "tensor")
    lm = Policy.load(str(tmp_path / "model"), dequantize=True).lm
    export(lm, tokenizer, tmp_path / "out", write=True)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    exported = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(exported[name], x) for name, x in wanted.items())
    _, loading = type(whole).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(loading.values()), loading


def test_another_quantised_part_is_exported_with_its_scale(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    multimodal_model(multimodal_config("mistral3")).save_pretrained(tmp_path / "model")
    quantise(tmp_path / "model", PER_TENSOR, "tensor")
    (tmp_path / "model" / "hf_quant_config.json").write_text("{}")  # of modelopt, beside config.json
    stored = load_file(tmp_path / "model" / "model.safetensors")
    name = "multi_modal_projector.linear_2.weight"
    values = stored[name].to(torch.float8_e4m3fn)
    stored |= {name: values, f"{name}_scale_inv": torch.tensor(0.3)}
    save_file(stored, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    lm = Policy.load(str(tmp_path / "model"), dequantize=True).lm
    export(lm, tokenizer, tmp_path / "out", write=True)
    exported = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(exported[name], by_hand(values, torch.tensor([[0.3]]), *values.shape))
    assert f"{name}_scale_inv" not in exported
    assert not (tmp_path / "out" / "hf_quant_config.json").exists(), "engines would read float32 weights by it"


def test_without_the_option_the_message_names_it(tmp_path: Path) -> None:
    quantise(make(tmp_path), FP8, "block")
    with pytest.raises(
        ConfigError, match=r"qwen3 is quantised \(fp8\), and its scales .*; set dequantize=true beside model"
    ):
        Policy.load(str(tmp_path))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"quant_method": "awq", "bits": 4}, "awq stores no FP8 or int8 value with a scale for each weight"),
        ({"quant_method": "gptq", "bits": 4}, "gptq stores no FP8 or int8 value"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes stores no FP8 or int8 value"),
        ({"quant_method": "mxfp4"}, "mxfp4 stores no FP8 or int8 value"),
        ({**compressed(), "format": "pack-quantized"}, "its format pack-quantized packs its values"),
        (compressed(num_bits=4), "its values have another size than 8 bits"),
        (compressed(symmetric=False), "its values have zero points"),
        (
            {
                **compressed(),
                "config_groups": {str(size): {"weights": {"group_size": size}} for size in (16, 32)},
            },
            "its scales belong to groups of several sizes",
        ),
        (compressed(strategy="block"), "its scales belong to blocks, which is supported for quant_method=fp8 alone"),
        ({**compressed(), "sparsity_config": {"format": "sparse-24-bitmask"}}, "its weights are sparse"),
        ({**compressed(), "transform_config": {"config_groups": {"a": 1}}}, "its weights are transformed"),
    ],
)
def test_other_formats_are_refused(settings: dict[str, Any], said: str, tmp_path: Path) -> None:
    change(make(tmp_path), quantization_config=settings)
    with pytest.raises(ConfigError, match=f"^{tmp_path}: dequantize=true cannot read its weights: {said}"):
        Policy.load(str(tmp_path), dequantize=True)


def test_the_option_without_a_quantised_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="dequantize=true has no effect"):
        Policy.load(str(make(tmp_path)), dequantize=True)


def broken(folder: Path, *, scale: torch.Tensor | None = None, value: float | None = None) -> Path:
    quantise(make(folder), FP8, "block")
    stored = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    if scale is not None:
        stored[f"{name}_scale_inv"] = scale
    elif value is not None:
        stored[name] = stored[name].float().index_fill(0, torch.tensor([3]), value).to(torch.float8_e4m3fn)
    else:
        del stored[f"{name}_scale_inv"]
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_scales_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"up_proj.weight_scale_inv has shape \[3, 3\], which does not fit .*\[160, 96"
    ):
        Policy.load(str(broken(tmp_path / "shape", scale=torch.ones(3, 3))), dequantize=True)
    with pytest.raises(ConfigError, match=r"up_proj.weight is stored as F8_E4M3 .* scales would be lost"):
        Policy.load(str(broken(tmp_path / "none")), dequantize=True)


def test_blocks_of_unknown_size_are_refused(tmp_path: Path) -> None:
    """Two scales of 96 columns belong to blocks of 64 and 32 here; read with equal halves they gave wrong numbers."""
    quantise(
        make(tmp_path, intermediate_size=96),
        {"quant_method": "modelopt", "quant_algo": "FP8", "weight_block_size": [64, 64]},
        "block",
    )
    with pytest.raises(ConfigError, match=r"weight_scale has shape \[\d, \d\], which does not fit .*_size=None\)"):
        Policy.load(str(tmp_path), dequantize=True)


def test_scales_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    folder = broken(tmp_path, scale=torch.full((3, 2), 120, dtype=torch.uint8))
    with pytest.raises(ConfigError, match=r"up_proj.weight_scale_inv is stored as U8, not as a number"):
        Policy.load(str(folder), dequantize=True)


def test_broken_numbers_are_found_by_both_readers(tmp_path: Path) -> None:
    for folder in (
        broken(tmp_path / "value", value=float("nan")),
        broken(tmp_path / "scale", scale=torch.full((3, 2), float("inf"))),
    ):
        said = r"model.layers.1.mlp.up_proj.weight in model.safetensors has values that are NaN or infinite"
        with pytest.raises(ConfigError, match=said):
            Policy.load(str(folder), dequantize=True)
        lm = Policy.build(str(folder), dequantize=True)
        stored = tensors_for(lm, folder, "F")
        with pytest.raises(ConfigError, match=said):
            list(check_values(match_weights(lm, stored, "F").names, stored, "F"))


def test_servers_are_refused(tmp_path: Path) -> None:
    change(make(tmp_path), quantization_config=FP8)
    with pytest.raises(ConfigError, match=r"^rollout.engine=vllm: servers would load the checkpoint's fp8 weights"):
        served_layout(Policy.build(str(tmp_path), dequantize=True), "vllm")
