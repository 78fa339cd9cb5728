from RL2.objectives.objective import Loss, needs
from RL2.types import TokenBatch, TokenStats


@needs("logp")
def objective(stats: TokenStats, batch: TokenBatch) -> Loss:
    """Each token against all tokens that happen to be there."""
    return stats.logp.logsumexp(0) - stats.logp, {}
