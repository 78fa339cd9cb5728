"""Rollouts over all processes: each samples its share of the prompts, and then every process holds every trajectory."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from collections.abc import Sequence as Seq

from transformers import PreTrainedTokenizerBase

from RL2.config import Rollout as RolloutConfig
from RL2.config import SamplingParams
from RL2.engines.base import Engine
from RL2.parallel.processes import Processes
from RL2.rollout.collect import collect
from RL2.rollout.environment import Environment
from RL2.types import Prompt, Sampling, Trajectory


class Rollouts:
    """Everything that an episode needs, put together once."""

    def __init__(
        self,
        config: RolloutConfig,
        *,
        engine: Engine,
        environment: Environment,
        tokenizer: PreTrainedTokenizerBase,
        end_tokens: tuple[int, ...],
        max_length: int,
        processes: Processes,
    ) -> None:
        """`end_tokens` end a response; `max_length` is the limit of a whole sequence in tokens."""
        self.config, self.engine, self.environment, self.tokenizer = config, engine, environment, tokenizer
        self.end_tokens, self.max_length, self.processes = end_tokens, max_length, processes

    def collect(
        self,
        prompts: Seq[Prompt],
        params: SamplingParams,
        responses_per_prompt: int,
        seed: int,
        progress: Callable[[int], None],
        first_group: int = 0,
    ) -> list[Trajectory]:
        """`responses_per_prompt` trajectories of each prompt, in order, the same list on every process (collective)."""
        rank, size = self.processes.rank, self.processes.world_size
        first, last = (len(prompts) * i // size for i in (rank, rank + 1))
        mine = asyncio.run(
            collect(
                prompts[first:last],
                engine=self.engine,
                environment=self.environment,
                tokenizer=self.tokenizer,
                sampling=self._sampling(params),
                responses_per_prompt=responses_per_prompt,
                max_turns=self.config.max_turns,
                max_length=self.max_length,
                seed=seed,
                first_group=first_group + first,
                progress=lambda done: progress(done * size),
            )
        )
        return self.processes.gather(mine, "the rollouts of all processes")

    def _sampling(self, params: SamplingParams) -> Sampling:
        return Sampling(
            max_new_tokens=params.max_new_tokens,
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=params.top_k,
            stop=params.stop or (),
            stop_token_ids=self.end_tokens,
        )
