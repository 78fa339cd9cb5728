"""Keys of models: `actor`, `ref_actor` and `critic`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from RL2.config.values import Count, Index, NonNegative, PositiveFloat, Range, Share
from RL2.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class KL:
    coef: NonNegative
    """Weight of the KL divergence to the reference policy; above 0 a reference model is loaded."""
    type: Literal["loss", "reward", "advantage"]
    """Where it enters: added to the loss, taken off the reward of each token, or off its advantage."""
    estimator: Literal["k1", "k2", "k3"] | None
    """Per-token estimator (http://joschu.net/blog/kl-approx.html). reward, advantage: k1, as null; the gradient of k2
    and k3 is not that of KL(policy || reference) there. loss: k2, as null, or k3; k1 has an expected gradient of 0."""
    importance_weight: bool
    """loss: each token's term is weighted by p / p_old, p_old being the probability under the policy that sampled it
    (update_per_rollout, rollout.max_staleness). false: no weight, as in GRPO's paper: both are biased off-policy, and
    on-policy the gradient of k3 is that of KL(reference || policy)."""

    @property
    def used_estimator(self) -> Literal["k1", "k2", "k3"]:
        """`estimator`, or the default of `type`."""
        return self.estimator or ("k2" if self.type == "loss" else "k1")

    def __post_init__(self) -> None:
        if self.type != "loss" and self.used_estimator != "k1":
            raise ConfigError(
                f"actor.kl.estimator={self.estimator} with actor.kl.type={self.type} does not have the gradient of "
                "KL(policy || reference); set actor.kl.estimator=k1"
            )
        if self.type == "loss" and self.used_estimator == "k1":
            raise ConfigError(
                "actor.kl.estimator=k1 with actor.kl.type=loss has an expected gradient of 0; "
                "set actor.kl.estimator=k2 or k3"
            )
        if self.type != "loss" and not self.importance_weight:
            raise ConfigError(f"actor.kl.importance_weight=false has no effect with actor.kl.type={self.type}")


@dataclass(frozen=True, kw_only=True)
class Entropy:
    coef: float
    """Subtracted, coef * H: positive encourages entropy, negative penalises it."""


@dataclass(frozen=True, kw_only=True)
class PathKnobs:
    """Knobs of the SPO family (objectives/spo.py)."""

    detach_target: bool | None
    """spo, binary_jsd: true takes p_m as a fixed target; false, as null, lets the gradient flow through it too (the
    fork's way)."""
    region: Literal["above_half", "all", "below_half"] | None
    """spo_0p5: which tokens train, by their probability. above_half, as null, is the fork's way, all the formula as
    published."""


@dataclass(frozen=True, kw_only=True)
class Select:
    """Which tokens train, chosen over the whole minibatch of an optimizer step as the policy was before it."""

    entropy_quantile: Annotated[float, Range(0, 0.999)]
    """Only tokens whose entropy is at or above this quantile: 0.8 trains the top fifth; 0: all."""
    not_mode: bool
    """Only tokens that were not the most likely one."""
    on_policy: bool
    """Only tokens that the present weights sampled, none of older ones (rollout.max_staleness)."""
    not_truncated: bool
    """Only tokens of trajectories that did not run into a length limit; the others count in baselines and in what
    `average_over=all` divides by (rollout.overlong_filtering leaves them out of both)."""

    @property
    def is_on(self) -> bool:
        """Some sampled tokens may be left out."""
        return self.entropy_quantile > 0 or self.not_mode or self.on_policy or self.not_truncated


@dataclass(frozen=True, kw_only=True)
class Trainable:
    """A model with an optimizer."""

    model_name: str
    """Hub name, or folder with config.json, safetensors and tokenizer."""
    dtype: Literal["auto", "float32", "bfloat16"]
    """Compute dtype. auto: bfloat16 on GPUs, float32 on CPUs. Weights that train and the optimizer are stored in
    float32 in any case; a base under LoRA adapters, which does not train, in the compute dtype."""
    use_liger_kernel: bool
    """Liger's Triton kernels for norm, rotary embedding and MLP (GPU; pip install rl2-spo[liger])."""
    gradient_checkpointing: bool
    """Recompute activations in the backward pass: less memory, more time."""
    ddp_size: Count
    """Replicas of the model; each is sharded (FSDP) over the world_size / ddp_size processes of its own (HSDP)."""
    tp_size: Count
    """Tensor parallelism: processes over which every layer is split. Neighbours, best within one machine."""
    sp_size: Count
    """Sequence parallelism: processes over which the tokens of a microbatch are split, for long sequences."""
    offload_model: bool
    """Between its phases of a step the model is in host memory, and leaves that of the GPU to others."""
    offload_optimizer: bool
    """Between optimizer steps the optimizer's state is in host memory."""
    max_length_per_device: Count
    """Tokens of one microbatch on each of the sp_size processes that share it; also limits a sequence."""
    lr: NonNegative
    """Peak learning rate."""
    betas: tuple[Share, Share]
    """AdamW."""
    eps: PositiveFloat
    """AdamW."""
    weight_decay: NonNegative
    """AdamW, on matrices only."""
    max_grad_norm: PositiveFloat
    """Gradients are scaled down to this norm."""
    scheduler: Literal["constant", "linear", "cosine", "wsd"]
    """After warm-up: constant, linear or cosine to 0, or constant and then linear to 0 over the last `decay_ratio`."""
    warmup_ratio: Share | None
    """Share of all optimizer steps over which the rate rises linearly from 0. null: 0 for constant, else 0.1."""
    decay_ratio: Share
    """wsd: share of all optimizer steps over which the rate falls to 0."""

    @property
    def used_warmup_ratio(self) -> float:
        """`warmup_ratio`, or the default of `scheduler`."""
        default = 0.0 if self.scheduler == "constant" else 0.1
        return default if self.warmup_ratio is None else self.warmup_ratio

    @property
    def max_length(self) -> int:
        """Tokens of a microbatch, and so of the longest sequence that can be trained on."""
        return self.max_length_per_device * self.sp_size


@dataclass(frozen=True, kw_only=True)
class TrainableChat(Trainable):
    """A model with an optimizer whose rows may be chats."""

    chat_template: str | None = None
    """A file with a chat template (Jinja) in place of the tokenizer's own; null: its own. Exports carry it."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Settings of the chat template by name, such as enable_thinking=false; a row's own go first. Exports keep them as
    defaults."""


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Low-rank adapters, which then are all that trains (LoRA, through peft: pip install rl2-spo[lora])."""

    rank: Index
    """Columns of each adapter; 0: none, and all weights train."""
    alpha: Count
    """An adapter is scaled by alpha / rank."""
    target_modules: tuple[str, ...]
    """Names of the linear layers that get one."""
    save: Literal["merged", "adapter"]
    """What the run exports: a model of the usual kind, or the adapter alone, for peft."""


@dataclass(frozen=True, kw_only=True)
class TrainablePolicy(TrainableChat):
    """A language model with an optimizer."""

    lora: Lora

    logits_budget_mib: PositiveFloat | None
    """Logits that are in memory at a time, in MiB; null: 64 on CPUs, 512 on GPUs."""

    def __post_init__(self) -> None:
        if self.lora.rank and self.tp_size > 1:
            raise ConfigError(f"actor.lora.rank={self.lora.rank} does not go with actor.tp_size={self.tp_size}")
        if self.lora.rank and not self.lora.target_modules:
            raise ConfigError("actor.lora.target_modules is empty: nothing would train")
        if not self.lora.rank and self.lora.save == "adapter":
            raise ConfigError("actor.lora.save=adapter has no effect with actor.lora.rank=0")


@dataclass(frozen=True, kw_only=True)
class SFTActor(TrainablePolicy):
    """What is fine-tuned."""

    avg_level: Literal["token", "sequence"]
    """token: every token weighs the same. sequence: mean over each sequence's tokens, then over sequences."""
    objective: str
    """What is minimised on the tokens of the responses: sft is cross-entropy; otherwise as of ppo, but one that reads
    no advantages and no older policy."""
    objective_args: dict[str, Any]
    """Knobs of the objective by name; those that are not given keep the defaults of its function."""


@dataclass(frozen=True, kw_only=True)
class Actor(TrainablePolicy):
    """The policy."""

    max_inference_length_per_device: Count
    """Tokens of one microbatch without gradients."""
    avg_level: Literal["token", "sequence", "constant"]
    """token: every token weighs the same. sequence: mean over each sequence's tokens, then over sequences. constant:
    sum over each sequence's tokens / avg_length, then the mean over sequences (Dr. GRPO)."""
    avg_length: Count | None
    """constant: tokens that each sequence's sum is divided by; by default the most that a response can have."""
    temperature: PositiveFloat
    """Divides the logits in training; the sampling temperature, so that both see one distribution."""
    objective: str
    """What is minimised: a name of objectives/registry.py, or path.py:function of your own (docs/objectives.md)."""
    objective_args: dict[str, Any]
    """Knobs of the objective by name; those that are not given keep the defaults of its function."""
    path: PathKnobs
    clip: PositiveFloat | None
    """ppo, gspo: the probability ratio is clipped to [1 - clip, 1 + clip]; null: the objective's own default."""
    train_on: Literal["all", "correct"]
    """correct: only sequences of trajectories whose total reward is above 0."""
    average_over: Literal["all", "kept", "correct"]
    """What the sum is divided by: everything in the optimizer step (thesis 3.1), only what trains (3.2), or, where
    `select` leaves tokens out, all tokens of the correct sequences."""
    regularize_on: Literal["kept", "all"]
    """Tokens that the KL divergence in the loss and the entropy act on. kept: those that train_on and select keep, with
    their weights. all: every sampled token, averaged over all of them."""
    update_per_rollout: Count
    """Optimizer steps on one rollout."""
    freeze_steps: Index
    """Steps at the beginning in which only the critic learns (`adv.estimator=gae`)."""
    tis_coef: NonNegative
    """Cap of the importance weight exp(trainer logp - engine logp) on each token's loss; 0: no weights."""
    tis_level: Literal["token", "sequence"]
    """token: each token's own ratio. sequence: the product over the tokens of its sequence."""
    tis_mode: Literal["truncate", "mask"]
    """What becomes of a weight above tis_coef: that number, or 0."""
    select: Select
    kl: KL
    entropy: Entropy

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.average_over == "kept" and self.train_on == "all" and not self.select.is_on:
            raise ConfigError(
                "actor.average_over=kept has no effect: actor.train_on=all and actor.select keep everything"
            )
        if self.average_over == "correct" and self.train_on == "all":
            raise ConfigError("actor.average_over=correct needs actor.train_on=correct")
        if self.tis_coef == 0 and (self.tis_level, self.tis_mode) != ("token", "truncate"):
            raise ConfigError("actor.tis_level and actor.tis_mode have no effect with actor.tis_coef=0")


@dataclass(frozen=True, kw_only=True)
class DPOActor(TrainablePolicy):
    """The policy that learns from preferences (objectives/preference.py)."""

    loss: Literal["sigmoid", "ipo"]
    """sigmoid: DPO. ipo: the squared distance of the margin from 1 / (2 beta), which bounds it."""
    beta: PositiveFloat
    """Scale of the implicit reward: the smaller, the further the policy may go from the reference."""
    label_smoothing: Annotated[float, Range(0, 0.499)]
    """sigmoid: probability that a label is wrong (conservative DPO)."""
    reference_free: bool
    """Log-probabilities count as they are, not relative to `ref_actor`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss != "sigmoid" and self.label_smoothing > 0:
            raise ConfigError(f"actor.label_smoothing={self.label_smoothing} has no effect with actor.loss={self.loss}")


@dataclass(frozen=True, kw_only=True)
class Critic(Trainable):
    """The value model of `adv.estimator=gae`; with another estimator none is loaded."""

    max_inference_length_per_device: Count
    """Tokens of one microbatch without gradients."""
    avg_level: Literal["token", "sequence"]
    """token: every token weighs the same. sequence: mean over each sequence's tokens, then over sequences."""
    clip: PositiveFloat
    """A value is not drawn further than this from what it was when the rollout arrived."""
    update_per_rollout: Count
    """Optimizer steps on one rollout."""


@dataclass(frozen=True, kw_only=True)
class RefActor:
    model_name: str
    """As `actor.model_name`; by default the model that training starts from."""
    max_inference_length_per_device: Count
    """Tokens of one microbatch."""


def num_shards(model: Trainable, world_size: int, group: str) -> int:
    """FSDP shards of each replica: what ddp_size, sp_size and tp_size leave of the processes.

    `group` is that of the keys. Raises ConfigError if the sizes do not divide the processes.
    """
    product = model.ddp_size * model.sp_size * model.tp_size
    if world_size % product:
        raise ConfigError(
            f"{group}.ddp_size={model.ddp_size} x {group}.sp_size={model.sp_size} x {group}.tp_size={model.tp_size} "
            f"= {product} does not divide the {world_size} processes "
            f"({world_size} = ddp_size x FSDP shards x sp_size x tp_size)"
        )
    return world_size // product


def times_sp(tokens: int, group: str, sp_size: int) -> str:
    """Return a limit per process as text, with the number of processes that share a microbatch."""
    return f"{tokens}" + (f" x {group}.sp_size={sp_size}" if sp_size > 1 else "")
