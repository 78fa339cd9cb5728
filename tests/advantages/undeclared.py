from RL2.batch.advantages import spo
from RL2.batch.estimator import reads


@reads("rewards")
def estimator(batch):
    """A penalty for truncated responses."""
    cost_B = 0.0 if batch.truncated_B is None else batch.truncated_B.double()
    return spo(batch) - (cost_B[batch.sequence_T] if batch.truncated_B is not None else 0.0)
