from RL2.batch.advantages import reinforce
from RL2.batch.estimator import reads


@reads("rewards", "groups", baseline=True)
def estimator(batch, *, margin: float = 0.1):
    """A knob that nothing reads."""
    return reinforce(batch)
