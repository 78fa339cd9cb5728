from RL2.objectives.objective import Loss, needs
from RL2.types import TokenBatch, TokenStats


@needs("logp", "teacher_logp")
def objective(stats: TokenStats, batch: TokenBatch) -> Loss:
    return (stats.logp - stats.teacher_logp).detach().clamp(-5, 5) * stats.logp, {}
