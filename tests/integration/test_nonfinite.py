"""A loss that is not a number stops the run before it reaches the weights."""

from __future__ import annotations

import torch
from programs import World
from safetensors.torch import load_file


def test_a_run_that_blows_up_stops_before_the_optimizer_step(world: World) -> None:
    run = world.run("sft", "actor.lr=1e30")  # the first step is the last that can be computed
    assert run.process.returncode == 1
    *_, message = run.errors.splitlines()
    file = run.save_dir / "nonfinite_step_1.safetensors"
    assert message.startswith("sft: optimizer step 1: loss ")
    assert message.endswith(f", gradient norm nan; the step was not taken, and its batch is in {file}")
    assert "Traceback" not in run.errors

    assert [row["step"] for row in run.metrics] == [0]
    assert not (run.save_dir / "latest").exists()
    batch = load_file(file)
    assert len(batch["cu_seqlens"]) == 8 + 1
    assert batch["token_ids_T"].shape == batch["weight_T"].shape == (batch["cu_seqlens"][-1],)
    assert torch.isfinite(batch["weight_T"]).all()
