"""Schedule of the groups that begin and train at each step; some begin before they are needed."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any

from RL2.config.programs import RLConfig
from RL2.data.cursor import Cursor
from RL2.data.prompts import Places
from RL2.rollout.episodes import Episodes, Group, Progress
from RL2.types import Prompt, Trajectory

STRIDE = 1_000_000
"""Group `step * STRIDE + place` of a run is the one at `place` in the batch of `step`: seed and process follow."""


def rollout_seed(config: RLConfig, batch: int) -> int:
    """Return the seed of the rollout of a batch, with which a group's place in it makes its random numbers."""
    return config.trainer.seed * 1_000_000 + batch


class Scheduler:
    """The rollouts of one step after the other.

    A step trains on `train_data.prompts_per_rollout` groups. On-policy they begin when the step does. With
    `rollout.max_staleness=K` they begin K steps before, and overlap with training. With `rollout.partial_rollout`
    more of them are in flight, the step takes those that end first, and the others pause during the update; it waits
    for those that would be too old at the next step. In each case the group of one number has the same prompt and seed.
    """

    def __init__(
        self, prompts: Seq[Prompt], cursor: Cursor, episodes: Episodes, config: RLConfig, num_steps: int
    ) -> None:
        self.prompts, self.cursor, self.episodes, self.config = prompts, cursor, episodes, config
        self.places = Places(prompts)
        self.wanted = config.train_data.prompts_per_rollout
        self.num_groups = num_steps * self.wanted
        self.ahead = round(config.rollout.partial_rollout * self.wanted) or config.rollout.max_staleness * self.wanted
        self.pending: list[Group] = []
        """Groups of this process that have begun and were not taken, oldest first."""
        self.begun: int | None = None
        """Number of groups that have begun, on all processes and in all steps."""
        self.outstanding: list[int] = []
        """Places of the prompts of all groups that have begun, on any process, and were not taken."""
        self.again: list[int] = []
        """Places that were outstanding when a checkpoint was written; they come first."""

    def take(self, step: int, progress: Progress) -> list[Trajectory]:
        """Return the trajectories that the step trains on, the same on every process (collective)."""
        self.begun = step * self.wanted if self.begun is None else self.begun
        end = min((step + 1) * self.wanted + self.ahead, self.num_groups)
        while self.begun < end:
            batch, place = divmod(self.begun, self.wanted)
            places = range(place, min(self.wanted, place + end - self.begun))
            self.pending += self._begin(batch, places, version=step)
            self.begun += len(places)
        processes, bound = self.episodes.processes, self.config.rollout.max_staleness
        mine = len(range(processes.rank, self.wanted, processes.world_size))
        if self.config.rollout.partial_rollout:
            taken = self.episodes.first_done(self.pending, mine, oldest=step - bound)
        else:
            taken = self.pending[:mine]
        self.pending = [group for group in self.pending if group not in taken]
        trajectories = self._finish(taken, 0, progress)
        assert all(step - version <= bound for t in trajectories for version in t.versions), "too old to train on"
        return trajectories

    def take_more(self, number: int, step: int, first: int, progress: Progress) -> list[Trajectory]:
        """Return `number` further groups, numbered from `first`, in place of some that do not train (collective)."""
        return self._finish(self._begin(step, range(first, first + number), version=step), first, progress)

    def close(self) -> None:
        """Cancel the episodes in flight; may be called again."""
        self.episodes.close()

    def state_dict(self) -> dict[str, Any]:
        return self.cursor.state_dict() | {"outstanding": self.outstanding}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.cursor.load_state_dict(state)
        again = state.get("outstanding", [])  # other programs have none
        if not isinstance(again, list) or not all(
            type(row) is int and row in range(len(self.prompts)) for row in again
        ):
            raise ValueError("its outstanding rows are not rows of these data")
        self.again = again

    def _begin(self, batch: int, places: range, version: int) -> list[Group]:
        """Start the groups at `places` of a batch; return those of this process."""
        again, self.again = self.again[: len(places)], self.again[len(places) :]
        rows = [*again, *self.cursor.next(len(places) - len(again))]
        self.outstanding += rows
        return self.episodes.begin(
            [(place, self.prompts[row]) for place, row in zip(places, rows, strict=True)],
            self.config.rollout.train_sampling_params,
            self.config.train_data.responses_per_prompt,
            rollout_seed(self.config, batch),
            first=batch * STRIDE,
            version=version,
        )

    def _finish(self, groups: list[Group], first: int, progress: Progress) -> list[Trajectory]:
        """Wait for `groups` on all processes, and number them within the step from `first`."""
        trajectories = self.episodes.finish(groups, progress)
        numbers = {group: n for n, group in enumerate(dict.fromkeys(t.group for t in trajectories), first)}
        for trajectory in trajectories:
            trajectory.group = numbers[trajectory.group]
            if trajectory.sample == 0:
                self.outstanding.remove(self.places[trajectory.row])
        return trajectories
