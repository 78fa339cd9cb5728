"""Episodes with several roles: each has conversations of its own, with the policy or with a frozen opponent.

A role's responses are recorded like those of an agent: a request that continues its conversation continues the sampled
token ids. The tokens of an opponent are texts in the conversations of others, and never train.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from statistics import fmean

from RL2.agents.protocol import Reply, Request, RequestError
from RL2.agents.record import Turn
from RL2.agents.session import Policy, Session
from RL2.agents.task import task_of
from RL2.data.chat import Message
from RL2.rollout.environment import Environment
from RL2.rollout.episode import request_seed, sum_up
from RL2.rollout.game import GameResult, Said
from RL2.rollout.step_result import StepResult, Unscored
from RL2.types import Prompt, Sampling, Trajectory


@dataclass(frozen=True)
class Opponent:
    """A frozen model that plays a role."""

    policy: Policy
    ends: tuple[int, ...]
    """Tokens that end its responses."""


class Table:
    """The roles of one episode, each with a session of its own."""

    def __init__(
        self,
        policy: Policy,
        opponents: Mapping[str, Opponent],
        roles: Mapping[str, str],
        sampling: Sampling,
        seeds: Iterable[int],
        max_responses: int,
    ) -> None:
        """Take role -> system prompt, with a seed for each; `opponents` play the roles that they are named for.

        `max_responses` is the limit for all roles together.
        """
        self.opponents, self.max_responses, self.begun = opponents, max_responses, 0
        self.sessions: dict[str, Session] = {}
        for role, seed in zip(roles, seeds, strict=True):
            opponent = opponents.get(role)
            mine = sampling if opponent is None else replace(sampling, stop_token_ids=opponent.ends)
            self.sessions[role] = Session(policy if opponent is None else opponent.policy, mine, seed)
        self.talks: dict[str, list[Message]] = {
            role: [{"role": "system", "content": system}] if system else [] for role, system in roles.items()
        }
        """The conversation that texts go on with, by role."""
        self.talking: set[str] = set()
        """Roles that are to respond to a text."""
        self.turns: list[tuple[str, Turn]] = []
        """All turns with their roles, in the order in which they ended."""

    async def respond(self, role: str, request: Request) -> list[Reply]:
        """Return the responses of a role. Raise RequestError if the request cannot be answered."""
        if self.begun + request.n > self.max_responses:
            raise RequestError(f"the episode has had rollout.max_turns={self.max_responses} responses")
        self.begun += request.n
        session = self.sessions[role]
        replies = await session.respond(request)
        self.turns += [(role, turn) for turn in session.record.turns[-request.n :]]
        return replies

    async def ask(self, role: str, said: Said) -> str:
        """Return the text of a role's response. Raise Unscored if there is none.

        A text goes on with the role's conversation; messages are a conversation as it stands.
        """
        if goes_on := isinstance(said, str):
            if role in self.talking:
                raise Unscored(
                    f"ask({role!r}, ...) before its last response is there; pass messages to ask in parallel"
                )
            messages = [*self.talks[role], {"role": "user", "content": said}]
            self.talking.add(role)
        else:
            messages = said
        try:
            (reply,) = await self.respond(role, Request(messages=messages))
        except RequestError as error:
            raise Unscored(f"role {role}: {error}") from error
        finally:
            self.talking -= {role} if goes_on else set()
        if goes_on:
            self.talks[role] = [*messages, reply.message]
        return str(reply.message["content"])

    @property
    def failure(self) -> BaseException | None:
        """Error of an engine, which stops the run."""
        return next((each.failure for each in self.sessions.values() if each.failure is not None), None)

    @property
    def trained(self) -> dict[str, Session]:
        """The sessions of the roles that the policy has played."""
        return {
            role: session
            for role, session in self.sessions.items()
            if role not in self.opponents and session.record.turns
        }

    def fill(self, trajectory: Trajectory, result: GameResult | None, weights: Mapping[str, float]) -> None:
        """Set the sequences, texts, rewards and score of `trajectory`; without a result it is unscored.

        The score is that of the result, else the mean reward of the roles that the policy played.
        """
        trained = self.trained
        for role, session in trained.items():
            sequences = session.record.sequences()
            for sequence in sequences:
                sequence.role = role
            if result is not None:
                sequences[-1].rewards[-1] = weights.get(role, 1.0) * result.rewards[role]
            trajectory.sequences += sequences
        trajectory.speakers = [role for role, _ in self.turns]
        trajectory.texts = [text for _, turn in self.turns for text in (turn.before, turn.action)]
        trajectory.truncated = any(session.truncated for session in trained.values())
        results = []
        if result is not None:
            rewards = {role: result.rewards[role] for role in trained}
            score = fmean(rewards.values()) if result.score is None else result.score
            step = StepResult(None, 0.0, score, True, {}, True, rewards)
            results = [replace(step, metrics=result.metrics, left_out=result.left_out)]
        sum_up(trajectory, results, weights)

    def check(self, result: GameResult) -> GameResult:
        """Return `result`; raise Unscored if a role that the policy played has no reward, or if it played none."""
        if not self.trained:
            raise Unscored("the policy was asked for no response")
        if missing := [role for role in self.trained if role not in result.rewards]:
            raise Unscored(f"there is no reward of {', '.join(missing)}, which the policy played")
        return result


class RolePlayer:
    """Plays the episodes of scripts with several roles: a `Player` of episodes."""

    def __init__(self, policy: Policy, opponents: Mapping[str, Opponent]) -> None:
        """Take the policy, which plays all roles without an opponent."""
        self.policy, self.opponents = policy, dict(opponents)

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
        """Let the script play `prompt`. A script that fails makes the trajectory unscored; engines raise."""
        roles = environment.roles
        seeds = (request_seed(seed, group, sample, number) for number in range(len(roles)))
        table = Table(self.policy, self.opponents, roles, sampling, seeds, max_turns)
        trajectory = Trajectory(row=prompt.row, group=group, sample=sample)
        result: GameResult | None = None
        try:
            extra_info = copy.deepcopy(prompt.extra_info)  # samples of a prompt must not share changes to it
            task = await task_of(prompt, environment, extra_info, sampling, request_seed(seed, group, 0, 0))
            result = table.check(await environment.play(table.ask, task))
        except Unscored as error:
            result, trajectory.unscored = None, error.cause
        if table.failure is not None:
            raise table.failure
        table.fill(trajectory, result, environment.weights)
        return trajectory

    async def close(self) -> None:
        """Do nothing: engines are closed with the run."""
