from RL2.batch.estimator import reads


@reads("rewards", "groups")
def estimator(batch, *, group_size):
    """Groups side by side, each with all of its members."""
    sums_B = batch.reward_T.new_zeros(batch.num_sequences).index_add(0, batch.sequence_T, batch.reward_T)
    sums_N = batch.reward_T.new_zeros(int(batch.trajectory_B.max()) + 1).index_add(0, batch.trajectory_B, sums_B)
    mean_N = sums_N.reshape(-1, group_size).mean(1).repeat_interleave(group_size)
    return (sums_N - mean_N)[batch.trajectory_B[batch.sequence_T]]
