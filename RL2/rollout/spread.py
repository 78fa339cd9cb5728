"""Rollouts over all processes: each samples its share of the prompts, and then every process holds every trajectory."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from collections.abc import Sequence as Seq
from typing import Any, TypeVar

import torch
from transformers import PreTrainedTokenizerBase

from RL2.config.rollout import Rollout as RolloutConfig
from RL2.config.rollout import SamplingParams
from RL2.engines.base import Engine
from RL2.parallel.processes import Processes
from RL2.rollout.collect import Episodes, Group, finish, first_done
from RL2.rollout.environment import Environment
from RL2.types import Prompt, Sampling, Trajectory

T = TypeVar("T")
CLOSE_S = 30
"""How long a decoding step that is at work may take when everything ends."""
Progress = Callable[[int], None]


class Rollouts:
    """Begins episodes and hands out their trajectories.

    Episodes live in an event loop. It runs while somebody waits for one of them; with `rollout.max_staleness` and whole
    rollouts it runs all the time, in a thread, and so beside the training.
    """

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
        self.config, self.end_tokens, self.processes = config, end_tokens, processes
        self.episodes = Episodes(engine, environment, tokenizer, config.max_turns, max_length)
        self.runner = asyncio.Runner()
        self.thread: threading.Thread | None = None
        if config.is_async:
            threads = torch.get_num_threads()  # shared, or they would take each other's cores
            torch.set_num_threads(max(1, threads // 2))
            self.thread = threading.Thread(
                target=_serve,
                args=(self.runner.get_loop(), max(1, threads - threads // 2)),
                name="rollouts",
                daemon=True,
            )
            self.thread.start()

    def collect(
        self,
        prompts: Seq[Prompt],
        params: SamplingParams,
        responses_per_prompt: int,
        seed: int,
        progress: Progress,
        episodes: Episodes | None = None,
    ) -> list[Trajectory]:
        """Return `responses_per_prompt` trajectories of each prompt, in order; on every process the same (collective).

        `episodes` are played in place of the run's own.
        """
        return self.finish(self.begin(prompts, params, responses_per_prompt, seed, episodes=episodes), progress)

    def begin(
        self,
        prompts: Seq[Prompt],
        params: SamplingParams,
        responses_per_prompt: int,
        seed: int,
        *,
        first_group: int = 0,
        before: int = 0,
        version: int = 0,
        episodes: Episodes | None = None,
    ) -> list[Group]:
        """Start the episodes of this process's share of `prompts`; returns that share's groups.

        `seed` and the group, counted from `first_group`, make their random numbers; `before` groups have other seeds.
        """
        rank, size = self.processes.rank, self.processes.world_size
        sampling, played = self._sampling(params), episodes or self.episodes

        async def start() -> list[Group]:
            groups = []
            for group, prompt in enumerate(prompts, first_group):
                if group % size == rank:
                    tasks = played.begin(prompt, sampling, number=responses_per_prompt, group=group, seed=seed)
                    groups.append(Group(tasks, before + group, version))
            return groups

        return self._run(start())

    def finish(self, groups: Seq[Group], progress: Progress) -> list[Trajectory]:
        """Wait for these groups, and those of the other processes: all their trajectories, in order (collective)."""
        size = self.processes.world_size
        mine = self._run(finish(groups, lambda done: progress(done * size)))
        everywhere = self.processes.gather(mine, "the rollouts of all processes")
        return sorted(everywhere, key=lambda trajectory: (trajectory.group, trajectory.sample))

    def first_done(self, groups: Seq[Group], number: int, oldest: int) -> list[Group]:
        """Wait as `collect.first_done` does, for groups of this process only."""
        return self._run(first_done(groups, number, oldest))

    def close(self) -> None:
        """Cancel what is under way; may be called again."""
        if self.thread is not None and self.thread.is_alive():
            loop = self.runner.get_loop()
            loop.call_soon_threadsafe(loop.stop)
            self.thread.join(CLOSE_S)
            if self.thread.is_alive():
                return  # it is left to the end of the process
        self.runner.close()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        if self.thread is None:
            return self.runner.run(work)
        return asyncio.run_coroutine_threadsafe(work, self.runner.get_loop()).result()

    def _sampling(self, params: SamplingParams) -> Sampling:
        return Sampling(
            max_new_tokens=params.max_new_tokens,
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=params.top_k,
            stop=params.stop or (),
            stop_token_ids=self.end_tokens,
        )


def _serve(loop: asyncio.AbstractEventLoop, num_threads: int) -> None:
    """Both settings are of a thread: the main thread's do not count here."""
    torch.set_num_threads(num_threads)
    torch.set_flush_denormal(True)
    asyncio.set_event_loop(loop)
    loop.run_forever()
