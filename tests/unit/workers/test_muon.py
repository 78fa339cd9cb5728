"""Muon: its steps are those of torch's optimizers, its state is kept, and what it cannot do is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from rl_settings import rl_config
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from transformers import Qwen3Config, Qwen3ForCausalLM

from RL2.batch.packing import loss_weights, pack
from RL2.config.model import num_shards
from RL2.errors import ConfigError
from RL2.parallel.processes import Processes
from RL2.types import Sequence, Trajectory
from RL2.workers.actor import Actor
from RL2.workers.muon import MuonAdamW, layer_matrices, muon_adamw

SETTINGS: dict[str, Any] = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}


def tiny() -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=51, hidden_size=32, intermediate_size=48, **sizes))


def ours(lm: Qwen3ForCausalLM) -> MuonAdamW:
    return muon_adamw(lm.parameters(), layer_matrices(lm), **SETTINGS)


def backward(lm: Qwen3ForCausalLM, step: int) -> None:
    ids = torch.randint(51, (2, 9), generator=torch.Generator().manual_seed(step))
    lm(ids, labels=ids).loss.backward()


def assert_same_weights(one: Qwen3ForCausalLM, other: Qwen3ForCausalLM) -> None:
    for (name, mine), theirs in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs), name


def test_steps_are_those_of_muon_on_matrices_and_of_adamw_on_the_rest() -> None:
    lm, theirs = tiny(), tiny()
    optimizer = ours(lm)
    matrices = [p for name, p in theirs.named_parameters() if name.endswith("_proj.weight")]
    assert len(matrices) == 2 * 7
    chosen = {id(p) for p in matrices}
    decay = SETTINGS["weight_decay"]
    rest = [p for p in theirs.parameters() if id(p) not in chosen]
    muon = torch.optim.Muon(matrices, lr=0.01, weight_decay=decay, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    groups = [
        {"params": [p for p in rest if p.ndim == 2], "weight_decay": decay},
        {"params": [p for p in rest if p.ndim == 1], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.99), eps=1e-8)
    for step in range(3):
        for model, optimizers in ((lm, [optimizer]), (theirs, [muon, adamw])):
            backward(model, step)
            for each in optimizers:
                each.step()
            model.zero_grad()
    assert_same_weights(lm, theirs)


def test_a_restored_state_goes_on_exactly() -> None:
    lm = tiny()
    optimizer = ours(lm)
    for step in range(2):
        backward(lm, step)
        optimizer.step()
        optimizer.zero_grad()
    again = tiny()
    restored = ours(again)
    weights, state = copy.deepcopy(get_state_dict(lm, optimizer))
    own = get_state_dict(again, restored)[1]
    state = {"state": state["state"], "param_groups": own["param_groups"]}
    set_state_dict(again, restored, model_state_dict=weights, optim_state_dict=state)
    assert_same_weights(lm, again)
    for model, each in ((lm, optimizer), (again, restored)):
        backward(model, 2)
        each.step()
    assert_same_weights(lm, again)


def test_an_update_of_the_policy_takes_it(tmp_path: Path, processes: Processes) -> None:
    tiny().save_pretrained(tmp_path)
    config = rl_config(f"actor.model_name={tmp_path}", "actor.optimizer=muon", "actor.lr=1e-3").actor
    actor = Actor(config, processes, 10, tmp_path)
    mask = [False, *[True] * 5]
    values = [0.0] * 6
    batch = pack([Trajectory(n, n, 0, [Sequence([n, 7, 3, 40, 5, 6], mask, values, values)]) for n in range(3)])
    batch = batch.with_(advantage_T=batch.action_T.float(), weight_T=loss_weights(batch))
    before = {name: p.detach().clone() for name, p in actor.lm.named_parameters()}
    metrics = actor.update(batch)
    assert metrics["actor/changed_share"] > 0.9
    assert metrics["actor/update_ratio"] == pytest.approx(1, abs=0.01)  # of what AdamW moves
    change = actor.lm.get_parameter("model.layers.0.mlp.up_proj.weight").detach()
    change = change * 1.0 - before["model.layers.0.mlp.up_proj.weight"] * (1 - 1e-3 * config.weight_decay)
    values_S = torch.linalg.svdvals(change / (1e-3 * 0.2 * 48**0.5))  # all near 1, whatever the gradient
    rank = 3 * 5  # the gradient is of 15 tokens
    assert (values_S[: rank // 2] > 0.5).all()
    assert (values_S < 1.3).all()


def test_what_it_needs_is_said() -> None:
    config = rl_config("actor.optimizer=muon").actor
    assert num_shards(config, 1, "actor") == 1
    with pytest.raises(ConfigError, match=r"actor.optimizer=muon needs whole matrices .*: set actor.ddp_size=4"):
        num_shards(config, 4, "actor")
    assert num_shards(rl_config("actor.optimizer=muon", "actor.ddp_size=4").actor, 4, "actor") == 1
    with pytest.raises(ConfigError, match=r"actor.optimizer=muon needs actor.lora.rank=0"):
        rl_config("actor.optimizer=muon", "actor.lora.rank=4")
