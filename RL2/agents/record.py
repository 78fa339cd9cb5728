"""The record of one episode of an agent: what it sent and what was sampled, as token ids.

Turns form a tree. A request that begins with everything that was sent and sampled before a turn ended continues the ids
of that turn; nothing sampled is encoded again. One that rewrites the history begins a tree of its own, and two that
continue the same turn are branches. At the end each branch is a sequence, and each sampled token trains in the first
branch that has it; in the others it is part of the prompt.
"""

from __future__ import annotations

from collections.abc import Iterator
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
        before = [] if self.parent is None else self.parent.path
        return [*before, self]


class Record:
    """The turns of an episode, in the order in which they ended."""

    def __init__(self) -> None:
        self.turns: list[Turn] = []

    def after_messages(self, messages: list[Message], arguments: dict[str, Any]) -> Turn | None:
        """Return the turn that a conversation continues: the longest it begins with, and of equals the newest."""
        found = (
            turn
            for turn in self.turns
            if turn.conversation and turn.arguments == arguments and continues(messages, turn.conversation)
        )
        return _longest(found, lambda turn: len(turn.conversation))

    def after_text(self, text: str) -> Turn | None:
        """Return the turn whose text `text` begins with and goes on."""
        found = (turn for turn in self.turns if text.startswith(turn.text) and len(text) > len(turn.text))
        return _longest(found, lambda turn: len(turn.text))

    def after_ids(self, token_ids: list[int]) -> Turn | None:
        """Return the turn whose token ids `token_ids` begin with and go on."""
        known = ((turn, turn.token_ids) for turn in self.turns)
        found = (turn for turn, ids in known if len(token_ids) > len(ids) and token_ids[: len(ids)] == ids)
        return _longest(found, lambda turn: len(turn.token_ids))

    def sequences(self) -> list[Sequence]:
        """Return a sequence for each branch; the last response is at the end of the last one."""
        parents = {turn.parent for turn in self.turns}
        owned: set[Turn] = set()
        found = []
        for leaf in (turn for turn in self.turns if turn not in parents):
            sequence = Sequence([], [], [], [])
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


def _longest(turns: Iterator[Turn], length: Any) -> Turn | None:
    best: Turn | None = None
    for turn in turns:
        if best is None or length(turn) >= length(best):
            best = turn
    return best
