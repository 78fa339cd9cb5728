from RL2.objectives.objective import Loss, needs
from RL2.types import TokenBatch, TokenStats


@needs("logp")
def objective(stats: TokenStats, batch: TokenBatch) -> Loss:
    """Advantages minus their mean over whatever is in the microbatch."""
    assert batch.advantage_T is not None
    return -(batch.advantage_T - batch.advantage_T.mean()) * stats.logp, {}
