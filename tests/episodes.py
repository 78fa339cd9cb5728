"""One episode with an engine that says what a test wants."""

from __future__ import annotations

import asyncio
from typing import Any

from RL2.engines.base import Engine
from RL2.rollout.environment import Environment
from RL2.rollout.episode import run_episode
from RL2.types import Prompt, Sampling, Trajectory


def one_episode(
    prompt: Prompt, *, engine: Engine, environment: Environment, tokenizer: Any, sampling: Sampling, max_turns: int
) -> Trajectory:
    """Return the first sample of the first group, of any length."""
    episode = run_episode(
        prompt,
        engine=engine,
        environment=environment,
        tokenizer=tokenizer,
        sampling=sampling,
        max_turns=max_turns,
        max_length=None,
        group=0,
        sample=0,
        seed=0,
    )
    return asyncio.run(episode)
