"""A reference that follows the policy: the same numbers, and settings that would lose it are refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rl_settings import rl_config

from RL2.batch.packing import pack_tokens
from RL2.errors import ConfigError
from RL2.parallel.processes import Processes
from RL2.tools.reproduce.model import build_model
from RL2.tools.reproduce.problems import Demonstrator, draw_problems
from RL2.trainer.build import refuse_lost_reference
from RL2.trainer.rl import refresh_reference
from RL2.trainer.unused_settings import refuse_unused_settings
from RL2.workers.actor import Actor, RefActor

KL = "actor.kl.coef=0.1"


@pytest.fixture
def models(tmp_path: Path) -> Iterator[tuple[Any, Actor, RefActor]]:
    rng = Random(0)
    texts = [Demonstrator().solve(problem, rng) for problem in draw_problems(rng, 20, held_out=False)]
    build_model(tmp_path / "model", texts, seed=0)
    settings = (
        KL,
        f"actor.model_name={tmp_path / 'model'}",
        "ref_actor.sync_every=2",
        "actor.max_length_per_device=64",
    )
    config = rl_config(*settings)
    processes = Processes.start(timeout_s=60)
    actor = Actor(config.actor, processes, 9, tmp_path)
    yield config, actor, RefActor(config.ref_actor, config.actor, actor.mesh, processes)
    processes.stop()


def test_the_reference_becomes_the_policy_when_it_is_time(models: tuple[Any, Actor, RefActor]) -> None:
    config, actor, reference = models
    parts: Any = SimpleNamespace(actor=actor, reference=reference)
    batch = pack_tokens([list(range(5, 19)), list(range(30, 20, -1))])
    first_T = reference.logp(batch)
    with torch.no_grad():
        for weight in actor.policy.parameters():
            weight.add_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    policy_T = actor.stats(batch, reference.request, reference.limit).logp
    assert (policy_T - first_T).abs().max() > 0.1
    for step in (0, 1, 3):
        refresh_reference(parts, config, step)
        assert torch.equal(reference.logp(batch), first_T)
    refresh_reference(parts, config, 2)
    assert torch.equal(reference.logp(batch), policy_T)
    assert not any(weight.requires_grad for weight in reference.policy.parameters())
    own = dict(actor.policy.named_parameters())
    assert all(weight.data_ptr() != own[name].data_ptr() for name, weight in reference.policy.named_parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("trainer.save_freq=5",), r"trainer\.save_freq=5 is no multiple of ref_actor\.sync_every=2"),
        (
            ("ref_actor.model_name=other",),
            r"ref_actor\.sync_every=2 needs ref_actor\.model_name to be actor\.model_name",
        ),
        (("actor.lora.rank=4",), r"ref_actor\.sync_every=2 needs actor\.lora\.rank=0, and it is 4"),
    ],
)
def test_a_reference_that_cannot_follow_is_refused(settings: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        rl_config(KL, "ref_actor.sync_every=2", *settings)


def test_a_run_does_not_resume_without_its_reference() -> None:
    config = rl_config(KL, "ref_actor.sync_every=2", "trainer.save_freq=4")
    refuse_lost_reference(config, 4)
    with pytest.raises(ConfigError, match=r"the checkpoint of step 3 is between two refreshes of the reference"):
        refuse_lost_reference(config, 3)
    with pytest.raises(ConfigError, match=r"ref_actor\.sync_every=2 has no effect: no reference is loaded"):
        refuse_unused_settings(rl_config("ref_actor.sync_every=2"))
