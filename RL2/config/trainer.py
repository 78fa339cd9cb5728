"""Keys of `adv` and `trainer`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from RL2.config.values import Count, Index, PositiveFloat, Seed, Share
from RL2.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Rae:
    """Role-conditioned advantage estimation (docs/multi_agent.md)."""

    decay: Share = 0.95
    """Weight of the mean so far when a trajectory is added to the running mean of its role's rewards: 0.95 remembers
    about the last 20 trajectories, 1 keeps the mean of the first rollout."""


@dataclass(frozen=True, kw_only=True)
class Advantage:
    """Settings of advantages, which are computed from rewards."""

    estimator: str = "reinforce"
    """Advantage estimator. reinforce: reward minus the group's mean (GRPO and Dr. GRPO, docs/ppo.md). gdpo: reward
    parts, each normalised within the group, then weighted, summed and normalised over the rollout (GDPO, arXiv
    2601.05242). rloo: reward minus the mean of the other members of the group. rae: reward minus a running mean for
    each role (SPIRAL, docs/multi_agent.md). remax: reward minus that of a greedy response to the same prompt, which is
    one more response for each prompt of a step (ReMax, arXiv 2310.10505). maxrl, opo, gpg, pass_at_k, best_of_group,
    soft_value, otb: further baselines of groups (docs/ppo.md). branch: changes of the value along a response, estimated
    from continuations (VinePPO, segment-level SPO, docs/branch.md). spo: the reward itself. gae: generalised advantage
    estimation with a critic (PPO). path.py:function: an estimator of your own (docs/own_advantage.md)."""
    args: dict[str, Any] = field(default_factory=dict)
    """Knobs of the estimator without a key of their own, by name: args.NAME=value."""
    gamma: Share = 1.0
    """Discount factor per token, with gae."""
    lamda: Share = 1.0
    """Decay factor lambda of gae: 1 uses all future rewards, 0 only the next one and the critic's value of the rest."""
    global_norm: bool = False
    """With reinforce: take the mean (and the standard deviation) over the whole rollout instead of each group. With
    a critic: subtract the mean over all action tokens of the rollout."""
    norm_var: bool = False
    """Divide by the standard deviation: with reinforce that of the rewards (as in GRPO), with a critic that over all
    action tokens of the rollout."""
    std_over: Literal["rollout", "tokens"] | None = None
    """Standard deviation of reinforce with norm_var. null: over the group, or the rollout with global_norm, like the
    mean. rollout: over all rewards of the rollout. tokens: the advantages are centred and scaled over all action tokens
    of the rollout (REINFORCE++)."""
    overlong_buffer: Index = 0
    """Number of tokens before max_new_tokens over which the length penalty grows linearly from 0 (DAPO); 0: no
    penalty."""
    overlong_penalty: PositiveFloat = 1.0
    """Length penalty of a response of max_new_tokens, subtracted from the reward before advantages are computed. With
    an estimator that reads the parts of the reward (gdpo): weight of this penalty, which is one more part."""
    rae: Rae = field(default_factory=Rae)


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """The run as a whole."""

    project: str | None = None
    """Name of the project in Weights & Biases and Trackio; null: the default of Weights & Biases, and RL2 in
    Trackio."""
    experiment_name: str
    """Name of the run."""
    seed: Seed = 0
    """Seed of the data order, of sampling and of initialisation."""
    load_ckpt_from: str | None = None
    """Checkpoint folder to resume from, or one of save_dir: `latest`, if there is one, or `best`, the one with the best
    test score. null: start from the model."""
    n_epochs: Count = 1
    """Number of passes over the training data."""
    max_steps: Index | None = None
    """Maximum number of steps, for any n_epochs; null: no maximum."""
    test_freq: Count | None = None
    """Number of steps between tests; there is one before the first step and one after the last. null: no tests."""
    save_dir: str = "ckpts/${trainer.experiment_name}"
    """Folder for everything the run writes: metrics, samples, checkpoints, and the final model in `latest`."""
    save_freq: Count | None = None
    """Number of steps between checkpoints; null: none, only the final model."""
    keep: Index | None = None
    """Number of newest checkpoints to keep; 0: all; null: three."""
    samples_per_step: Index = 8
    """Number of trajectories per step to write to samples.jsonl."""
    records_mib: Count = 4096
    """Maximum size of samples.jsonl and tokens/ on disk, in MiB; beyond it the oldest records are deleted."""
    use_wandb: bool = False
    """Send metrics to Weights & Biases too (pip install rl2-spo[wandb])."""
    use_trackio: bool = False
    """Write metrics to Trackio on this machine too (pip install rl2-spo[trackio]); `trackio show` opens them."""
    use_tensorboard: bool = False
    """Write metrics to save_dir/tensorboard too (pip install rl2-spo[tensorboard])."""
    timeout_s: PositiveFloat = 1800
    """Maximum time to wait for another process, in seconds."""
    dry_run: bool = False
    """Check everything that the run needs, try the environment, print the number of rows and steps and the memory, and
    stop; no model is loaded."""

    def __post_init__(self) -> None:
        if not self.save_dir:
            raise ConfigError("trainer.save_dir is empty; name a folder")
        if self.keep is not None and self.save_freq is None:
            raise ConfigError(f"trainer.keep={self.keep} has no effect without trainer.save_freq")

    @property
    def num_kept(self) -> int | None:
        """Number of newest checkpoints to keep; None: all."""
        return 3 if self.keep is None else self.keep or None


@dataclass(frozen=True, kw_only=True)
class RLTrainer(Trainer):
    """A run of reinforcement learning."""

    replay_freq: Count | None = None
    """Number of steps between steps whose rollouts, and weights before the update, are kept for `rl2 replay`; null:
    none are."""
    token_stats_freq: Count | None = 10
    """Number of steps between steps at which statistics of every token in samples.jsonl are kept, for `rl2 view`; they
    are also kept at the steps of replay_freq and at every test. null: never."""
    eval_only: bool = False
    """Test the model, or the checkpoint of load_ckpt_from, and stop; save_dir must be a new folder."""
    keep_best: bool = False
    """Keep the model with the best test score so far in save_dir/best."""
    early_stop: bool = False
    """Stop when the test score has fallen twice in a row."""
    max_logprob_gap: PositiveFloat = 0.1
    """Maximum mean abs(trainer's logp - engine's logp) over the trained tokens of an optimizer step, in nats; beyond it
    the run stops, because the engine has other weights or sees other tokens. Not checked where top_p, top_k or min_p
    cut the engine's distribution. Usual values: below 1e-5 in float32, about 0.01 in bfloat16."""
