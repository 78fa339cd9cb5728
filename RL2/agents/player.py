"""Episodes in which an agent, a program of its own, asks the policy for responses through the endpoint."""

from __future__ import annotations

import asyncio
import copy
import secrets
from functools import partial
from typing import Any

from RL2.agents.endpoint import MODEL, Endpoint
from RL2.agents.programs import Agent, Programs
from RL2.agents.session import Policy, Session
from RL2.agents.task import task_of
from RL2.errors import one_line
from RL2.rollout.continuation import decode, without_end
from RL2.rollout.environment import Environment
from RL2.rollout.episode import assign_rewards, exclude_from_training, request_seed, sum_up
from RL2.rollout.step_result import StepResult, Unscored, checked
from RL2.types import Prompt, Sampling, Trajectory

FIELDS = {"reward", "score", "answer", "metrics"}
"""Fields of what an agent leaves as its reward."""


class AgentPlayer:
    """Plays episodes with one agent: a `Player` of episodes."""

    def __init__(
        self, agent: Agent, policy: Policy, timeout_s: float, max_running: int, variables: tuple[str, ...] = ()
    ) -> None:
        """Take an agent, of which at most `max_running` processes run at once, each for at most `timeout_s`.

        `variables` are names of environment variables that it gets although they have secrets.
        """
        self.policy, self.timeout_s = policy, timeout_s
        self.programs = Programs(agent, variables)
        self._slots = asyncio.Semaphore(max_running)
        self._endpoint: Endpoint | None = None
        self._starting = asyncio.Lock()

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
        """Let an agent work on `prompt`, and return what it sampled with its reward.

        An agent that fails, takes too long or leaves no reward makes the trajectory unscored; errors of the engine are
        raised.
        """
        session = Session(self.policy, sampling, request_seed(seed, group, sample, 0), max_turns)
        trajectory = Trajectory(row=prompt.row, group=group, sample=sample)
        extra_info = copy.deepcopy(prompt.extra_info)
        left: dict[str, Any] | None = None
        result: StepResult | None = None
        try:
            task = await task_of(prompt, environment, extra_info, sampling, request_seed(seed, group, 0, 0))
            task["max_turns"] = max_turns
            async with self._slots:
                left = await self._run(task, session)
            if session.failure is not None:
                raise session.failure
            if not session.record.turns:
                raise Unscored("the agent asked for no response")
            result = await _judged(left, session, environment, extra_info, sampling)
        except Unscored as error:
            trajectory.unscored = error.cause
        if session.failure is not None:  # the agent may have failed of it
            raise session.failure
        _fill(trajectory, session, result, environment, has_answer="answer" in (left or {}))
        return trajectory

    async def close(self) -> None:
        """End all agents and close the endpoint; may be called again."""
        await self.programs.close()
        if self._endpoint is not None:
            await self._endpoint.close()
            self._endpoint = None

    async def _run(self, task: dict[str, Any], session: Session) -> dict[str, Any] | None:
        """Return what the agent left as its reward."""
        async with self._starting:
            if self._endpoint is None:
                self._endpoint = Endpoint()
                await self._endpoint.start()
        key = secrets.token_urlsafe(24)
        with self._endpoint.serving(key, session):
            return await self.programs.run(
                task, addresses(self._endpoint.url, key), self.timeout_s, lambda: session.failure is not None
            )


def addresses(url: str, key: str) -> dict[str, str]:
    """Return the environment variables with which the clients of OpenAI and Anthropic find the endpoint."""
    return {
        "OPENAI_BASE_URL": f"{url}/v1",
        "OPENAI_API_BASE": f"{url}/v1",  # its older name, which some frameworks read
        "OPENAI_API_KEY": key,
        "OPENAI_MODEL": MODEL,
        "OPENAI_AGENTS_DISABLE_TRACING": "1",  # its SDK would send every episode to OpenAI, and wait for it at the end
        "ANTHROPIC_BASE_URL": url,
        "ANTHROPIC_API_KEY": key,
        "NO_PROXY": "127.0.0.1,localhost",
        "no_proxy": "127.0.0.1,localhost",
    }


async def _judged(
    left: dict[str, Any] | None,
    session: Session,
    environment: Environment,
    extra_info: dict[str, Any],
    sampling: Sampling,
) -> StepResult:
    """Return the reward of an episode: what the agent left, or what the environment's `step` says of its answer.

    The answer is the one that the agent left, else the last response. Raise Unscored if there is no reward.
    """
    left = left or {}
    if unknown := sorted(left.keys() - FIELDS):
        raise Unscored(f"the agent left {', '.join(map(repr, unknown))}; expected {', '.join(sorted(FIELDS))}")
    last = session.record.turns[-1]
    if "reward" in left:
        reward = left["reward"]
        if isinstance(reward, dict) and "score" not in left:
            numbers = [value for value in reward.values() if isinstance(value, int | float)]
            left = left | {"score": sum(numbers)}
        result = {"next_state": None, "done": True, "extra_info": {}, "score": left.get("score", reward)}
        try:
            return checked(result | {"reward": reward, "metrics": left.get("metrics")}, environment.weights, 0)
        except Unscored as error:
            raise Unscored(error.cause.replace("step returned", "the agent left")) from error
    if lost := sorted(left.keys() & {"score", "metrics"}):
        raise Unscored(f"the agent left {', '.join(lost)} without a reward, for which only step has one")
    answer = left.get("answer", last.action)
    if not isinstance(answer, str):
        raise Unscored(f"the agent left an answer that is no text: {one_line(repr(answer))[:80]}")
    found = await environment.step(last.before, answer, extra_info, sampling)
    if found.spans and "answer" in left:  # they are places in a text that was not sampled
        raise Unscored("step returned spans, which need a response; the agent's answer is not one")
    return found


def _fill(
    trajectory: Trajectory,
    session: Session,
    result: StepResult | None,
    environment: Environment,
    *,
    has_answer: bool,
) -> None:
    """Set the sequences, texts, reward and score of a trajectory.

    `step` may say that what it judged does not train: the last response, or with an answer that the agent left, which
    stands for all of its responses, the whole episode.
    """
    turns, tokenizer = session.record.turns, session.policy.tokenizer
    trajectory.sequences = session.record.sequences()
    trajectory.texts = [text for turn in turns for text in (turn.before, turn.action)]
    trajectory.truncated = session.truncated
    trajectory.unfinished = session.refused_responses
    if result is not None:
        last = turns[-1].completion
        sampled, _ = without_end(tokenizer, last, session.sampling)
        decoded = partial(decode, tokenizer)
        assign_rewards(trajectory.sequences[-1], len(last.token_ids), result, decoded, sampled)
        if not result.train:
            for sequence in trajectory.sequences if has_answer else ():
                exclude_from_training(sequence, len(sequence))
            exclude_from_training(trajectory.sequences[-1], len(last.token_ids))
    sum_up(trajectory, [] if result is None else [result], environment.weights)
