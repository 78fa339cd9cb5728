from torch import Tensor

from RL2.objectives.closed_forms import dlogp
from RL2.objectives.objective import Loss, needs
from RL2.types import TokenBatch, TokenStats


def objective_gradient(p_TV: Tensor, batch: TokenBatch) -> Tensor:
    """Forgets that the square has a factor of 2."""
    return -dlogp(p_TV, batch.labels_T) * -p_TV.gather(1, batch.labels_T[:, None]).log()


@needs("logp", gradient=objective_gradient)
def objective(stats: TokenStats, batch: TokenBatch) -> Loss:
    return stats.logp.square(), {}
