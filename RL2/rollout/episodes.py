"""Episodes in groups: many at once, each process its share, and then every process holds every trajectory."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Protocol, TypeVar

import torch
from transformers import PreTrainedTokenizerBase

from RL2.config.rollout import SamplingParams
from RL2.data.template import Template
from RL2.engines.base import Engine
from RL2.parallel.processes import Processes
from RL2.rollout.environment import Environment
from RL2.rollout.episode import run_episode
from RL2.types import Prompt, Sampling, Trajectory

T = TypeVar("T")
CLOSE_S = 30
"""Seconds to wait at shutdown for a decoding step that is still in flight."""
Progress = Callable[[int], object]
"""Function that is told how many episodes more have ended."""


@dataclass(eq=False)
class Group:
    """The episodes of one prompt, in flight or ended."""

    tasks: list[asyncio.Task[Trajectory]]
    number: int
    """Place among all groups of the run."""
    version: int = 0
    """Version of the weights that it began with."""

    @property
    def is_done(self) -> bool:
        return all(task.done() for task in self.tasks)


class Player(Protocol):
    """Another way to play an episode, such as a program of the user that asks for responses."""

    async def play(
        self,
        prompt: Prompt,
        *,
        environment: Environment,
        sampling: Sampling,
        max_turns: int,
        group: int,
        sample: int,
        seed: int,
    ) -> Trajectory:
        """Return an episode of `prompt`; `group`, `sample` and `seed` make its random numbers."""
        ...

    async def close(self) -> None:
        """Release all resources; may be called again."""
        ...


@dataclass(frozen=True)
class EpisodeSetting:
    """Everything that episodes have in common: who plays, against what, and for how long."""

    engine: Engine
    environment: Environment
    tokenizer: PreTrainedTokenizerBase
    max_turns: int
    max_length: int | None
    """Limit of a sequence in tokens."""
    analysed: Template | None = None
    """The tokenizer's chat template, if it has been analysed before."""
    player: Player | None = None
    """Another way to play episodes; None: engine and environment in turn."""

    @cached_property
    def template(self) -> Template:
        """The tokenizer's chat template."""
        return self.analysed or Template(self.tokenizer)

    def begin(
        self, prompt: Prompt, sampling: Sampling, *, number: int, group: int, seed: int
    ) -> list[asyncio.Task[Trajectory]]:
        """Start `number` episodes of `prompt` in the running event loop; first requests keep the order of the calls.

        `seed`, `group` and the number of the episode make its random numbers.
        """
        play: Callable[..., Coroutine[Any, Any, Trajectory]]
        if self.player is not None:
            play = self.player.play
        else:
            play = partial(
                run_episode,
                engine=self.engine,
                tokenizer=self.tokenizer,
                max_length=self.max_length,
                template=self.template,
            )
        play = partial(
            play,
            prompt,
            environment=self.environment,
            sampling=sampling,
            max_turns=self.max_turns,
            group=group,
            seed=seed,
        )
        return [asyncio.create_task(play(sample=sample)) for sample in range(number)]


def begin(
    setting: EpisodeSetting,
    prompts: Seq[tuple[int, Prompt]],
    sampling: Sampling,
    *,
    number: int,
    seed: int,
    first: int = 0,
    version: int = 0,
) -> list[Group]:
    """Start a group of `number` episodes of each prompt in the running event loop, and return the groups.

    `prompts` come with the places of their groups among those of one `seed`; both make the random numbers of a group.
    `first` is the number in the run of the group at place 0.
    """
    return [
        Group(setting.begin(prompt, sampling, number=number, group=place, seed=seed), first + place, version)
        for place, prompt in prompts
    ]


async def finish(groups: Seq[Group], progress: Progress | None = None) -> list[Trajectory]:
    """Return all trajectories of `groups`, in order and under their numbers. `progress(1)` is called for each episode.

    If one raises, the others are cancelled.
    """
    tasks = [task for group in groups for task in group.tasks]
    if progress is not None:
        for task in tasks:
            task.add_done_callback(lambda _: progress(1))
    await _all(tasks)
    return [replace(task.result(), group=group.number) for group in groups for task in group.tasks]


async def _all(tasks: Seq[asyncio.Task[Any]]) -> None:
    """Wait for `tasks`; if one raises, cancel the others."""
    try:
        await asyncio.gather(*tasks)
    except BaseException:  # not a TaskGroup: the caller wants the error itself, not a group of them
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


async def first_done(groups: Seq[Group], number: int, oldest: int) -> list[Group]:
    """Wait for `number` of `groups`: those that began with weights `oldest` or older, then whichever end first."""
    while True:
        chosen = sorted(groups, key=lambda group: (group.version > oldest, not group.is_done))[:number]
        if all(group.is_done for group in chosen):
            return chosen
        open_tasks = [task for group in groups for task in group.tasks if not task.done()]
        await asyncio.wait(open_tasks, return_when=asyncio.FIRST_COMPLETED)


