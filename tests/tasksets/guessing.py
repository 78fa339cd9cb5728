"""A taskset of `verifiers` with an environment of its own: a number is guessed over several turns."""

from __future__ import annotations

import re

import verifiers.v1 as vf


class GuessingData(vf.TaskData):
    number: int


class GuessingTask(vf.Task[GuessingData]):
    @vf.reward(weight=1.0)
    async def found(self, trace: vf.Trace) -> float:
        return float(guess(trace.last_reply) == self.data.number)

    @vf.reward(weight=0.5)
    async def form(self, trace: vf.Trace) -> float:
        replies = [message.content or "" for message in trace.assistant_messages]
        return sum(any(character.isdigit() for character in reply) for reply in replies) / len(replies)

    @vf.metric
    async def guesses(self, trace: vf.Trace) -> float:
        return len(trace.assistant_messages)


class GuessingConfig(vf.TasksetConfig):
    num_tasks: int = 8


class GuessingTaskset(vf.Taskset[GuessingTask, GuessingConfig]):
    def load(self):  # type: ignore[no-untyped-def]
        for number in range(self.config.num_tasks):
            data = GuessingData(prompt=f"Guess, game {number}.", system_prompt="Numbers.", number=number)
            yield GuessingTask(data, self.config.task)


class GuessingEnvConfig(vf.EnvConfig):
    player: vf.AgentConfig = vf.AgentConfig()


class GuessingEnv(vf.Env[GuessingEnvConfig]):
    async def run(self, task: vf.Task, agents: vf.Agents) -> None:
        async with agents.player.interaction(task) as interaction:
            segment = await interaction.turn()
            while not segment.terminated and (said := guess(segment.last_reply)) != task.data.number:
                segment = await interaction.turn("No number." if said is None else f"Not {said}.")


def guess(text: str) -> int | None:
    found = re.search(r"\d{1,9}", text)
    return None if found is None else int(found[0])


__all__ = ["GuessingEnv", "GuessingTaskset"]
