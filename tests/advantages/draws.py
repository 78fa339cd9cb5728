import torch

from RL2.batch.advantages import spo
from RL2.batch.estimator import reads


@reads("rewards")
def estimator(batch):
    """A little noise."""
    advantage_T = spo(batch)
    return advantage_T + 0.01 * torch.randn_like(advantage_T)
