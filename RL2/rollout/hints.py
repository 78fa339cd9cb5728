"""Hints: context that a teacher reads before a response, and the policy does not (docs/distillation.md).

`hint(extra_info)` of the environment's script returns it for a row: a text, which follows the prompt's last message of
the user; messages, which stand before those of the prompt; or None. With a parameter `attempts` it gets the responses
to the same prompt with their rewards, of which one is its own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from RL2.batch.packing import pack
from RL2.config.model import Teacher
from RL2.config.scripts import described
from RL2.data.prompts import Places, make_prompt
from RL2.data.source import DataError
from RL2.data.template import Template
from RL2.errors import UserError
from RL2.parallel.processes import Processes
from RL2.rollout.environment import Environment
from RL2.types import Prompt, Sequence, TokenBatch, Trajectory

Hint = str | list[dict[str, Any]] | None


@dataclass(frozen=True)
class Hints:
    """The hints of a run, for the prompts that it trains on."""

    prompts: Seq[Prompt]
    environment: Environment
    template: Template
    processes: Processes
    longest: int
    """Maximum length of a sequence with its hint, in tokens."""

    @cached_property
    def places(self) -> Places:
        """Row of the data file -> place among the prompts."""
        return Places(self.prompts)

    def told(self, trajectories: Seq[Trajectory]) -> TokenBatch:
        """Return what the teacher reads: the sequences of `trajectories` with the hints in their prompts (collective).

        The first process calls the script, so that all read the same. A sequence that does not begin with its prompt,
        because the environment rewrote the history, stays as it is.
        """
        hints = self.processes.of_first(lambda: self._hints(trajectories), "the hints of a rollout")
        changed = []
        for trajectory, hint in zip(trajectories, hints, strict=True):
            prompt = self.prompts[self.places[trajectory.row]]
            hinted_ids = prompt.token_ids if hint is None else self._hinted(prompt, hint)
            changed.append(
                replace(trajectory, sequences=[self._after(s, prompt, hinted_ids) for s in trajectory.sequences])
            )
        return pack(changed)

    def _hints(self, trajectories: Seq[Trajectory]) -> list[Hint]:
        groups = defaultdict(list)
        for trajectory in trajectories:
            groups[trajectory.group].append(trajectory)
        return [self._hint(trajectory, groups[trajectory.group]) for trajectory in trajectories]

    def _hint(self, trajectory: Trajectory, group: list[Trajectory]) -> Hint:
        """Return what the script says of one trajectory. Raise UserError if it fails or returns something else."""
        prompt, path = self.prompts[self.places[trajectory.row]], self.environment.path
        attempts = [
            {"response": "".join(each.texts[1:]), "reward": each.reward, "own": each is trajectory} for each in group
        ]
        try:
            hint = self.environment.hint(prompt.extra_info, attempts)
        except Exception as error:
            told = described(error, path, self.environment.file)
            raise UserError(f"{path}: hint raises {told} for row {trajectory.row + 1}") from error
        if not (hint is None or isinstance(hint, str) or is_messages(hint)):
            raise UserError(
                f"{path}: hint returned {type(hint).__name__} for row {trajectory.row + 1}; expected a text, a list of "
                "messages, or None"
            )
        return hint

    def _hinted(self, prompt: Prompt, hint: Hint) -> list[int]:
        """Return the tokens of the prompt with its hint. Raise UserError if they cannot be made."""
        assert hint is not None
        row: dict[str, Any] = {"prompt": f"{prompt.text}\n\n{hint}"}
        if not prompt.messages and not isinstance(hint, str):
            raise UserError(
                f"{self.environment.path}: hint returned messages for row {prompt.row + 1}, whose prompt is raw text; "
                "return a text"
            )
        if prompt.messages:
            row = {"messages": with_hint(prompt.messages, hint), **prompt.template_arguments}
        try:
            return make_prompt(row, self.template, prompt.row).token_ids
        except DataError as error:
            raise UserError(f"row {prompt.row + 1} with its hint: {error}") from error

    def _after(self, sequence: Sequence, prompt: Prompt, hinted_ids: list[int]) -> Sequence:
        """Return a sequence with other tokens in place of its prompt's."""
        length, new = len(prompt.token_ids), len(hinted_ids)
        if sequence.token_ids[:length].tolist() != prompt.token_ids:
            return sequence
        if (total := new + len(sequence) - length) > self.longest:
            raise UserError(
                f"row {prompt.row + 1}: with its hint a sequence has {total} tokens, more than the {self.longest} of "
                "the teacher; shorten the hint"
            )
        return Sequence(
            token_ids=np.concatenate([hinted_ids, sequence.token_ids[length:]]),
            action_mask=np.concatenate([np.zeros(new, bool), sequence.action_mask[length:]]),
            logps=np.concatenate([np.zeros(new), sequence.logps[length:]]),
            rewards=np.concatenate([np.zeros(new), sequence.rewards[length:]]),
        )


@dataclass(frozen=True)
class ChosenTeachers:
    """The teacher that each row names, where there are several."""

    prompts: Seq[Prompt]
    config: Teacher

    @cached_property
    def places(self) -> Places:
        """Row of the data file -> place among the prompts."""
        return Places(self.prompts)

    def numbers(self, trajectories: Seq[Trajectory]) -> Tensor:
        """Return the number of the teacher of each trajectory, int64. Raise UserError for a row that names none."""
        known, column = list(self.config.models), self.config.column
        found = []
        for trajectory in trajectories:
            name = self.prompts[self.places[trajectory.row]].extra_info.get(column)
            if name not in known:
                raise UserError(
                    f"row {trajectory.row + 1} has extra_info[{column!r}]={name!r}, and the teachers are "
                    f"{', '.join(known)} (teacher.models)"
                )
            found.append(known.index(name))
        return torch.tensor(found)


def is_messages(value: Any) -> bool:
    """Return whether `value` is a list of messages."""
    return isinstance(value, list) and all(isinstance(each, dict) and "role" in each for each in value)


def with_hint(messages: list[dict[str, Any]], hint: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the messages of a prompt with a hint: a text at the end of the last one, messages before the first."""
    if not isinstance(hint, str):
        return [*hint, *messages]
    *before, last = messages
    return [*before, last | {"content": f"{last['content']}\n\n{hint}"}]
