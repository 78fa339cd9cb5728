from RL2.batch.advantages import spo
from RL2.batch.estimator import reads


@reads("rewards", baseline=True)
def estimator(batch):
    """A mean over tokens in float32, which rounds."""
    reward_T = spo(batch) * 1.1
    actions = reward_T[batch.action_T]
    return (reward_T - actions.sum() / len(actions)) * batch.action_T
