from RL2.objectives.objective import Loss, needs
from RL2.types import TokenBatch, TokenStats


@needs("logp")
def objective(stats: TokenStats, batch: TokenBatch) -> Loss:
    return -stats.logp - 0.01 * stats.entropy, {}
