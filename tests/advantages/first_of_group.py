from RL2.batch.advantages import spo
from RL2.batch.estimator import reads


@reads("rewards", "groups")
def estimator(batch):
    """The reward minus that of the group's first sequence in the batch."""
    advantage_T, first = spo(batch), {}
    for b, group in enumerate(batch.group_B.tolist()):
        first.setdefault(group, b)
    reward_B = advantage_T.new_zeros(batch.num_sequences).scatter_reduce(0, batch.sequence_T, advantage_T, "amax")
    first_B = batch.group_B.new_tensor([first[group] for group in batch.group_B.tolist()])
    return advantage_T - reward_B[first_B][batch.sequence_T]
