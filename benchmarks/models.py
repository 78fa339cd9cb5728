"""One step of reinforcement learning in RL2 and in TRL's GRPOTrainer, on a hybrid, sliding windows, and experts.

    make setup
    python benchmarks/models.py [--steps 5] [--model lfm2] [--json FILE]

The work and both sides are those of `rl_step.py` with ragged lengths: 32 prompts, 4 responses each, one optimizer step
in float32, sides in turn, medians. The models are random, of about four million parameters:

    lfm2         short convolutions and attention (hybrid)
    qwen3_5      Gated DeltaNet and attention (hybrid), in transformers' PyTorch code
    gemma3       sliding windows of 64 tokens in three of four layers
    qwen3_moe    16 experts, of which each token uses 2
"""

from __future__ import annotations

import importlib.util
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rl_step import CASES, ROWS, measure, step_parser
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from turns import ratios, table

SHARED: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
    "dtype": "float32",
}
FULL, SLIDING = "full_attention", "sliding_attention"
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "lfm2": (
        "lfm2",
        {"intermediate_size": 1104, "layer_types": ["conv", "conv", FULL, "conv"], "tie_embedding": False},
    ),
    "qwen3_5": (
        "qwen3_5_text",
        {
            "intermediate_size": 640,
            "head_dim": 64,
            "layer_types": ["linear_attention"] * 3 + [FULL],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 64,
            "linear_value_head_dim": 64,
        },
    ),
    "gemma3": (
        "gemma3_text",
        {"intermediate_size": 736, "head_dim": 64, "sliding_window": 64, "layer_types": [SLIDING] * 3 + [FULL]},
    ),
    "qwen3_moe": (
        "qwen3_moe",
        {"head_dim": 64, "moe_intermediate_size": 64, "num_experts": 16, "num_experts_per_tok": 2},
    ),
}
CONSTANT = 2.0
"""Feature 0 of the embeddings, in units of the others' standard deviation."""


def write_model(folder: Path, end_probability: float, end: int, pad: int, *, name: str) -> None:
    """Write a random model that samples `end` with about `end_probability` at every position.

    Feature 0 of the residual stream is a constant: embeddings set it, no layer writes to it, and the head uses it only
    for the end token, like a bias.
    """
    model_type, settings = MODELS[name]
    torch.manual_seed(0)
    special = {"bos_token_id": None, "eos_token_id": end, "pad_token_id": pad}
    config = AutoConfig.for_model(model_type, **SHARED | settings | special)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 0] = CONSTANT * model.get_input_embeddings().weight.std()
        for part in model.base_model.layers.modules():
            for weight in part.parameters(recurse=False):
                if weight.ndim > 1 and weight.shape[-2] == config.hidden_size:  # the output of a layer among others
                    weight[..., 0, :] = 0
        head = model.get_output_embeddings().weight
        head[:, 0] = 0
        head[end] = 0
        hidden = model.base_model(torch.randint(512, (16, 64)), use_cache=False).last_hidden_state.flatten(0, 1)
        head[end, 0] = factor_of(end_probability, hidden[:, 0], hidden @ head.T)
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=pad)
    model.save_pretrained(folder)
    print(f"{name}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} million parameters", flush=True)


def factor_of(probability: float, constant_T: Tensor, logits_TV: Tensor) -> float:
    """Return the factor c for which a token of logit c * constant has this mean probability; its logit is now 0."""
    others_T = (logits_TV.exp().sum(-1) - 1).log()
    low, high = -1000.0, 1000.0
    for _ in range(60):
        middle = (low + high) / 2
        is_less = float((middle * constant_T - others_T).sigmoid().mean()) < probability
        low, high = (middle, high) if is_less else (low, middle)
    return low


def main() -> None:
    arguments = step_parser(__doc__)
    arguments.add_argument("--model", choices=list(MODELS), action="append", help="only this model; may be repeated")
    options = arguments.parse_args()
    if importlib.util.find_spec("trl") is None:
        sys.exit("TRL is not installed; run: make setup")
    numbers: dict[str, float] = {}
    for name in options.model or MODELS:
        steps = measure(CASES[0], options, partial(write_model, name=name))
        results = ratios(steps, "ours", "theirs", ROWS, f"_{name}")
        print(table(name, "TRL", ROWS, results, f"_{name}") + "\n", flush=True)
        numbers |= results
    if options.json:
        options.json.write_text(json.dumps(numbers, indent=2) + "\n")


if __name__ == "__main__":
    main()
