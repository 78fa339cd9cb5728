"""One episode: engine and environment in turn. Sampled ids stay as they are; only the environment's text is encoded."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING

from RL2.data.template import Template
from RL2.data.tool_calls import ResponseParser
from RL2.engines.base import Engine
from RL2.rollout.continuation import append, decode, encode_text, first_text, next_text, observe, without_end
from RL2.rollout.environment import Environment
from RL2.rollout.spans import last_tokens
from RL2.rollout.step_result import StepResult, Unscored
from RL2.types import Prompt, Sampling, Sequence, Trajectory, summed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLAIN = ""
"""Name of a reward that is a number, among parts."""


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
    results: list[StepResult] = []
    parser = ResponseParser(template) if environment.wants_calls else None
    tools = prompt.template_arguments.get("tools") or []
    try:
        extra_info = copy.deepcopy(prompt.extra_info)  # samples of a prompt share it, and must not share changes to it
        state, added = prompt.text, prompt.token_ids
        if not state and environment.has_reset:
            # all samples of a prompt get the same task, and each rollout new ones
            extra_info.setdefault("seed", request_seed(seed, group, 0, 0) % 2**32)
            first = await environment.reset(extra_info, sampling)
            state = first_text(template, first, prompt.template_arguments)
            added = encode_text(tokenizer, state, begins=isinstance(first, str))
        sequence = Sequence()
        for turn in range(max_turns):
            length = len(sequence) + len(added)
            room = sampling.max_new_tokens if max_length is None else min(sampling.max_new_tokens, max_length - length)
            if room < 1:
                trajectory.truncated = True
                if turn == 0:  # no response, so no reward; not a reward of 0
                    raise Unscored(f"the prompt leaves no room for a response within {max_length} tokens")
                break
            if not len(sequence):
                if not added:
                    raise Unscored("the environment gave an empty state: there is no token to continue from")
                trajectory.sequences.append(sequence)
            append(sequence, added)

            request = replace(sampling, max_new_tokens=room, seed=request_seed(seed, group, sample, turn))
            completion = await engine.generate(sequence.token_ids.tolist(), request)
            assert completion.token_ids, "an engine samples at least one token"
            append(sequence, completion.token_ids, completion.logps, completion.versions, completion.experts)
            trajectory.truncated = completion.finish == "length"

            sampled, end = without_end(tokenizer, completion, sampling)
            action = decode(tokenizer, sampled)
            trajectory.texts += [state, action]
            calls = parser.parse(action, state, tools).calls if parser is not None else []
            result = await environment.step(state, action, extra_info, request, calls)
            assign_rewards(sequence, len(completion.token_ids), result, partial(decode, tokenizer), sampled)
            results.append(result)
            if not result.train:
                exclude_from_training(sequence, len(completion.token_ids))
            if result.done or turn + 1 == max_turns:
                trajectory.unfinished = not result.done
                break

            assert result.next_state is not None, "checked by the environment"
            so_far, extra_info = state + action, result.extra_info
            state = next_text(template, so_far, result.next_state, end, prompt.template_arguments)
            sequence, added = observe(tokenizer, sequence, so_far, state, end)
    except Unscored as error:
        trajectory.unscored = error.cause
        for sequence in trajectory.sequences:
            sequence.rewards[:] = 0
    sum_up(trajectory, results, environment.weights)
    return trajectory


def sum_up(trajectory: Trajectory, results: list[StepResult], weights: Mapping[str, float]) -> None:
    """Set the metrics of `trajectory`, means over turns, and unless it is unscored its score and its reward.

    The score is the sum over turns; so are the parts of the reward, which are then weighted.
    """
    trajectory.metrics = {name: fmean(each) for name, each in _by_name(result.metrics for result in results).items()}
    for result in results:
        trajectory.left_out |= result.left_out
    rated = results if trajectory.unscored is None else []
    trajectory.score = sum((result.score for result in rated), 0.0)
    parts = _by_name(result.parts or {PLAIN: result.total} for result in rated)
    trajectory.plain = summed(parts.pop(PLAIN, []))
    trajectory.parts = {name: summed(each) for name, each in parts.items()}
    terms = [weights.get(name, 1.0) * value for name, value in trajectory.parts.items()]
    trajectory.weighted = math.fsum([*terms, trajectory.plain])


def _by_name(turns: Iterable[Mapping[str, float]]) -> dict[str, list[float]]:
    """Return the values of several turns by their names."""
    found: dict[str, list[float]] = {}
    for values in turns:
        for name, value in values.items():
            found.setdefault(name, []).append(value)
    return found


def assign_rewards(
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


def exclude_from_training(sequence: Sequence, number: int) -> None:
    """Exclude the last `number` tokens from training, as those of a prompt."""
    sequence.action_mask[-number:] = False
    sequence.logps[-number:] = 0
    sequence.versions[-number:] = -1
