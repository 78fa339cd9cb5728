"""Updates with router replay: what the engine's experts, or those of the old policy, change in the metrics."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_config, tiny_model

from RL2.batch.packing import pack
from RL2.config.load import load
from RL2.config.model import ReplayedMoe
from RL2.config.programs import RLConfig
from RL2.config.values import build
from RL2.errors import ConfigError
from RL2.models.routing import RoutingSums
from RL2.parallel.processes import Processes
from RL2.types import Sequence, StatsRequest, TokenBatch, Trajectory
from RL2.workers.actor import Actor

Make = Callable[..., Actor]


@pytest.fixture
def make(tmp_path: Path, processes: Processes) -> Make:
    """Return a function from settings to an actor with experts."""

    def make(*overrides: str, model_type: str = "qwen3_moe") -> Actor:
        tiny_model(tiny_config(model_type)).save_pretrained(tmp_path / model_type)
        return Actor(configured(tmp_path / model_type, *overrides).actor, processes, 9, tmp_path)

    return make


def configured(folder: Path, *overrides: str) -> Any:
    given = f"""actor.model_name={folder} actor.max_length_per_device=30 train_data.path=x trainer.save_dir={folder}
        train_data.prompts_per_rollout=2 rollout.env_path=x rollout.train_sampling_params.max_new_tokens=9
        trainer.experiment_name=x"""
    return load("ppo", [*given.split(), *overrides])


def batch(actor: Actor) -> TokenBatch:
    """Four sequences with log-probabilities of an engine that took other experts for the first token of each."""
    generator = torch.Generator().manual_seed(0)
    trajectories = []
    for n, length in enumerate((12, 20, 9, 19)):
        ids = torch.randint(4, 300, (length,), generator=generator).tolist()
        mask = [False] * 4 + [True] * (length - 4)
        trajectories.append(Trajectory(n, n, 0, [Sequence(ids, mask, [0.0] * length, [0.0] * length)], score=1.0))
    made = pack(trajectories)
    own = RoutingSums(actor.policy.routers, records=True)
    actor.stats(made, StatsRequest(("logp",)), 100, routing=own)
    assert own.experts_T is not None
    experts_T = own.experts_T.clone()
    experts_T[made.cu_seqlens[:-1]] = (experts_T[made.cu_seqlens[:-1]] + 1) % 4
    made = made.with_(experts_T=experts_T, advantage_T=torch.ones(len(made.labels_T)))
    follows = RoutingSums(actor.policy.routers, follows=True)
    return made.with_(engine_logp_T=actor.stats(made, StatsRequest(("logp",)), 100, routing=follows).logp)


def test_with_the_engines_experts_trainer_and_engine_agree(make: Make) -> None:
    gaps, changed = {}, {}
    for replay in ("none", "compare", "engine"):
        actor = make(f"actor.moe.replay={replay}")
        made = batch(actor)
        metrics = actor.update(made if replay != "none" else replace(made, experts_T=None))
        gaps[replay], changed[replay] = metrics["actor/logp_gap"], metrics.get("actor/moe/routes_changed")
    assert gaps["engine"] < 1e-5 < 0.01 < gaps["none"]
    assert gaps["compare"] == gaps["none"]
    assert changed["none"] is None
    assert changed["compare"] is not None and changed["engine"] is not None
    # of the first tokens, in the first layer: then the second layer may choose otherwise too
    assert 0 < changed["compare"] <= changed["engine"] < 0.5


def test_old_log_probabilities_take_the_engines_experts_too(make: Make) -> None:
    for replay, agrees in (("engine", True), ("compare", False)):
        actor = make(f"actor.moe.replay={replay}", "actor.update_per_rollout=2")
        made = actor.add_old_logprobs(batch(actor))
        assert made.old_logp_T is not None and made.engine_logp_T is not None
        gap_A = (made.old_logp_T - made.engine_logp_T)[made.action_T].abs()
        assert (float(gap_A.max()) < 1e-5) is agrees


def test_experts_of_the_old_policy_are_recorded_and_taken(make: Make) -> None:
    actor = make("actor.moe.replay=old", "actor.update_per_rollout=2", "actor.lr=0")
    made = actor.add_old_logprobs(replace(batch(actor), experts_T=None))
    own = RoutingSums(actor.policy.routers, records=True)
    actor.stats(made, StatsRequest(("logp",)), 100, routing=own)
    assert own.experts_T is not None and made.experts_T is not None
    assert torch.equal(made.experts_T, own.experts_T)
    assert actor.update(made)["actor/moe/routes_changed"] == 0
    with torch.no_grad():
        for router in actor.policy.routers.all:
            router.module.weight.neg_()  # type: ignore[operator]
    assert actor.update(made)["actor/moe/routes_changed"] > 0.5


def test_tokens_without_experts_are_refused(make: Make) -> None:
    actor = make("actor.moe.replay=engine")
    with pytest.raises(ConfigError, match=r"^actor\.moe\.replay=engine: no experts were recorded with these tokens"):
        actor.update(replace(batch(actor), experts_T=None))


def test_what_cannot_be_replayed_is_refused(make: Make, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^actor\.moe\.replay=engine: Qwen3ForCausalLM has no router that transfo"):
        make("actor.moe.replay=engine", model_type="qwen3")
    with pytest.raises(ConfigError, match=r"^actor\.moe\.replay=old has no effect with actor\.update_per_rollout=1"):
        configured(tmp_path, "actor.moe.replay=old")
    with pytest.raises(ConfigError, match=r"^actor\.moe\.replay=engine needs rollout\.engine=embedded, and it is vllm"):
        configured(tmp_path, "actor.moe.replay=engine", "rollout.engine=vllm")


def test_the_configuration_of_a_run_without_these_keys_has_their_defaults(tmp_path: Path) -> None:
    """`rl2 replay` reads configurations of earlier runs."""
    values = json.loads(json.dumps(asdict(configured(tmp_path))))
    del values["actor"]["moe"]
    assert build(RLConfig, values, "").actor.moe == ReplayedMoe()
