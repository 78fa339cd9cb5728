from RL2.objectives.objective import Loss, needs
from RL2.types import TokenBatch, TokenStats


@needs("logp")
def objective(stats: TokenStats, batch: TokenBatch, *, margin: float = 0.1) -> Loss:
    """The margin is added and taken away again."""
    return margin - stats.logp - margin, {}
