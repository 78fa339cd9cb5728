"""The groups that training takes, in the order of the data: some may be begun before they are needed."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any

from RL2.config.programs import RLConfig
from RL2.data.cursor import Cursor
from RL2.rollout.collect import Group
from RL2.rollout.spread import Progress, Rollouts
from RL2.types import Prompt, Trajectory


class Supply:
    """The rollouts of one step after the other.

    A step trains on `train_data.prompts_per_rollout` groups. On-policy they begin when the step does. With
    `rollout.max_staleness=K` they begin K steps before, and go on beside the training. With `rollout.partial_rollout`
    more of them are under way, the step takes those that end first, and the others stand still during the update; those
    that would be too old at the next step are waited for. In each case group n of batch m has the same prompt and seed.
    """

    def __init__(
        self, prompts: Seq[Prompt], cursor: Cursor, rollouts: Rollouts, config: RLConfig, num_steps: int
    ) -> None:
        self.prompts, self.cursor, self.rollouts, self.config = prompts, cursor, rollouts, config
        self.wanted = config.train_data.prompts_per_rollout
        self.num_groups = num_steps * self.wanted
        self.ahead = round(config.rollout.partial_rollout * self.wanted) or config.rollout.max_staleness * self.wanted
        self.pending: list[Group] = []
        """Those of this process that have begun and were not taken, oldest first."""
        self.begun: int | None = None
        """Groups of the whole run that have begun."""
        self.outstanding: list[int] = []
        """Rows of all that have begun, on any process, and were not taken."""
        self.again: list[int] = []
        """Rows that were outstanding when a checkpoint was written; they come first."""

    def rollout(self, step: int, progress: Progress) -> list[Trajectory]:
        """Return the trajectories that the step trains on, the same on every process (collective)."""
        self.begun = step * self.wanted if self.begun is None else self.begun
        end = min((step + 1) * self.wanted + self.ahead, self.num_groups)
        while self.begun < end:
            batch, first = divmod(self.begun, self.wanted)
            number = min(end - self.begun, self.wanted - first)
            self.pending += self._begin(number, batch, first, step, before=batch * self.wanted)
            self.begun += number
        processes, bound = self.rollouts.processes, self.config.rollout.max_staleness
        mine = len(range(processes.rank, self.wanted, processes.world_size))
        if self.config.rollout.partial_rollout:
            taken = self.rollouts.first_done(self.pending, mine, oldest=step - bound)
        else:
            taken = self.pending[:mine]
        self.pending = [group for group in self.pending if group not in taken]
        trajectories = self._finish(taken, progress)
        assert all(step - version <= bound for t in trajectories for version in t.versions), "too old to train on"
        places = {number: place for place, number in enumerate(dict.fromkeys(t.group for t in trajectories))}
        for trajectory in trajectories:
            trajectory.group = places[trajectory.group]
        return trajectories

    def more(self, number: int, step: int, first_group: int, progress: Progress) -> list[Trajectory]:
        """Return `number` groups beside those of `rollout`, in place of some that are not trained on (collective)."""
        return self._finish(self._begin(number, step, first_group, step), progress)

    def close(self) -> None:
        """Stop what is under way; may be called again."""
        self.rollouts.close()

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

    def _begin(self, number: int, batch: int, first_group: int, step: int, before: int = 0) -> list[Group]:
        again, self.again = self.again[:number], self.again[number:]
        rows = [*again, *self.cursor.next(number - len(again))]
        self.outstanding += rows
        return self.rollouts.begin(
            [self.prompts[row] for row in rows],
            self.config.rollout.train_sampling_params,
            self.config.train_data.responses_per_prompt,
            self.config.trainer.seed * 1_000_000 + batch,  # a seed of its own for each batch
            first_group=first_group,
            before=before,
            version=step,
        )

    def _finish(self, groups: list[Group], progress: Progress) -> list[Trajectory]:
        trajectories = self.rollouts.finish(groups, progress)
        for trajectory in trajectories:
            if trajectory.sample == 0:
                self.outstanding.remove(trajectory.row)
        return trajectories
