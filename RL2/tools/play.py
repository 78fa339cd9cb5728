"""`rl2 play`: one episode of an environment, played by hand.

It is the episode that training runs, with the same time limits and checks; only the engine is a person, whose typed
text becomes the tokens of the response.
"""

from __future__ import annotations

import asyncio
import copy
import json
import sys
from collections.abc import Coroutine, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from RL2.config.rollout import Rollout, check_weights
from RL2.data.chat import encode, unicode
from RL2.data.prompts import load_prompts
from RL2.engines.scripted import ScriptedEngine
from RL2.errors import ConfigError, UserError, naming, printable
from RL2.models.policy import load_tokenizer, max_length
from RL2.rollout.continuation import decode
from RL2.rollout.environment import Environment, load_environment
from RL2.rollout.episode import run_episode
from RL2.rollout.step_result import StepResult, Unscored
from RL2.tools.play_roles import lines_of_game, play_game
from RL2.tools.reproduce.model import build_tokenizer
from RL2.types import Prompt, Sampling, Trajectory

T = TypeVar("T")
LONGEST = 1 << 20
"""Limit of a prompt and of a response in tokens where no model sets one."""
FROM_INPUT = "-"
"""Response that stands for the lines of the standard input."""
LABEL = 12
"""Width of the names in front of values."""
EXCERPT = 24
"""Number of characters shown of a span, from its end."""


@dataclass(frozen=True)
class PlayRequest:
    """Settings of an episode that is played by hand."""

    env: Path
    data: str = ""
    """Rows, in the forms of train_data.path; empty where `reset` makes up the task."""
    row: int = 1
    """Number of the row, from 1."""
    model: str = ""
    """Hub name or folder with the tokenizer and its chat template; empty: a byte-level tokenizer with ChatML."""
    max_turns: int = 100
    seed: int = 0
    """Seed of the task where there is no row."""
    timeout_s: float = Rollout.env_timeout_s
    """Maximum time for one call of the environment, in seconds."""
    weights: dict[str, float] = field(default_factory=dict)
    """Weights of the parts of the reward."""

    def __post_init__(self) -> None:
        check_weights(self.weights, "--weight")


class NoResponse(Exception):
    """An error: the episode goes on, and there is no further response."""


def play(request: PlayRequest, responses: Iterator[str], console: Console) -> bool:
    """Play one episode and print it; return False if it is unscored. Raise UserError if it cannot begin."""
    with naming("--model"):
        tokenizer = load_tokenizer(request.model) if request.model else build_tokenizer([])
        longest = max_length(request.model) if request.model else LONGEST
    transcript = Transcript(tokenizer, responses, console, request.weights)
    on_step, weights = transcript.show_step, request.weights
    environment = load_environment(request.env, request.timeout_s, weights, on_step, with_roles=True)
    try:
        prompt = choose_prompt(request, environment, tokenizer, longest - 1)
        if prompt.extra_info:
            transcript.extra_info = prompt.extra_info
            transcript.show("extra_info", as_json(prompt.extra_info))
        end = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
        settings: Any = {"tokenizer": tokenizer, "sampling": Sampling(LONGEST, stop_token_ids=end)}
        settings |= {"max_turns": request.max_turns, "max_length": longest, "seed": request.seed}
        if environment.roles:
            return _play_game(prompt, environment, transcript, settings)
        engine = ScriptedEngine(partial(transcript.respond, ""))
        trajectory = run(run_episode(prompt, engine=engine, environment=environment, group=0, sample=0, **settings))
    except NoResponse:
        transcript.show("stopped", f"after {transcript.turns} response(s), before the episode was done")
        return True
    finally:
        environment.close()
    transcript.show_end(trajectory, request.max_turns)
    return trajectory.unscored is None


def choose_prompt(
    request: PlayRequest, environment: Environment, tokenizer: PreTrainedTokenizerBase, longest: int
) -> Prompt:
    """Return the prompt of the chosen row, or an empty one that `reset` fills."""
    if not request.data:
        if not environment.has_reset and not environment.roles:
            raise ConfigError(f"{request.env} has no reset, so its tasks are rows; pass --data FILE")
        if request.row != 1:
            raise ConfigError(f"--row {request.row} has no effect without --data; --seed chooses the task")
        return Prompt(0, "", [], {})
    prompts = load_prompts(request.data, tokenizer, environment.example, longest)
    found = next((prompt for prompt in prompts if prompt.row == request.row - 1), None)
    if found is None:
        last = max(prompt.row for prompt in prompts) + 1
        why = f"the last one is row {last}" if request.row > last else "example(row) leaves it out"
        raise ConfigError(f"--row {request.row}: {request.data} has no such row; {why}")
    return found


def _play_game(prompt: Prompt, environment: Environment, transcript: Transcript, settings: Mapping[str, Any]) -> bool:
    try:
        result = run(play_game(prompt, environment, transcript.respond, **settings))
    except Unscored as error:
        transcript.head("episode")
        transcript.show("unscored", error.cause, style="bold red")
        return False
    transcript.head("episode")
    for name, value in (("responses", str(transcript.turns)), *lines_of_game(result, transcript.weights)):
        transcript.show(name, value)
    return True


def run(episode: Coroutine[Any, Any, T]) -> T:
    """Return the result of an episode. Unlike under `asyncio.run`, Ctrl-C does not wait for the line being typed."""
    loop = asyncio.new_event_loop()
    try:
        return loop.run_until_complete(episode)
    finally:
        loop.close()


