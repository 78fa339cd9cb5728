from RL2.batch.advantages import spo
from RL2.batch.estimator import reads


@reads("rewards")
def estimator(batch):
    """Rewards clipped where they stand."""
    batch.reward_T.clamp_(-0.1, 0.1)
    return spo(batch)
