"""One model of each kind: gradients, trainer and engine have the numbers of transformers' own forward.

`tests/architectures.py` compares every model of docs/models.md in this way, on two processes too.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from architectures import PROGRAMS, summary
from exactness import GROUPS, LIMITS, gradient_gap, numbers, save_model
from model_tables import listed
from transformers import PreTrainedTokenizerBase

from RL2.parallel.processes import Processes

pytestmark = pytest.mark.slow

MODELS = (
    "qwen3_5_text",
    "lfm2",
    "mamba2",
    "gemma2",
    "gpt_oss",
    "deepseek_v3",
    "qwen3_moe",
    "gpt2",
    "phi",
    "cohere",
    "granite_swa",
)
"""One of each kind of mixer, of attention, of experts, and of change after the head."""


@pytest.mark.parametrize("name", MODELS)
def test_training_and_sampling_are_exact(
    name: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase, processes: Processes
) -> None:
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    save_model(name, tmp_path / "model", tmp_path / "tokenizer")
    found = numbers(tmp_path / "model", processes, {})
    assert found["packed"] == (name in listed(GROUPS[0]))
    gaps = {what: found[what] for what in ("sft", "spo", "ppo", "dpo", "logp", "engine")}
    assert all(gap <= LIMITS[what] for what, gap in gaps.items()), gaps
    assert found["new_tokens"] == 64


def test_a_parameter_without_its_gradient_is_found() -> None:
    theirs = {"large": torch.full((9,), 100.0), "small": torch.full((2,), 0.2)}
    assert gradient_gap({**theirs, "small": torch.full((2,), 0.25)}, theirs) == (pytest.approx(0.25), "small")
    assert gradient_gap({"large": theirs["large"]}, theirs) == (1.0, "small")
    assert gradient_gap({**theirs, "large": torch.full((9,), torch.nan)}, theirs) == (torch.inf, "large")
    assert gradient_gap({}, {}) == (torch.inf, "all gradients are 0")


def test_the_summary_names_what_is_not_exact() -> None:
    refused = {program: {"refused": f"{program}: no such class"} for program in PROGRAMS}
    results = {
        "llama": {"numbers": {"sft": 1e-6, "engine": 1e-6}, "programs": {program: {} for program in PROGRAMS}},
        "lfm2": {"numbers": {"sft": 1e-2, "engine": 1e-6}, "programs": refused},
        "gpt2": {"layouts": {"fsdp": {"error": "ValueError: x"}}},
    }
    lines, good = summary(results)
    assert not good
    assert "one process: sft: 2 models, at most 0.01 (lfm2), limit 0.001" in lines
    assert "    beyond: lfm2 0.01" in lines
    assert "one process: engine: 2 models, at most 1e-06 (llama), limit 0.0001" in lines
    assert "rm: 2 models, 1 refused" in lines
    assert "    refused: lfm2: rm: no such class" in lines
    assert "gpt2, fsdp: ValueError: x" in lines
    unexpected = {program: {} for program in PROGRAMS} | {"sft": {"refused": "is not computed exactly"}}
    assert not summary({"llama": {"programs": unexpected}})[1]
    assert not summary({"llama": {"numbers": {"refused": "is not computed exactly"}}})[1]
    assert summary({"llama": {"layouts": {"tp": {"refused": "has no plan"}}}})[1]
    rounded = {"zaya": {"numbers": {"engine": 4e-4, "engine in float64": 1e-6}}}
    assert summary({"llama": results["llama"], **rounded})[1]
    assert not summary({"zaya": {"numbers": {"engine": 4e-4, "engine in float64": 4e-4}}})[1]