class Transcript:
    """Output for the person who plays an episode, and their responses as those of an engine."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        responses: Iterator[str],
        console: Console,
        weights: Mapping[str, float],
    ) -> None:
        """Take the texts of the responses in order, and the weights of the parts of the reward."""
        self.tokenizer, self.responses, self.console, self.weights = tokenizer, responses, console, weights
        self.turns = 0
        self.read: dict[str, list[int]] = {}
        """Role -> tokens that it has read or written so far; '' without roles."""
        self.extra_info: dict[str, Any] = {}

    def respond(self, role: str, token_ids: list[int], sampling: Sampling) -> list[int]:
        """Show what the model reads behind its last response, as `role`, and return the tokens of the next one."""
        read = self.read.get(role, [])
        continues = token_ids[: len(read)] == read
        added = token_ids[len(read) :] if continues else token_ids
        title = "prompt" if not read else "environment" if continues else "environment, with another history"
        of = f" of {role}" if role else ""
        self.head(f"{title}{of}: {len(added)} tokens")
        self.write(decode(self.tokenizer, added))
        self.head(f"response {self.turns + 1}{of}")
        response = next(self.responses, None)
        if response is None:
            raise NoResponse
        sampled = encode(self.tokenizer, [unicode(response, "the response")], begins=False)[0]
        sampled += sampling.stop_token_ids
        if not sampled:
            raise UserError("the tokenizer has no end token, so a response cannot be empty")
        first_end = next((n for n, token in enumerate(sampled) if token in sampling.stop_token_ids), len(sampled))
        sampled = sampled[: first_end + 1]
        self.turns += 1
        self.read[role] = token_ids + sampled
        return sampled

    def show_step(self, action: str, result: StepResult) -> None:
        """Show a result of `step`."""
        self.head(f"step {self.turns}")
        for name, value in lines_of_step(action, result, self.weights):
            self.show(name, value)
        if result.extra_info != self.extra_info:
            self.extra_info = copy.deepcopy(result.extra_info)  # the next turn may change it in place
            self.show("extra_info", as_json(self.extra_info))

    def show_end(self, trajectory: Trajectory, max_turns: int) -> None:
        """Show the reward and score of the episode, or why it has none."""
        self.head("episode")
        if trajectory.unscored is not None:
            self.show("unscored", trajectory.unscored, style="bold red")
            return
        self.show("responses", str(self.turns))
        self.show("reward", f"{trajectory.reward:g}" + (", so it is correct" if trajectory.reward > 0 else ""))
        self.show("score", f"{trajectory.score:g}")
        if trajectory.unfinished:
            self.show("ended by", f"--max-turns {max_turns}, before the environment was done")
        if self.turns > 1:
            self.show("to train", f"rollout.max_turns={self.turns} or more; unless set, it is {Rollout.max_turns}")

    def head(self, title: str) -> None:
        """Print a line that begins a section."""
        self.console.print(Text(f"--- {title}", style="bold cyan"), soft_wrap=True)

    def show(self, name: str, value: str, style: str = "") -> None:
        """Print a named value; both may come from a script or a file."""
        self.console.print(Text(printable(f"{name:<{LABEL}}{value}"), style=style), soft_wrap=True)

    def write(self, text: str) -> None:
        """Print a text as it is, except characters that drive a terminal."""
        self.console.print(Text(printable(text)), soft_wrap=True)


def lines_of_step(action: str, result: StepResult, weights: Mapping[str, float]) -> Iterator[tuple[str, str]]:
    """Yield the name and value of everything that a step returned, except states and `extra_info`."""
    yield "reward", f"{result.total:g}"
    for part, value in result.parts.items():
        yield f"- {part}", f"{value:g}" + (f", times {weights[part]:g}" if part in weights else "")
    for span in result.spans:
        yield "- span", f"{span.reward:g}, up to {action[: span.end][-EXCERPT:]!r}"
    yield "score", f"{result.score:g}"
    yield "done", "true" if result.done else "false, the episode goes on"
    if not result.train:
        yield "train", "false, the tokens of this response are not trained on"
    for name, value in result.metrics.items():
        yield f"env/{name}", f"{value:g}"
    for name, cause in result.left_out.items():
        yield f"env/{name}", f"left out: {cause}"


def as_json(extra_info: Mapping[str, Any]) -> str:
    """Return `extra_info` as a line; a value that JSON does not have is shown as text."""
    return json.dumps(extra_info, ensure_ascii=False, default=str)


def responses_of(say: Iterable[str], console: Console) -> Iterator[str]:
    """Yield each text of `say`, with the lines of the standard input in place of FROM_INPUT.

    A response is shown unless it was typed on a terminal, where it is to be seen already.
    """
    for text in say:
        for response in typed() if text == FROM_INPUT else (text,):
            if text != FROM_INPUT or not sys.stdin.isatty():
                console.print(Text(printable(response)), soft_wrap=True)
            yield response


def typed() -> Iterator[str]:
    """Yield responses from the standard input, a line each; a backslash at its end continues it on the next line."""
    mark = "> " if sys.stdin.isatty() else ""
    with suppress(EOFError):
        while True:
            response = input(mark)
            while response.endswith("\\"):
                response = f"{response[:-1]}\n{input(mark)}"
            yield response
