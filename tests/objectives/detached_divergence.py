from RL2.objectives.objective import Loss, needs
from RL2.types import TokenBatch, TokenStats


@needs("logp", "top_kl_student_teacher", top_k="k")
def objective(stats: TokenStats, batch: TokenBatch, *, k: int = 4) -> Loss:
    return stats.top_kl_student_teacher.detach() * stats.logp, {}
