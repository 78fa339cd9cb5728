"""Base and adapters apart: what a server makes of them is what it gets when the trainer merges them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import tiny_config, tiny_model

from RL2.config.load import load
from RL2.engines.make import served_layout
from RL2.engines.served.apart import apart
from RL2.engines.served.wire.rl2_wire import is_adapter, with_adapter
from RL2.errors import ConfigError
from RL2.parallel.processes import Processes
from RL2.workers.actor import Actor

SETTINGS = """train_data.path=x.jsonl train_data.prompts_per_rollout=2 rollout.env_path=x.py trainer.experiment_name=x
    rollout.train_sampling_params.max_new_tokens=1 actor.max_length_per_device=256 actor.lr=1e-3 actor.warmup_ratio=0
    actor.lora.rank=4 actor.lora.target_modules=[q_proj,v_proj]"""


def make_actor(model_type: str, folder: Path, processes: Processes, *overrides: str) -> Actor:
    """Return an actor whose adapters are not zero."""
    tiny_model(tiny_config(model_type)).save_pretrained(folder)
    config = load("ppo", [*SETTINGS.split(), f"actor.model_name={folder}", *overrides])
    actor = Actor(config.actor, processes, 10, folder)
    for name, parameter in actor.lm.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter)
    return actor


@pytest.mark.parametrize("model_type", ["qwen3", "qwen3_moe"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_server_makes_the_merged_weights_of_them(
    model_type: str, dtype: str, tmp_path: Path, processes: Processes
) -> None:
    actor = make_actor(model_type, tmp_path, processes, f"actor.dtype={dtype}")
    layout = served_layout(actor.lm, "vllm")
    parts = apart(actor, layout)
    base, adapters = dict(parts.base()), dict(parts.adapters())
    assert base.keys() == load_file(tmp_path / "model.safetensors").keys()
    assert len(adapters) == 3 * 2 * actor.lm.config.num_hidden_layers
    assert all(map(is_adapter, adapters)) and not any(map(is_adapter, base))

    merged = {name: x for one in actor.weights() for name, x in layout(*one).items()}
    there = {name: with_adapter(name, x, adapters).to(actor.dtype) for name, x in base.items()}
    assert all(torch.equal(there[name], x) for name, x in merged.items())
    changed = [name for name, x in merged.items() if not torch.equal(x, base[name].to(actor.dtype))]
    assert len(changed) == len(adapters) / 3


def test_what_has_no_effect_is_refused() -> None:
    def read(*overrides: str) -> None:
        load("ppo", [*SETTINGS.split(), "actor.model_name=x", "rollout.vllm.lora=adapter", *overrides])

    with pytest.raises(ConfigError, match=r"^rollout.vllm.lora=adapter has no effect with actor.lora.rank=0"):
        read("rollout.engine=vllm", "actor.lora.rank=0")
    with pytest.raises(
        ConfigError, match=r"^rollout.vllm.lora=adapter needs rollout.vllm.transport=files, and it is b"
    ):
        read("rollout.engine=vllm", "rollout.vllm.transport=broadcast")
