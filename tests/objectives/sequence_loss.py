from RL2.objectives.objective import Loss, needs
from RL2.types import TokenBatch, TokenStats


@needs("logp")
def objective(stats: TokenStats, batch: TokenBatch) -> Loss:
    """The log-probability of each sequence."""
    return -stats.logp.new_zeros(batch.num_sequences).index_add(0, batch.sequence_T, stats.logp), {}
