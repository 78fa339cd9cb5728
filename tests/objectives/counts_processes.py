import torch.distributed as dist

from RL2.objectives.objective import Loss, needs
from RL2.types import TokenBatch, TokenStats


@needs("logp")
def objective(stats: TokenStats, batch: TokenBatch) -> Loss:
    """Undoes an average over processes that nobody takes."""
    return -stats.logp * (dist.get_world_size() if dist.is_initialized() else 1), {}
