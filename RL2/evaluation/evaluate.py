"""A saved model on a data set: one score a problem."""

from __future__ import annotations

import asyncio
from pathlib import Path

import torch

from RL2.data.prompts import load_prompts
from RL2.engines.embedded.engine import EmbeddedEngine
from RL2.models.policy import end_tokens, load_model, load_tokenizer, max_length
from RL2.rollout.collect import collect, unscored_causes
from RL2.rollout.environment import load_environment
from RL2.rollout.episode import decode
from RL2.types import Sampling


def evaluate_model(
    model_dir: str | Path,
    data_path: str | Path,
    env_path: str | Path,
    *,
    temperature: float,
    max_new_tokens: int,
    seed: int,
    timeout_s: float = 60.0,
) -> list[float]:
    """The score of one response to each problem, in the order of the data file, in float32 on the CPU.

    Temperature 0 is greedy. Raises RuntimeError if the environment could not score a response.
    """
    tokenizer, lm = load_tokenizer(str(model_dir)), load_model(str(model_dir), torch.float32)
    environment = load_environment(env_path, timeout_s)
    longest = max_length(str(model_dir))
    prompts = load_prompts(str(data_path), tokenizer, environment.example, longest - 1)
    engine = EmbeddedEngine(lm, decode=lambda ids: decode(tokenizer, ids), max_running_requests=256, memory_share=0.5)
    sampling = Sampling(max_new_tokens, temperature, stop_token_ids=end_tokens(lm, tokenizer))
    trajectories = asyncio.run(
        collect(
            prompts,
            engine=engine,
            environment=environment,
            tokenizer=tokenizer,
            sampling=sampling,
            responses_per_prompt=1,
            max_turns=1,
            max_length=longest,
            seed=seed,
        )
    )
    environment.close()
    engine.close()
    if causes := unscored_causes(trajectories):
        raise RuntimeError(f"{causes.total()} responses could not be scored: {causes.most_common(3)}")
    return [trajectory.score for trajectory in trajectories]
