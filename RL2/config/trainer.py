"""Keys of `adv` and `trainer`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from RL2.config.values import Count, Index, PositiveFloat, Seed, Share
from RL2.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Advantage:
    estimator: str
    """reinforce: reward minus the group's mean (Dr. GRPO). gdpo: each part of the reward normalised within the group,
    weighted, summed, and normalised over the rollout (GDPO, arXiv 2601.05242). rloo: reward minus the mean of the
    group's others. spo: the reward itself. gae: rewards to come minus the critic's estimate (PPO). path.py:function: an
    estimator of your own."""
    args: dict[str, Any] = field(default_factory=dict)
    """Knobs of an estimator of your own: adv.args.NAME=value."""
    gamma: Share
    """gae: discount of a reward for each token between."""
    lamda: Share
    """gae: 1 sums all rewards to come; 0 takes the next one and the critic's value after it."""
    global_norm: bool
    """reinforce: mean (and deviation) over the whole rollout instead of each group. Estimators with a critic: minus the
    mean over all action tokens of the rollout."""
    norm_var: bool
    """reinforce: divide by the standard deviation (GRPO). Estimators with a critic: divide by that over all action
    tokens of the rollout."""
    std_over: Literal["rollout", "tokens"] | None
    """reinforce, norm_var: null divides by the deviation over the same trajectories as the mean, the group or the
    rollout. rollout: by that of all rewards of the rollout. tokens: minus the mean of the advantages over all action
    tokens of the rollout, divided by their deviation (REINFORCE++)."""
    overlong_buffer: Index
    """Tokens before max_new_tokens over which the penalty for length rises linearly (DAPO); 0: no penalty."""
    overlong_penalty: PositiveFloat
    """Penalty of a response of max_new_tokens, subtracted from the reward that the advantage is computed from. An
    estimator that reads the parts of the reward (gdpo): weight of this penalty, which is one more part."""


@dataclass(frozen=True, kw_only=True)
class Trainer:
    project: str | None
    """Name of the project in wandb."""
    experiment_name: str
    """Name of the run."""
    seed: Seed
    """Of data order, sampling and initialisation."""
    load_ckpt_from: str | None
    """A checkpoint folder to resume from, or one of save_dir: `latest`, if there is one yet, or `best`, which has the
    best test score, to go back to."""
    n_epochs: Count
    """Passes over the training data."""
    max_steps: Index | None
    """Stop after this many steps, whatever n_epochs says."""
    test_freq: Count | None
    """Test every so many steps, before the first and after the last; null: never."""
    save_dir: str
    """Everything the run writes: metrics, samples, checkpoints, and the model in `latest`."""
    save_freq: Count | None
    """Checkpoint every so many steps; null: only the final model."""
    keep: Index | None
    """How many of the newest checkpoints stay; null: three, 0: all."""
    samples_per_step: Index
    """Trajectories written to samples.jsonl at each step."""
    records_mib: Count
    """MiB that samples.jsonl and tokens/ may take on the disk; beyond, the oldest go."""
    use_wandb: bool
    """Metrics go to Weights & Biases too (pip install rl2-spo[wandb])."""
    use_trackio: bool
    """Metrics go to Trackio on this machine too (pip install rl2-spo[trackio]); `trackio show` opens them."""
    use_tensorboard: bool
    """Metrics go to save_dir/tensorboard too (pip install rl2-spo[tensorboard])."""
    timeout_s: PositiveFloat
    """Limit of every wait on another process."""
    dry_run: bool
    """Check all that the run needs, try the environment, count rows, steps, memory, and stop: no weights are read."""

    def __post_init__(self) -> None:
        if not self.save_dir:
            raise ConfigError("trainer.save_dir is empty; name a folder")
        if self.keep is not None and self.save_freq is None:
            raise ConfigError(f"trainer.keep={self.keep} has no effect without trainer.save_freq")

    @property
    def num_kept(self) -> int | None:
        """How many of the newest checkpoints stay; None: all."""
        return 3 if self.keep is None else self.keep or None


@dataclass(frozen=True, kw_only=True)
class RLTrainer(Trainer):
    replay_freq: Count | None
    """Keep the rollouts of every so many steps, and the weights before the update, for `rl2 replay`; null: never."""
    token_stats_freq: Count | None
    """Statistics of every token of the trajectories in samples.jsonl, for `rl2 view`: at every so many steps, at those
    of replay_freq and at every test; null: never."""
    eval_only: bool
    """Test the model, or the checkpoint of load_ckpt_from, and stop; save_dir is a new folder."""
    keep_best: bool
    """The model with the best test score so far is in save_dir/best."""
    early_stop: bool
    """Stop when the test score fell twice in a row."""
    max_logprob_gap: PositiveFloat
    """Limit of the mean abs(trainer's logp - engine's logp) over the trained tokens of an optimizer step, in nats;
    beyond it the run stops: the engine has other weights, or sees other tokens. Not watched where top_p or top_k cut
    the engine's distribution. float32 shows below 1e-5, bfloat16 about 0.01."""
