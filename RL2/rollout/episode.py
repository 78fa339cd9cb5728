"""One episode: engine and environment in turn. Sampled ids stay as they are; only the environment's text is encoded."""

from __future__ import annotations

import copy
import hashlib
import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from RL2.data.chat import encode, head_of, messages_of, unicode
from RL2.data.source import DataError
from RL2.data.template import Chat, Template
from RL2.engines.base import Engine
from RL2.rollout.environment import Environment
from RL2.rollout.spans import last_tokens
from RL2.rollout.step_result import State, StepResult, Unscored
from RL2.types import Completion, Prompt, Sampling, Sequence, Trajectory, summed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLAIN = ""
"""Name of a reward that is a number, among parts."""
RESPONSE = "[[response]]"
"""Placeholder of a response, to find out what the chat template writes after one."""


def request_seed(seed: int, group: int, sample: int, turn: int) -> int:
    """Return 63 bits that depend on these four numbers alone. Take another `seed` for each rollout."""
    digest = hashlib.blake2b(repr((seed, group, sample, turn)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


async def run_episode(
    prompt: Prompt,
    *,
    engine: Engine,
    environment: Environment,
    tokenizer: PreTrainedTokenizerBase,
    sampling: Sampling,
    max_turns: int,
    max_length: int | None,
    group: int,
    sample: int,
    seed: int,
    template: Template | None = None,
) -> Trajectory:
    """Play `prompt` until the environment is done, `max_turns` responses are there, or `max_length` tokens are full.

    Errors of the environment make the trajectory unscored; errors of the engine are raised. `template` is the
    tokenizer's, if it has been analysed before.
    """
    template = template or Template(tokenizer)
    trajectory = Trajectory(row=prompt.row, group=group, sample=sample)
    parts: defaultdict[str, list[float]] = defaultdict(list)
    metrics: defaultdict[str, list[float]] = defaultdict(list)
    try:
        extra_info = copy.deepcopy(prompt.extra_info)  # samples of a prompt share it, and must not share changes to it
        state, added = prompt.text, prompt.token_ids
        if not state and environment.has_reset:
            # all samples of a prompt get the same task, and each rollout new ones
            extra_info.setdefault("seed", request_seed(seed, group, 0, 0) % 2**32)
            first = await environment.reset(extra_info, sampling)
            state = _first(template, first, prompt.template_arguments)
            added = _encode(tokenizer, state, begins=isinstance(first, str))
        sequence = Sequence([], [], [], [])
        for turn in range(max_turns):
            length = len(sequence.token_ids) + len(added)
            room = sampling.max_new_tokens if max_length is None else min(sampling.max_new_tokens, max_length - length)
            if room < 1:
                trajectory.truncated = True
                if turn == 0:  # no response, so no reward; not a reward of 0
                    raise Unscored(f"the prompt leaves no room for a response within {max_length} tokens")
                break
            if not sequence.token_ids:
                if not added:
                    raise Unscored("the environment gave an empty state: there is no token to continue from")
                trajectory.sequences.append(sequence)
            _append(sequence, added)

            request = replace(sampling, max_new_tokens=room, seed=request_seed(seed, group, sample, turn))
            completion = await engine.generate(list(sequence.token_ids), request)
            assert completion.token_ids, "an engine samples at least one token"
            _append(sequence, completion.token_ids, completion.logps, completion.versions, completion.experts)
            trajectory.truncated = completion.finish == "length"

            sampled, end = _without_end(tokenizer, completion, sampling)
            action = decode(tokenizer, sampled)
            trajectory.texts += [state, action]
            result = await environment.step(state, action, extra_info, request)
            _assign_rewards(sequence, len(completion.token_ids), result, partial(decode, tokenizer), sampled)
            trajectory.score += result.score
            for found, values in ((parts, result.parts or {PLAIN: result.total}), (metrics, result.metrics)):
                for name, value in values.items():
                    found[name].append(value)
            trajectory.left_out |= result.left_out
            if not result.train:
                _exclude_from_training(sequence, len(completion.token_ids))
            if result.done or turn + 1 == max_turns:
                trajectory.unfinished = not result.done
                break

            assert result.next_state is not None, "checked by the environment"
            so_far, extra_info = state + action, result.extra_info
            state = _next(template, so_far, result.next_state, end, prompt.template_arguments)
            sequence, added = _observe(tokenizer, sequence, so_far, state, end)
    except Unscored as error:
        trajectory.unscored, trajectory.score = error.cause, 0.0
        for sequence in trajectory.sequences:
            sequence.rewards = [0.0] * len(sequence.rewards)
        parts.clear()
    _sum_up(trajectory, parts, metrics, environment.weights)
    return trajectory


def _sum_up(
    trajectory: Trajectory, parts: dict[str, list[float]], metrics: dict[str, list[float]], weights: Mapping[str, float]
) -> None:
    """Set the metrics of `trajectory`, means over turns, and its reward: sums of parts over turns, then weighted."""
    trajectory.metrics = {name: fmean(each) for name, each in metrics.items()}
    trajectory.plain = summed(parts.pop(PLAIN, []))
    trajectory.parts = {name: summed(each) for name, each in parts.items()}
    terms = [weights.get(name, 1.0) * value for name, value in trajectory.parts.items()]
    trajectory.weighted = math.fsum([*terms, trajectory.plain])


def _without_end(
    tokenizer: PreTrainedTokenizerBase, completion: Completion, sampling: Sampling
) -> tuple[list[int], str]:
    """Return the tokens of a response without its end token, and the text of that; '' if it has none."""
    sampled = completion.token_ids
    if completion.finish == "stop" and sampled[-1] in sampling.stop_token_ids:
        return sampled[:-1], decode(tokenizer, sampled[-1:])
    return sampled, ""


def _observe(
    tokenizer: PreTrainedTokenizerBase, sequence: Sequence, so_far: str, state: str, end: str
) -> tuple[Sequence, list[int]]:
    """Return the sequence that the next response belongs to, and the tokens that the environment adds to it.

    `so_far` is the text up to the response, without its `end` token, and `state` the environment's next state. If that
    does not begin with `so_far`, the environment has rewritten the history: the sampled tokens stay in their sequence,
    and a new one begins.
    """
    if state.startswith(so_far):
        # the end token was sampled; the environment may write its text out
        return sequence, _encode(tokenizer, state[len(so_far) :].removeprefix(end), begins=False)
    head = head_of(tokenizer)
    return Sequence([], [], [], []), _encode(tokenizer, state, begins=sequence.token_ids[: len(head)] == head)


def _append(
    sequence: Sequence,
    token_ids: list[int],
    logps: list[float] | None = None,
    versions: list[int] | None = None,
    experts: Tensor | None = None,
) -> None:
    """Append tokens: those with log-probabilities and versions were sampled, those without were given.

    `experts` are those of all tokens that the engine has run for the sequence.
    """
    sequence.token_ids += token_ids
    sequence.action_mask += [logps is not None] * len(token_ids)
    sequence.logps += [0.0] * len(token_ids) if logps is None else logps
    sequence.rewards += [0.0] * len(token_ids)
    sequence.versions += [-1] * len(token_ids) if versions is None else versions
    assert len(sequence.logps) == len(sequence.token_ids), "an engine gives each token its log-probability"
    assert len(sequence.versions) == len(sequence.token_ids), "an engine gives each token its version"
    if experts is not None:  # tokens that have experts keep them, although a later turn may run them again
        known = [] if sequence.experts is None else [sequence.experts]
        sequence.experts = torch.cat([*known, experts[sum(map(len, known)) :]])
        assert len(sequence.experts) == len(sequence.token_ids) - 1, "an engine records every token that it runs"


def _assign_rewards(
    sequence: Sequence,
    number: int,
    result: StepResult,
    decode_ids: Callable[[list[int]], str],
    sampled: list[int],
) -> None:
    """Put the rewards of a turn at its tokens, the last `number`; `sampled` are those without the end token."""
    at = {number - 1: [result.reward]}
    places = last_tokens(decode_ids, sampled, [span.end for span in result.spans]) if result.spans else []
    for place, span in zip(places, result.spans, strict=True):
        at.setdefault(place, []).append(span.reward)
    for place, rewards in at.items():
        sequence.rewards[place - number] = summed(rewards)


def _exclude_from_training(sequence: Sequence, number: int) -> None:
    """Exclude the last `number` tokens from training, as those of a prompt."""
    sequence.action_mask[-number:] = [False] * number
    sequence.logps[-number:] = [0.0] * number
    sequence.versions[-number:] = [-1] * number


def _first(template: Template, state: State, arguments: dict[str, Any] | None = None) -> str:
    return state if isinstance(state, str) else _render(template, [], state, arguments or {})


def _next(template: Template, so_far: str, state: State, end: str, arguments: dict[str, Any]) -> str:
    """Return `state` as text; messages are written behind `so_far` as the chat template writes them behind a response.

    `end`: text of the end token that was sampled behind `so_far`, if one was. It is then the only one there.
    """
    if isinstance(state, str):
        return state
    before = [{"role": "user", "content": "."}, {"role": "assistant", "content": RESPONSE}]
    _, mark, observation = _render(template, before, state, arguments).partition(RESPONSE)
    if not mark:
        raise Unscored("the chat template drops responses; let step return the whole next state as text")
    if end:
        written = next((text for text in template.ends if observation.startswith(text)), "")
        if written != end and template.ends_with_next:  # it belongs to the next turn
            written = ""
        observation = end + observation.removeprefix(written)
    return so_far + observation


def _render(
    template: Template, before: list[dict[str, Any]], messages: list[dict[str, Any]], arguments: dict[str, Any]
) -> str:
    try:
        chat = Chat(before + messages_of({"messages": messages}), arguments)
        return template.render(chat, add_generation_prompt=True)
    except DataError as error:
        raise Unscored(f"the environment's messages: {error}") from error


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, *, begins: bool = True) -> list[int]:
    """Return the ids of `text`, which with `begins` is the beginning of what the model reads."""
    try:
        unicode(text, "the environment's state")
    except DataError as error:
        raise Unscored(str(error)) from error
    return encode(tokenizer, [text], begins=begins)[0]


def decode(tokenizer: PreTrainedTokenizerBase, token_ids: list[int]) -> str:
    text = tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text
