from torch import Tensor

from RL2.objectives.objective import Loss, needs
from RL2.types import TokenBatch, TokenStats


def plogp(p_T: Tensor) -> Tensor:
    return p_T * p_T.log()


@needs("logp")
def objective(stats: TokenStats, batch: TokenBatch) -> Loss:
    """The entropy of Bern(p_a) from 1 - p_a by subtraction: 0 times minus infinity at p_a = 1."""
    p_T = stats.logp.exp()
    return -plogp(p_T) - plogp(1 - p_T), {}
