"""Running means of the rewards of roles: the baseline of role-conditioned advantage estimation."""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq
from typing import Any

import torch
from torch import Tensor


class RoleMeans:
    """Exponential running mean of the reward of each role, which a checkpoint keeps.

    The mean b of a role becomes decay * b + (1 - decay) * R with each reward R, in the order of the trajectories
    (SPIRAL, arXiv 2506.24119). It begins with the mean of the first rollout in which the role occurs.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.means: dict[str, float] = {}
        """Role -> running mean; '' is the role of trajectories without one."""

    def baseline(self, roles: Seq[str | None], reward_N: Tensor) -> Tensor:
        """Return the mean of each trajectory's role from before this rollout, float64 [N], and add the rewards to it.

        The first rollout of a role is its own baseline.
        """
        named, rewards = [role or "" for role in roles], reward_N.tolist()
        for role in sorted(set(named) - self.means.keys()):
            first = [reward for reward, of in zip(rewards, named, strict=True) if of == role]
            self.means[role] = math.fsum(first) / len(first)
        before_N = torch.tensor([self.means[role] for role in named], dtype=torch.float64, device=reward_N.device)
        for role, reward in zip(named, rewards, strict=True):
            self.means[role] = self.decay * self.means[role] + (1 - self.decay) * reward
        return before_N

    def state_dict(self) -> dict[str, Any]:
        """Return the means, as JSON has them."""
        return {"role_means": dict(self.means)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the means of `state`; there are none in checkpoints of other estimators. Raise ValueError."""
        means = state.get("role_means", {})
        if not isinstance(means, dict) or not all(
            isinstance(mean, int | float) and math.isfinite(mean) for mean in means.values()
        ):
            raise ValueError("its running means of roles are not numbers")
        self.means = {str(role): float(mean) for role, mean in means.items()}
