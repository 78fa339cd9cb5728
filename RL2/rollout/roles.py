"""Episodes of several roles as the parts of each role, which train like episodes of their own."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import replace

from RL2.types import Trajectory


def by_role(trajectories: Iterable[Trajectory]) -> list[Trajectory]:
    """Return the part of each role in each episode, in order of appearance; episodes without roles as they are.

    A part has the sequences, texts and reward of its role. That of a role which the policy did not play has no
    sequences.
    """
    return [part for trajectory in trajectories for part in _parts(trajectory)]


def _parts(trajectory: Trajectory) -> list[Trajectory]:
    if not trajectory.speakers:
        return [trajectory]
    texts: dict[str, list[str]] = {role: [] for role in trajectory.speakers}
    for turn, role in enumerate(trajectory.speakers):
        texts[role] += trajectory.texts[2 * turn : 2 * turn + 2]
    sequences = {role: [each for each in trajectory.sequences if each.role == role] for role in texts}
    return [
        replace(
            trajectory,
            role=role,
            speakers=[],
            texts=of_role,
            sequences=sequences[role],
            truncated=trajectory.truncated and bool(sequences[role]),
            parts={},
            weighted=0.0,
        )
        for role, of_role in texts.items()
    ]


def lengths_by_role(trajectories: Seq[Trajectory]) -> dict[str, list[float]]:
    """Return role -> the number of tokens that it sampled in each episode, for the roles that the policy played."""
    found: dict[str, list[float]] = {}
    for part in by_role(trajectories):
        if part.role is not None and part.sequences:
            found.setdefault(part.role, []).append(part.num_tokens)
    return dict(sorted(found.items()))
