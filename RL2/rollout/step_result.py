"""The result of a script's `step`, checked, with the parts of its reward weighted."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import numpy as np

from RL2.config.values import NAME, NAME_RULE
from RL2.errors import one_line
from RL2.types import summed

LARGEST = 1e15
"""Size of a reward or score beyond which sums of squares of them overflow in float32."""
REQUIRED = ("next_state", "reward", "score", "done", "extra_info")
State = str | list[dict[str, Any]]
"""State of an episode: text as it stands, or messages that go through the chat template."""


class Unscored(Exception):
    """An error: an episode has no reward, for this cause."""

    def __init__(self, cause: str) -> None:
        self.cause = one_line(cause)  # it may quote the script, and is printed and written down
        super().__init__(self.cause)


@dataclass(frozen=True)
class Span:
    """A reward for a piece of the response."""

    end: int
    """Characters of the response up to the end of the piece."""
    reward: float
    """With the weight of its part."""


@dataclass(frozen=True)
class StepResult:
    """A checked result of `step`."""

    next_state: State | None
    """A text is the whole next state; messages are added to the conversation so far. None only if done."""
    reward: float
    """The number that `step` returned, or the weighted sum of its parts; `spans` are not in it."""
    score: float
    done: bool
    extra_info: dict[str, Any]
    train: bool = True
    """False: nothing is learned about the tokens of this response itself."""
    parts: dict[str, float] = field(default_factory=dict)
    """Part of the reward -> its value, with its spans and not weighted; empty where the reward is a number."""
    spans: tuple[Span, ...] = ()
    """Rewards for pieces of the response."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Metrics of the environment by name."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Metric that is no number -> what it is; one without a name is `metrics` itself."""

    @property
    def total(self) -> float:
        """Return the reward of the whole response."""
        return summed([self.reward, *(span.reward for span in self.spans)])


def checked(result: Any, weights: Mapping[str, float], length: int) -> StepResult:
    """Return what `step` returned for a response of `length` characters.

    `weights` are those of the reward's parts; a part without one counts once. Raises `Unscored` for a result that has
    not the right form.
    """
    if not isinstance(result, dict):
        raise Unscored(f"step returned {name_of(result)}; expected a dict")
    if missing := [name for name in REQUIRED if name not in result]:
        raise Unscored(f"step returned no {', '.join(missing)}")
    next_state, done, extra_info = result["next_state"], result["done"], result["extra_info"]
    train = result.get("train", True)
    for name, value in (("done", done), ("train", train)):
        if not isinstance(value, bool):
            raise Unscored(f"step returned {name}={name_of(value)}; expected a bool")
    if not isinstance(extra_info, dict):
        raise Unscored(f"step returned extra_info={name_of(extra_info)}; expected a dict")
    if next_state is not None and not is_state(next_state):
        raise Unscored(f"step returned next_state={name_of(next_state)}; expected a str, a list of messages or None")
    if next_state is None and not done:
        raise Unscored("step returned next_state=None with done=False")
    has_parts = isinstance(result["reward"], dict)
    at_end = _parts(result["reward"]) if has_parts else {}
    reward = (
        summed([_weighted(name, value, weights) for name, value in at_end.items()])
        if has_parts
        else number_of(result["reward"], "reward")
    )
    named = [_span(n, span, length, has_parts) for n, span in enumerate(_listed(result.get("spans")))]
    spans = tuple(Span(end, _weighted(part, value, weights) if part else value) for end, part, value in named)
    values = [*at_end.items(), *((part, value) for _, part, value in named if part)]
    parts = {name: summed([value for part, value in values if part == name]) for name, _ in values}
    score = number_of(result["score"], "score")
    metrics, left_out = metrics_of(result.get("metrics"))
    return StepResult(next_state, reward, score, done, extra_info, train, parts, spans, metrics, left_out)


def is_state(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(message, dict) for message in value))


def name_of(value: object) -> str:
    name = type(value).__name__
    return "None" if value is None else f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _parts(reward: dict[Any, Any]) -> dict[str, float]:
    if not reward:
        raise Unscored("step returned reward={}; expected a number, or a dict with one part at least")
    for name in reward:
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise Unscored(f"step returned a part of the reward named {name!r}; {NAME_RULE}")
    return {name: number_of(value, f"reward[{name!r}]") for name, value in reward.items()}


def _weighted(part: str, value: float, weights: Mapping[str, float]) -> float:
    """Return the value of a part times its weight."""
    term = weights.get(part, 1.0) * value
    if abs(term) > LARGEST:
        raise Unscored(
            f"step returned reward[{part!r}]={value}, with its weight {term:g}; expected at most {LARGEST:g} in size"
        )
    return term


def _listed(spans: Any) -> Sequence[Any]:
    if spans is None:
        return ()
    if not isinstance(spans, list | tuple):
        raise Unscored(f"step returned spans={name_of(spans)}; expected a list")
    return spans


def _span(number: int, span: Any, length: int, has_parts: bool) -> tuple[int, str, float]:
    """Return where a span ends, the part of the reward that it belongs to ('' if there are none), and its value."""
    where = f"spans[{number}]"
    wanted = {"span", "reward", "part"} if has_parts else {"span", "reward"}
    if not isinstance(span, dict) or span.keys() != wanted:
        has = f"a dict with {', '.join(map(str, span)) or 'nothing'}" if isinstance(span, dict) else name_of(span)
        why = "as the reward has parts" if has_parts else "and no part, as the reward is a number"
        raise Unscored(f"step returned {where}={has}; expected a dict with {', '.join(sorted(wanted))}, {why}")
    if has_parts and not (isinstance(span["part"], str) and NAME.fullmatch(span["part"])):
        raise Unscored(f"step returned {where} of a part named {span['part']!r}; {NAME_RULE}")
    place = span["span"]
    if not isinstance(place, list | tuple) or len(place) != 2 or not all(map(_is_index, place)):
        raise Unscored(f"step returned {where} at {place!r}; expected [start, end], two whole numbers")
    start, end = place
    if not 0 <= start < end <= length:
        raise Unscored(
            f"step returned {where} at [{start}, {end}]; expected 0 <= start < end <= {length}, the characters of the "
            "response"
        )
    return int(end), span.get("part", ""), number_of(span["reward"], f"{where}['reward']")


def _is_index(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def metrics_of(given: Any) -> tuple[dict[str, float], dict[str, str]]:
    """Return the metrics that are numbers, and why others are left out: no trajectory is lost for them."""
    if given is None:
        return {}, {}
    if not isinstance(given, dict):
        return {}, {"metrics": f"{name_of(given)}; expected a dict"}
    metrics: dict[str, float] = {}
    left_out: dict[str, str] = {}
    for name, value in given.items():
        if not isinstance(name, str) or not NAME.fullmatch(name):
            left_out["metrics"] = f"a metric named {name!r}; {NAME_RULE}"
            continue
        try:
            metrics[name] = number_of(value, f"metrics[{name!r}]")
        except Unscored as error:
            left_out[name] = error.cause
    return metrics, left_out


def number_of(value: Any, name: str, what: str = "step returned") -> float:
    """Return a number or bool as a float. Raise Unscored, which begins with `what`, if it is neither or not finite."""
    if not isinstance(value, Real | np.bool_):
        raise Unscored(f"{what} {name}={name_of(value)}; expected a number or a bool")
    try:
        number = float(value)
    except Exception:  # too large, or a class of the script's own
        number = math.inf
    if not math.isfinite(number):
        raise Unscored(f"{what} {name}={number}; expected a finite number")
    if abs(number) > LARGEST:
        raise Unscored(f"{what} {name}={number}; expected a number of at most {LARGEST:g} in size")
    return number
