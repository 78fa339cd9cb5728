from RL2.objectives.objective import Loss, needs
from RL2.types import TokenBatch, TokenStats


@needs("logp")
def objective(stats: TokenStats, batch: TokenBatch) -> Loss:
    """The factor 1 - p_a is taken past autograd."""
    return -(1 - stats.logp.data.exp()) * stats.logp, {}
