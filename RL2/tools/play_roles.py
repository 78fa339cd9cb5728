"""`rl2 play` for a script with several roles: one episode in which a person plays all of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from functools import partial

from transformers import PreTrainedTokenizerBase

from RL2.agents.roles import Opponent, Table
from RL2.agents.session import Policy
from RL2.agents.task import task_of
from RL2.data.template import Template
from RL2.data.tool_calls import ResponseParser
from RL2.engines.scripted import ScriptedEngine
from RL2.rollout.environment import Environment
from RL2.rollout.episode import request_seed
from RL2.rollout.game import GameResult
from RL2.rollout.step_result import Unscored
from RL2.types import Prompt, Sampling


async def play_game(
    prompt: Prompt,
    environment: Environment,
    respond: Callable[[str, list[int], Sampling], list[int]],
    *,
    tokenizer: PreTrainedTokenizerBase,
    sampling: Sampling,
    max_turns: int,
    max_length: int,
    seed: int,
) -> GameResult:
    """Let the script play `prompt`, and return its result; `respond(role, token_ids, sampling)` are the responses.

    Raise Unscored if there is no result, or no reward of a role that has responded, and what `respond` raises.
    """
    template = Template(tokenizer)

    def person(role: str) -> Policy:
        engine = ScriptedEngine(partial(respond, role))
        return Policy(engine, tokenizer, template, ResponseParser(template), max_length)

    roles = list(environment.roles)
    people = {role: Opponent(person(role), sampling.stop_token_ids) for role in roles}
    seeds = (request_seed(seed, 0, 0, number) for number in range(len(roles)))
    table = Table(people[roles[0]].policy, people, environment.roles, sampling, seeds, max_turns)
    try:
        task = await task_of(prompt, environment, copy.deepcopy(prompt.extra_info), sampling, seed)
        result = await environment.play(table.ask, task)
    except Unscored:
        if table.failure is not None:
            raise table.failure from None
        raise
    if missing := sorted({role for role, _ in table.turns} - result.rewards.keys()):
        raise Unscored(f"there is no reward of {', '.join(missing)}; a run can leave it out only for an opponent")
    return result


def lines_of_game(result: GameResult, weights: Mapping[str, float]) -> Iterator[tuple[str, str]]:
    """Yield the name and value of everything that `play` returned; `weights` are those of the roles' rewards."""
    for role, reward in result.rewards.items():
        correct = ", so it is correct" if weights.get(role, 1.0) * reward > 0 else ""
        yield role, f"reward {reward:g}" + (f", times {weights[role]:g}" if role in weights else "") + correct
    if result.score is not None:
        yield "score", f"{result.score:g}"
    for name, value in result.metrics.items():
        yield f"env/{name}", f"{value:g}"
    for name, cause in result.left_out.items():
        yield f"env/{name}", f"left out: {cause}"
