"""The record of one episode of an agent: what it sent and what was sampled, as token ids.

Turns form a tree. A request that begins with everything that was sent and sampled before a turn ended continues the ids
of that turn; nothing sampled is encoded again. One that rewrites the history begins a tree of its own, and two that
continue the same turn are branches. At the end each branch is a sequence, and each sampled token trains in the first
branch that has it; in the others it is part of the prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from RL2.agents.conversation import continues
from RL2.data.chat import Message
from RL2.rollout.continuation import append
from RL2.types import Completion, Sequence


@dataclass(eq=False)
class Turn:
    """One response, and the request that it answers."""

    parent: Turn | None
    """The turn whose ids it continues."""
    added: list[int]
    """Token ids of what the client added to the parent's, or of the whole prompt."""
    completion: Completion
    before: str
    """Text of all that the model read."""
    action: str
    """Text of the response without its end token."""
    end: str
    """Text of the end token; '' if none was sampled."""
    conversation: list[Message] = field(default_factory=list)
    """All messages sent, and the response; empty if the client sent a text."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """The chat template's arguments beside the messages."""

    @property
    def token_ids(self) -> list[int]:
        """Return the ids of all that the model read and sampled."""
        return [token for turn in self.path for token in (*turn.added, *turn.completion.token_ids)]

    @property
    def text(self) -> str:
        """Return the text of all that the model read and sampled, without the last end token."""
        return self.before + self.action

    @property
    def path(self) -> list[Turn]:
        """Return the turns from the first of its tree to this one."""
        found: list[Turn] = []
        turn: Turn | None = self
        while turn is not None:  # not a recursion: an episode may have thousands of turns
            found.append(turn)
            turn = turn.parent
        return found[::-1]


class Record:
    """The turns of an episode, in the order in which they ended."""

    def __init__(self) -> None:
        self.turns: list[Turn] = []

    def after_messages(self, messages: list[Message], arguments: dict[str, Any]) -> Turn | None:
        """Return the turn whose conversation `messages` begin with and go on: the longest, and of equals the newest."""
        talks = [turn for turn in self.turns if 0 < len(turn.conversation) < len(messages)]
        same = [turn for turn in talks if turn.arguments == arguments]
        return _first(same, lambda turn: len(turn.conversation), lambda turn: continues(messages, turn.conversation))

    def after_text(self, text: str) -> Turn | None:
        """Return the turn whose text `text` begins with and goes on.

        A turn with an empty response is none: its text is a prompt, which other texts may begin with.
        """
        shorter = (turn for turn in self.turns if turn.action and len(turn.text) < len(text))
        return _first(shorter, lambda turn: len(turn.text), lambda turn: text.startswith(turn.text))

    def after_ids(self, token_ids: list[int]) -> Turn | None:
        """Return the turn whose token ids `token_ids` begin with and go on."""
        known = {turn: turn.token_ids for turn in self.turns}
        shorter = (turn for turn, ids in known.items() if len(ids) < len(token_ids))
        return _first(shorter, lambda turn: len(known[turn]), lambda turn: token_ids[: len(known[turn])] == known[turn])

    def sequences(self) -> list[Sequence]:
        """Return a sequence for each branch; the last response is at the end of the last one."""
        parents = {turn.parent for turn in self.turns}
        owned: set[Turn] = set()
        found = []
        for leaf in (turn for turn in self.turns if turn not in parents):
            sequence = Sequence()
            for turn in leaf.path:
                append(sequence, turn.added)
                sampled = turn.completion
                if turn in owned:
                    append(sequence, sampled.token_ids, experts=sampled.experts)
                else:
                    append(sequence, sampled.token_ids, sampled.logps, sampled.versions, sampled.experts)
                owned.add(turn)
            found.append(sequence)
        return found


def _first(turns: Iterable[Turn], length: Callable[[Turn], int], holds: Callable[[Turn], bool]) -> Turn | None:
    """Return the longest turn for which `holds` is true, and of equals the newest; None if it is true for none."""
    longest_first = sorted(turns, key=length)[::-1]
    return next((turn for turn in longest_first if holds(turn)), None)
