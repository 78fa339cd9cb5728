"""Runs with `adv.estimator=branch`: continuations in a real loop, on one process and on two."""

from __future__ import annotations

import pytest
from programs import Run, World
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

BRANCH = (
    "adv.estimator=branch",
    "train_data.prompts_per_rollout=3",
    "train_data.responses_per_prompt=2",
    "rollout.branch.places=tokens",
    "rollout.branch.every=5",
    "rollout.branch.max_places=2",
    "rollout.branch.samples=2",
    "trainer.max_steps=2",
)
TREES = ("rollout.branch.train=true", "actor.avg_level=constant")


def run(world: World, *overrides: str, nproc: int = 1) -> Run:
    return world.run("ppo", *BRANCH, *overrides, nproc=nproc).succeeded()


def test_two_processes_train_trees_like_one(world: World) -> None:
    rewarded = (*TREES, world.reward("sum(map(ord, action)) % 2"))
    one, two = run(world, *rewarded), run(world, *rewarded, nproc=2)
    counted = ("train/tokens", "train/reward", "branch/tokens", "branch/places")
    shown = [[[row[key] for key in counted] for row in found.metrics] for found in (one, two)]
    assert shown[0] == shown[1], "the same responses and continuations"
    first = one.metrics[0]
    assert first["branch/tokens"] > 0 and first["branch/places"] > 1 and 0 < first["train/reward"] < 1
    for row in one.metrics:
        assert row["actor/logp_gap_max"] < 1e-4, "continuations come from the weights that train, after the same ids"
    norms = [[row["actor/grad_norm"] for row in found.metrics] for found in (one, two)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4) and norms[0][0] > 0
    before, (after, other) = load_file(world.weights), (load_file(found.weights) for found in (one, two))
    moved = sum(float((after[name] - x).square().sum()) for name, x in before.items())
    apart = sum(float((other[name] - x).square().sum()) for name, x in after.items())
    assert apart < 1e-4 * moved


def test_turns_are_continued_and_only_responses_train(world: World) -> None:
    """The environment goes on until a digit was said; places are the ends of turns."""
    turns = ("rollout.max_turns=3", "rollout.branch.places=turns", "rollout.branch.every=1")
    found = run(world, *turns, "rollout.train_sampling_params.max_new_tokens=4", "actor.max_length_per_device=512")
    first = found.metrics[0]
    assert 0 < first["branch/places"] <= 2
    assert first["branch/unscored"] == 0
    assert first["actor/tokens"] <= first["train/tokens"], "continuations do not train"
