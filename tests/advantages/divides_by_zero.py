from RL2.batch.advantages import reinforce
from RL2.batch.estimator import reads


@reads("rewards", "groups")
def estimator(batch):
    """The deviation of the rollout, without a small number beside it."""
    advantage_T = reinforce(batch)
    return advantage_T / advantage_T[batch.action_T].std()