class Episodes:
    """Groups of episodes on this process, and the trajectories of all processes.

    Episodes run in an event loop. It runs while a caller waits for one of them; with `is_async` it always runs, in a
    thread, and so overlaps with training.
    """

    def __init__(
        self, setting: EpisodeSetting, end_tokens: tuple[int, ...], processes: Processes, is_async: bool = False
    ) -> None:
        """Take `end_tokens`, which end a response; with `is_async`, start the thread of the event loop."""
        self.setting, self.end_tokens, self.processes = setting, end_tokens, processes
        self.runner = asyncio.Runner()
        self.is_closed = False
        self.thread: threading.Thread | None = None
        if is_async:
            threads = torch.get_num_threads()  # shared, or they would take each other's cores
            torch.set_num_threads(max(1, threads // 2))
            self.thread = threading.Thread(
                target=_serve,
                args=(self.runner.get_loop(), max(1, threads - threads // 2)),
                name="rollouts",
                daemon=True,
            )
            self.thread.start()

    def play(
        self,
        prompts: Seq[Prompt],
        params: SamplingParams,
        responses_per_prompt: int,
        seed: int,
        progress: Progress,
        setting: EpisodeSetting | None = None,
    ) -> list[Trajectory]:
        """Return `responses_per_prompt` trajectories of each prompt, in order; on every process the same (collective).

        `setting` takes the place of the run's own.
        """
        groups = self.begin(list(enumerate(prompts)), params, responses_per_prompt, seed, setting=setting)
        return self.finish(groups, progress)

    def begin(
        self,
        prompts: Seq[tuple[int, Prompt]],
        params: SamplingParams,
        responses_per_prompt: int,
        seed: int,
        *,
        first: int = 0,
        version: int = 0,
        setting: EpisodeSetting | None = None,
    ) -> list[Group]:
        """Start the groups that are this process's own, and return them.

        `prompts` come with the places of their groups among those of one seed: the place says which process samples a
        group, and with `seed` what its random numbers are. `first` is the number in the run of the group at place 0.
        """
        rank, size = self.processes.rank, self.processes.world_size
        mine = [(place, prompt) for place, prompt in prompts if place % size == rank]
        sampling, setting = self.sampling(params), setting or self.setting

        async def start() -> list[Group]:
            return begin(setting, mine, sampling, number=responses_per_prompt, seed=seed, first=first, version=version)

        return self._run(start())

    def finish(self, groups: Seq[Group], progress: Progress) -> list[Trajectory]:
        """Wait for these groups and those of the other processes; return all trajectories, in order (collective)."""
        size = self.processes.world_size
        mine = self._run(finish(groups, lambda done: progress(done * size)))
        everywhere = self.processes.gather(mine, "the rollouts of all processes")
        return sorted(everywhere, key=lambda trajectory: (trajectory.group, trajectory.sample))

    def share_out(self, work: Seq[Callable[[], Coroutine[Any, Any, T]]], progress: Progress) -> list[T]:
        """Do `work`, each process its share of it; return all results, in order and on every process (collective)."""
        rank, size = self.processes.rank, self.processes.world_size
        mine = range(rank, len(work), size)

        async def one(number: int) -> tuple[int, T]:
            result = await work[number]()
            progress(size)
            return number, result

        async def all_of_mine() -> list[tuple[int, T]]:
            tasks = [asyncio.create_task(one(number)) for number in mine]
            await _all(tasks)
            return [task.result() for task in tasks]

        everywhere = self.processes.gather(self._run(all_of_mine()), "the continuations of all processes")
        return [result for _, result in sorted(everywhere, key=lambda each: each[0])]

    def first_done(self, groups: Seq[Group], number: int, oldest: int) -> list[Group]:
        """Wait as the function `first_done` does, for groups of this process only."""
        return self._run(first_done(groups, number, oldest))

    def close(self) -> None:
        """Cancel the episodes in flight; may be called again."""
        if self.is_closed:
            return
        self.is_closed = True
        if self.thread is not None and self.thread.is_alive():
            loop = self.runner.get_loop()
            loop.call_soon_threadsafe(loop.stop)
            self.thread.join(CLOSE_S)
            if self.thread.is_alive():
                return  # it is left to the end of the process
        if self.setting.player is not None:
            self.runner.get_loop().run_until_complete(self.setting.player.close())
        self.runner.close()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        if self.thread is None:
            return self.runner.run(work)
        return asyncio.run_coroutine_threadsafe(work, self.runner.get_loop()).result()

    def sampling(self, params: SamplingParams) -> Sampling:
        """Return the settings of a request without its seed."""
        return Sampling(
            max_new_tokens=params.max_new_tokens,
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=params.top_k,
            min_p=params.min_p,
            stop=params.stop or (),
            stop_token_ids=self.end_tokens,
        )


def _serve(loop: asyncio.AbstractEventLoop, num_threads: int) -> None:
    """Run `loop` in this thread; both settings belong to a thread, and the main thread's do not count here."""
    torch.set_num_threads(num_threads)
    torch.set_flush_denormal(True)
    asyncio.set_event_loop(loop)
    loop.run_forever()
