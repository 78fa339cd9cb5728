"""The coefficient of the entropy bonus, fixed or adapted to a target."""

from __future__ import annotations

import math
from typing import Any

from RL2.config.model import Entropy


class EntropyCoef:
    """The coefficient of the next optimizer step, which a checkpoint keeps.

    Without a target it is constant. With one it follows the adaptive entropy control of Skywork-OR1 (arXiv 2505.22312):
    c rises by `step` if the entropy is below the target, and falls by it, not below 0, if the entropy is above. The
    bonus has the coefficient c while the entropy is at most the target, and otherwise 0. The entropy is that of the
    last optimizer step, over the tokens that it trained, so no pass is needed for it. The first step has the initial c.
    """

    def __init__(self, config: Entropy) -> None:
        self.config = config
        self.c = config.coef
        self.is_low = True
        """False if the entropy of the last step was above the target."""

    @property
    def used(self) -> float:
        """The coefficient of the next optimizer step."""
        return self.c if self.is_low else 0.0

    def follow(self, entropy: float) -> None:
        """Update the coefficient from the mean entropy, in nats, of an optimizer step."""
        target = self.config.target
        if target is None:
            return
        self.is_low = entropy <= target
        if entropy != target:
            self.c = max(0.0, self.c + math.copysign(self.config.step, target - entropy))

    def state_dict(self) -> dict[str, Any]:
        """Return the state as JSON has it; empty without a target."""
        return {} if self.config.target is None else {"entropy_coef": [self.c, self.is_low]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over `state`, unless it is that of a run without a target. Raise ValueError if it is damaged."""
        if self.config.target is None or "entropy_coef" not in state:
            return
        match state["entropy_coef"]:
            case [int() | float() as c, bool() as is_low] if 0 <= c < math.inf:
                self.c, self.is_low = float(c), is_low
            case _:
                raise ValueError("its entropy coefficient is not a number of at least 0")
