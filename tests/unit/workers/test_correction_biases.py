"""Correction biases of routers: moved against the load after an update, saved, exported, or left as they are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import tiny_config, tiny_model
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from RL2.batch.packing import pack_tokens
from RL2.config.load import load
from RL2.config.programs import trained
from RL2.errors import ConfigError
from RL2.io import checkpoint
from RL2.models.policy import export, named_weights
from RL2.models.routing import RoutingSums
from RL2.parallel.processes import Processes
from RL2.types import StatsRequest, TokenBatch
from RL2.workers.learner import Learner
from RL2.workers.passes import forward

REQUEST = StatsRequest(("logp",))
LENGTHS = (12, 30, 23, 29)


def learner(folder: Path, processes: Processes, *overrides: str, model_type: str = "glm4_moe") -> Learner:
    tiny_model(tiny_config(model_type)).save_pretrained(folder / model_type)
    given = f"""data.path=x.jsonl data.max_length=99 data.batch_size=1 actor.model_name={folder / model_type}
        actor.max_length_per_device=40 trainer.experiment_name=x"""
    _, config = trained(load("sft", [*given.split(), *overrides]))
    return Learner(config, processes, 2, folder)


def batch() -> TokenBatch:
    generator = torch.Generator().manual_seed(0)
    made = pack_tokens([torch.randint(4, 300, (length,), generator=generator).tolist() for length in LENGTHS])
    return made.with_(weight_T=made.action_T / made.action_T.sum())


def bias(made: Learner) -> Tensor:
    (router,) = made.policy.routers.all
    assert router.bias_E is not None
    return router.bias_E


def step(made: Learner) -> dict[str, float]:
    return made.step(batch(), lambda stats, _: (-stats.logp, {}), REQUEST)


def test_each_moves_against_the_load_of_the_update(tmp_path: Path, processes: Processes) -> None:
    made = learner(tmp_path, processes, "actor.moe.bias_rate=0.125")
    seen, before = RoutingSums(made.policy.routers), bias(made).clone()
    with torch.no_grad():
        forward(made.policy, batch(), REQUEST, seen)
    (load_E,) = seen.load_LE
    step(made)
    wanted = torch.where(load_E > load_E.mean(), -0.125, torch.where(load_E < load_E.mean(), 0.125, 0.0))
    assert wanted.any()
    assert torch.equal(bias(made) - before, wanted)


def test_the_load_becomes_even(tmp_path: Path, processes: Processes) -> None:
    made = learner(tmp_path, processes, "actor.moe.bias_rate=0.02", "actor.lr=0")
    loads = [step(made)["moe/load_max"] for _ in range(30)]
    assert sum(loads[-5:]) / 5 < loads[0]
    assert sum(loads[-5:]) / 5 < 1.2


def test_it_stays_by_default(tmp_path: Path, processes: Processes) -> None:
    made = learner(tmp_path, processes)
    before = bias(made).clone()
    step(made)
    assert torch.equal(bias(made), before)


def test_the_engine_a_checkpoint_and_an_export_have_it(
    tmp_path: Path, processes: Processes, tokenizer: PreTrainedTokenizerBase
) -> None:
    made = learner(tmp_path, processes, "actor.moe.bias_rate=0.125")
    step(made)
    (name,) = (name for name, _ in made.lm.named_buffers() if "e_score_correction_bias" in name)
    assert torch.equal(dict(named_weights(made.lm))[name], bias(made))
    state = checkpoint._state({"": made})
    assert torch.equal(state["model"][f"lm.{name}"], bias(made))
    other = learner(tmp_path, processes)
    checkpoint._restore(other, state["model"], state["optimizer"])
    assert torch.equal(bias(other), bias(made))
    export(made.lm, tokenizer, tmp_path / "export", write=True)
    assert torch.equal(load_file(tmp_path / "export" / "model.safetensors")[name], bias(made))


def test_a_model_without_one_is_refused(tmp_path: Path, processes: Processes) -> None:
    with pytest.raises(
        ConfigError,
        match=r"^actor\.moe\.bias_rate=0\.1: MixtralForCausalLM has routers without a buffer e_score_correction_bias",
    ):
        learner(tmp_path, processes, "actor.moe.bias_rate=0.1", model_type="mixtral")


def test_they_are_not_moved_beside_adapters(tmp_path: Path, processes: Processes) -> None:
    """An adapter is exported without them, and the reference without the adapter would have them."""
    with pytest.raises(ConfigError, match=r"^actor.moe.bias_rate=0.1 changes the base model, which actor.lora.rank=4"):
        learner(tmp_path, processes, "actor.moe.bias_rate=0.1", "actor.lora.rank=4")
