"""Keys of models: `actor`, `ref_actor`, `teacher` and `critic`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from RL2.config.values import EMA, POLICY, START, Count, Index, NonNegative, PositiveFloat, Range, Share, interpolated
from RL2.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class KL:
    """The KL divergence to the reference policy."""

    coef: NonNegative = 0.0
    """Coefficient of the KL divergence to the reference policy; above 0 a reference model is loaded."""
    type: Literal["loss", "reward", "advantage"] = "loss"
    """Place of the penalty: added to the loss, or subtracted from each token's reward or advantage."""
    estimator: Literal["k1", "k2", "k3", "exact"] | None = None
    """Per-token estimator (http://joschu.net/blog/kl-approx.html). With type=reward or advantage: k1, also for null;
    there only k1 has the gradient of KL(policy || reference). With type=loss: k2, also for null, or k3; there the
    expected gradient of k1 is 0. exact: the divergence itself, over the whole vocabulary, with its gradient; the
    reference runs in the update, as a teacher does."""
    importance_weight: bool = True
    """With type=loss: weight each token's term by p / p_old, where p_old is its probability under the policy that
    sampled it. Matters off-policy (actor.update_per_rollout, rollout.max_staleness). false, as in GRPO's paper: k2 and
    k3 are biased off-policy, and the on-policy gradient of k3 is that of KL(reference || policy)."""

    @property
    def used_estimator(self) -> Literal["k1", "k2", "k3", "exact"]:
        """The estimator in use: `estimator`, or the default for `type`."""
        return self.estimator or ("k2" if self.type == "loss" else "k1")

    @property
    def is_exact(self) -> bool:
        """True if the whole divergence is in the loss."""
        return self.coef > 0 and self.estimator == "exact"

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
        if self.estimator == "exact" and not self.importance_weight:
            raise ConfigError(
                "actor.kl.importance_weight=false has no effect with actor.kl.estimator=exact, which samples no token"
            )
        if self.type != "loss" and not self.importance_weight:
            raise ConfigError(f"actor.kl.importance_weight=false has no effect with actor.kl.type={self.type}")


@dataclass(frozen=True, kw_only=True)
class Entropy:
    """The entropy bonus."""

    coef: float = 0.0
    """Coefficient of the entropy H; coef * H is subtracted from the loss, so a positive value encourages entropy."""
    target: PositiveFloat | None = None
    """Entropy in nats, averaged over the trained tokens, that the coefficient follows (Skywork-OR1, arXiv 2505.22312;
    0.2 there): after each optimizer step below it the coefficient rises by `step`, and after one above it falls by
    `step`, not below 0, and is not applied. It starts at `coef`. null: it stays `coef`."""
    step: PositiveFloat = 0.005
    """With target: change of the coefficient after each optimizer step."""

    @property
    def is_on(self) -> bool:
        """True if the entropy is in the loss."""
        return self.coef != 0 or self.target is not None

    def __post_init__(self) -> None:
        if self.target is None and self.step != type(self).step:
            raise ConfigError(f"actor.entropy.step={self.step:g} has no effect without actor.entropy.target")
        if self.target is not None and self.coef < 0:
            raise ConfigError(f"actor.entropy.coef={self.coef:g} must be at least 0 with actor.entropy.target")


@dataclass(frozen=True, kw_only=True)
class Observations:
    """The loss on what environments write."""

    coef: NonNegative = 0.0
    """Coefficient of the cross-entropy on observations: the mean of -log p over all tokens between the responses of the
    episodes of an optimizer step, whatever their reward. 0: observations do not train."""


@dataclass(frozen=True, kw_only=True)
class Imitation:
    """The loss on correct responses that is added to the objective."""

    coef: NonNegative = 0.0
    """Coefficient of the mean of -log p over all sampled tokens of correct trajectories of an optimizer step (the
    positive-example loss of VAPO, 0.1 there). A trajectory is correct if its total reward is above 0. 0: none."""


@dataclass(frozen=True, kw_only=True)
class PathKnobs:
    """Options of the SPO family (objectives/spo.py)."""

    detach_target: bool | None = None
    """Objectives spo and binary_jsd: whether p_m, the probability of the most likely token, is a constant target. null
    and false let the gradient flow through it, as the fork does."""
    region: Literal["above_half", "all", "below_half"] | None = None
    """Objective spo_0p5: which tokens train, by their probability. null means above_half, as in the fork; all is the
    formula as published."""


@dataclass(frozen=True, kw_only=True)
class Select:
    """Token selection, over the whole minibatch of an optimizer step and under the policy before that step."""

    entropy_quantile: Annotated[float, Range(0, 0.999)] = 0.0
    """Train only tokens whose entropy is at or above this quantile: 0.8 trains the top fifth, 0 all tokens."""
    not_mode: bool = False
    """Train only tokens that were not the most likely one."""
    on_policy: bool = False
    """Train only tokens that the current weights sampled (rollout.max_staleness)."""
    not_truncated: bool = False
    """Train only tokens of trajectories that did not reach a length limit. The others still count in baselines and in
    the denominator of `average_over=all`; rollout.overlong_filtering excludes them from both."""
    second_moment: NonNegative | None = None
    """Leave out the tokens with the largest squares of log(p / p_engine), so that their mean over the others is at most
    this (M2PO); 0.04 is the paper's. null: none."""
    covariance_share: Annotated[float, Range(0, 0.999)] = 0.0
    """Leave out this share of the tokens, drawn among those with a covariance of advantage and log-probability between
    `covariance_low` and `covariance_high` (Clip-Cov); 0.0002 is usual. 0: none."""
    covariance_low: float = 1.0
    """Smallest covariance of the tokens that `covariance_share` draws from."""
    covariance_high: float = 5.0
    """Largest covariance of the tokens that `covariance_share` draws from."""

    @property
    def is_on(self) -> bool:
        """True if some sampled tokens may be excluded."""
        return self.entropy_quantile > 0 or self.not_mode or self.on_policy or self.not_truncated or self.is_joint

    @property
    def is_joint(self) -> bool:
        """True if tokens are left out because of the others: of their second moment or their covariance."""
        return self.second_moment is not None or self.covariance_share > 0

    @property
    def reads_old_policy(self) -> bool:
        """True if the log-probabilities before the update have to be computed."""
        return self.not_mode or self.entropy_quantile > 0 or self.is_joint

    def __post_init__(self) -> None:
        if self.covariance_share == 0 and (self.covariance_low, self.covariance_high) != (1, 5):
            raise ConfigError(
                "actor.select.covariance_low and covariance_high have no effect with actor.select.covariance_share=0"
            )
        if self.covariance_low >= self.covariance_high:
            raise ConfigError(
                f"actor.select.covariance_low={self.covariance_low:g} must be below "
                f"actor.select.covariance_high={self.covariance_high:g}"
            )


@dataclass(frozen=True, kw_only=True)
class Masks:
    """Sequences that the objective leaves out because they are off-policy (objectives/masks.py). They still count in
    the average, and the KL divergence and the entropy still apply to them."""

    geometric_low: Share = 0.0
    """Leave out sequences whose geometric mean of p / p_engine over their tokens is below this, where p is the
    trainer's probability under the old policy; 0.99 is usual. 0: no limit."""
    geometric_high: Annotated[float, Range(1)] | None = None
    """Leave out sequences whose geometric mean of p / p_engine is above this; 1.01 is usual. null: no limit."""
    veto: Share = 0.0
    """Leave out sequences with a token whose p / p_engine is below this, such as 1e-4. 0: none."""
    stale_kl: NonNegative | None = None
    """Leave out sequences of negative advantage whose mean of log(p_engine / p) over their tokens is above this number
    of nats, where p is the present probability (DeepSeek-V3.2). null: none."""

    @property
    def is_on(self) -> bool:
        """True if some sequences may be left out."""
        return self != Masks()


@dataclass(frozen=True, kw_only=True)
class Trainable:
    """A model with an optimizer."""

    model_name: str
    """Hub name, or a folder with config.json, safetensors and tokenizer."""
    dequantize: bool = False
    """Read a quantised checkpoint (FP8, or int8 of compressed-tensors) as value * scale. Training and exports are not
    quantised."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute dtype. auto: bfloat16 on GPUs, float32 on CPUs. Trained weights and optimizer state are stored in
    float32; the frozen base under LoRA adapters is stored in the compute dtype."""
    use_liger_kernel: bool = False
    """Use Liger's Triton kernels for norms, rotary embeddings and MLPs (GPU; pip install rl2-spo[liger])."""
    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass: less memory, more time."""
    ddp_size: Count = 1
    """Number of model replicas (HSDP); each is sharded by FSDP over its world_size / ddp_size processes."""
    tp_size: Count = 1
    """Tensor-parallel size: number of processes that split every layer. They are neighbours, best on one machine."""
    sp_size: Count = 1
    """Sequence-parallel size: number of processes that split the tokens of a microbatch, for long sequences."""
    ep_size: Count = 1
    """Expert-parallel size: number of processes that split the experts of every layer of a mixture of experts, and send
    each other the tokens. They are neighbours among the FSDP shards, whose number it must divide."""
    offload_model: bool = False
    """Move the model to host memory while it is not in use, which frees GPU memory for other phases of a step."""
    offload_optimizer: bool = False
    """Keep the optimizer state in host memory between optimizer steps."""
    max_length_per_device: Count
    """Tokens of a microbatch per process; sp_size processes share one. Also limits the length of a sequence."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """adamw: AdamW. muon: Muon (arXiv 2502.16982) with momentum 0.95 for the weights of the linear layers in the
    decoder layers, and AdamW for the rest. `lr`, its schedule and `weight_decay` apply to both; Muon's steps are about
    as long as AdamW's. Needs whole matrices on every process: one FSDP shard, and sp_size, tp_size and lora off."""
    lr: NonNegative = 1e-6
    """Peak learning rate."""
    betas: tuple[Share, Share] = (0.9, 0.999)
    """AdamW's decay rates of the moving averages of the gradient and its square."""
    eps: PositiveFloat = 1e-8
    """AdamW's constant in the denominator of an update."""
    weight_decay: NonNegative = 0.01
    """AdamW's weight decay, applied to matrices only."""
    max_grad_norm: PositiveFloat = 1.0
    """Maximum norm of the gradient; larger gradients are scaled down."""
    scheduler: Literal["constant", "linear", "cosine", "wsd"] = "constant"
    """Learning rate after warm-up: constant; linear or cosine decay to `min_lr`; or, for wsd, constant and then linear
    decay to `min_lr` over the last `decay_ratio`."""
    min_lr: NonNegative = 0.0
    """Learning rate at the end of the decay; at most `lr`."""
    warmup_ratio: Share | None = None
    """Share of all optimizer steps for the linear warm-up from 0. null: 0 for scheduler=constant, else 0.1."""
    decay_ratio: Share = 0.3
    """Share of all optimizer steps for the decay, with scheduler=wsd."""

    @property
    def used_warmup_ratio(self) -> float:
        """The warm-up ratio in use: `warmup_ratio`, or the default for `scheduler`."""
        default = 0.0 if self.scheduler == "constant" else 0.1
        return default if self.warmup_ratio is None else self.warmup_ratio

    @property
    def max_length(self) -> int:
        """Maximum number of tokens of a microbatch, and of a sequence to train on."""
        return self.max_length_per_device * self.sp_size


@dataclass(frozen=True, kw_only=True)
class TrainableChat(Trainable):
    """A model with an optimizer that reads chats."""

    chat_template: str | None = None
    """File with a chat template (Jinja) to use instead of the tokenizer's; null: the tokenizer's. It is exported with
    the model."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Variables of the chat template by name, such as enable_thinking=false. A row's own values take precedence. They
    are exported as defaults."""


ALL_LINEAR = "all-linear"
"""Name in `target_modules` for every linear layer except the head, as in peft."""
ALL_EXPERTS = "all-experts"
"""Name in `target_modules` for every weight matrix of the experts of a mixture."""
EXPERTS = "experts."
"""Prefix in `target_modules` of one weight matrix of the experts, such as experts.down_proj."""


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Low-rank adapters (LoRA, through peft: pip install rl2-spo[lora]); nothing else trains."""

    rank: Index = 0
    """Rank of the adapters; 0: no adapters, all weights train."""
    alpha: Count = 32
    """Scale of the adapters, which are multiplied by alpha / rank."""
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Names of the linear layers that get an adapter; all-linear: all of them, without the head. experts.NAME is a
    weight matrix of the experts of a mixture, such as experts.down_proj; all-experts: all of them."""
    save: Literal["merged", "adapter"] = "merged"
    """Form of the export. merged: a model with the adapters added to its weights. adapter: a peft adapter alone."""

    @property
    def experts(self) -> tuple[str, ...]:
        """The names of `target_modules` that are weights of experts."""
        return tuple(name for name in self.target_modules if name == ALL_EXPERTS or name.startswith(EXPERTS))

    @property
    def linear(self) -> tuple[str, ...]:
        """The names of `target_modules` that are linear layers."""
        return tuple(name for name in self.target_modules if name not in self.experts)

    @property
    def counted(self) -> tuple[str, ...]:
        """Names of the layers for an estimate of memory, in which a model has those of Llama."""
        return type(self).target_modules if self.linear == (ALL_LINEAR,) else self.linear


@dataclass(frozen=True, kw_only=True)
class Moe:
    """Balancing of the experts of a mixture, over all tokens of the sequences that train."""

    aux_coef: NonNegative = 0.0
    """Coefficient of the load balancing loss (Switch Transformer, arXiv 2101.03961, equations 4 to 6) as transformers
    computes it: of each microbatch, over all layers together, averaged over microbatches by their tokens."""
    z_coef: NonNegative = 0.0
    """Coefficient of the router z-loss (ST-MoE, arXiv 2202.08906): mean square of the logsumexp of router logits."""

    bias_rate: NonNegative = 0.0
    """Step of the router's correction bias, which balances without a loss (DeepSeek-V3, arXiv 2408.15664): after each
    update the bias of an expert with less than the mean load rises by this, and that of one with more falls. 0: the
    bias stays as it is."""

    @property
    def terms(self) -> dict[str, float]:
        """The coefficients above 0, by key."""
        found = {"aux_coef": self.aux_coef, "z_coef": self.z_coef}
        return {key: coef for key, coef in found.items() if coef}

    @property
    def follows(self) -> bool:
        """True if routers take recorded experts in place of their choice."""
        return False


@dataclass(frozen=True, kw_only=True)
class ReplayedMoe(Moe):
    """Routing in reinforcement learning."""

    replay: Literal["none", "compare", "engine", "old"] = "none"
    """Experts of each token in training (router replay). none: the routers' choice. engine: those that the engine took,
    so that trainer and engine compute the same function. old: those of the pass for log-probabilities before the
    updates. compare: the routers' choice, compared with the engine's. Weights always follow from the present router."""

    @property
    def follows(self) -> bool:
        return self.replay in ("engine", "old")

    @property
    def reads_engine(self) -> bool:
        """True if the engine records the experts of each token."""
        return self.replay in ("engine", "compare")


@dataclass(frozen=True, kw_only=True)
class TrainablePolicy(TrainableChat):
    """A language model with an optimizer."""

    lora: Lora
    moe: Moe = field(default_factory=Moe)

    logits_budget_mib: PositiveFloat | None = None
    """Maximum size of the logits in memory at a time, in MiB; null: 64 on CPUs, 512 on GPUs."""

    def __post_init__(self) -> None:
        if self.lora.rank and self.optimizer == "muon":
            raise ConfigError(
                f"actor.optimizer=muon needs actor.lora.rank=0, and it is {self.lora.rank}: Muon makes all singular "
                "values of an update equal, which is meant for whole matrices and untried on thin adapters"
            )
        if self.lora.rank and self.tp_size > 1:
            raise ConfigError(f"actor.lora.rank={self.lora.rank} needs actor.tp_size=1, and it is {self.tp_size}")
        if self.lora.rank and not self.lora.target_modules:
            raise ConfigError("actor.lora.target_modules is empty: nothing would train")
        if self.lora.rank and self.lora.experts and self.ep_size > 1:
            raise ConfigError(
                f"actor.lora.target_modules has {', '.join(self.lora.experts)}, but actor.ep_size={self.ep_size} "
                "splits the experts, and their adapters cannot be split; set actor.ep_size=1, or remove them"
            )
        if not self.lora.rank and self.lora.save == "adapter":
            raise ConfigError("actor.lora.save=adapter has no effect with actor.lora.rank=0")
        if self.lora.rank and self.moe.bias_rate:
            raise ConfigError(
                f"actor.moe.bias_rate={self.moe.bias_rate} changes the base model, which actor.lora.rank="
                f"{self.lora.rank} keeps: an adapter and the reference would lack the change; set actor.moe.bias_rate=0"
            )


@dataclass(frozen=True, kw_only=True)
class SFTActor(TrainablePolicy):
    """The model that is fine-tuned."""

    avg_level: Literal["token", "sequence"] = "token"
    """Averaging of the loss. token: over all tokens. sequence: over the tokens of each sequence, then over
    sequences."""
    objective: str = "sft"
    """Loss on the tokens of the responses. sft is cross-entropy; any other of docs/objectives.md that reads neither
    advantages nor an older policy works too, or path.py:function."""
    objective_args: dict[str, Any] = field(default_factory=dict)
    """Options of the objective by name; the others keep the defaults of its function."""


@dataclass(frozen=True, kw_only=True)
class Actor(TrainablePolicy):
    """The policy of reinforcement learning."""

    max_inference_length_per_device: Count = interpolated("${actor.max_length_per_device}")
    """Tokens of a microbatch per process in forward passes without gradients."""
    avg_level: Literal["token", "sequence", "constant"] = "token"
    """Averaging of the loss. token: over all tokens. sequence: over the tokens of each sequence, then over
    sequences (GRPO). constant: each sequence's sum divided by `avg_length`, then over sequences (Dr. GRPO)."""
    avg_length: Count | None = interpolated("${rollout.train_sampling_params.max_new_tokens}")
    """Number of tokens that each sequence's sum is divided by, with avg_level=constant."""
    temperature: PositiveFloat = interpolated("${rollout.train_sampling_params.temperature}")
    """Divisor of the logits in training; must equal the sampling temperature."""
    objective: str = "ppo"
    """Loss of each token: a name in docs/objectives.md, or path.py:function for one of your own."""
    objective_args: dict[str, Any] = field(default_factory=dict)
    """Options of the objective by name; the others keep the defaults of its function."""
    path: PathKnobs
    clip: PositiveFloat | None = None
    """Clip range of the probability ratio, [1 - clip, 1 + clip], in ppo, gspo and luspo, and of its logarithm,
    [-clip, clip], in gmpo; null: the objective's default. Its upper side alone: `actor.objective_args.clip_high`."""
    train_on: Literal["all", "correct"] = "all"
    """Sequences that train: all, or only those of trajectories with a total reward above 0."""
    average_over: Literal["all", "kept", "correct"] = "all"
    """Denominator of the average. all: everything in the optimizer step (thesis 3.1). kept: what trains (3.2). correct:
    all tokens of the correct sequences, also those that `select` excludes."""
    regularize_on: Literal["kept", "all"] = "kept"
    """Tokens that the KL divergence in the loss and the entropy apply to. kept: those that train, with their weights.
    all: every sampled token, averaged over all of them."""
    update_per_rollout: Count = 1
    """Number of optimizer steps per rollout."""
    freeze_steps: Index = 0
    """Number of steps at the start in which only the critic trains (`adv.estimator=gae`)."""
    tis_coef: NonNegative = 2.0
    """Cap of truncated importance sampling: each token's loss is weighted by exp(trainer logp - engine logp), at most
    this; 0: no weights."""
    tis_low: NonNegative = 0.0
    """Lower bound of the importance weight: with tis_mode=mask, 0.5 and tis_coef=5 are those of IcePop."""
    tis_level: Literal["token", "sequence", "geometric"] = "token"
    """Ratio in the importance weight. token: each token's own. sequence: the product over the tokens of its sequence.
    geometric: the geometric mean over the tokens of its sequence."""
    tis_mode: Literal["truncate", "mask"] = "truncate"
    """Value of an importance weight outside [tis_low, tis_coef]. truncate: the bound. mask: 0."""
    masks: Masks = field(default_factory=Masks)
    select: Select
    kl: KL
    entropy: Entropy
    observations: Observations = field(default_factory=Observations)
    imitation: Imitation = field(default_factory=Imitation)
    moe: ReplayedMoe = field(default_factory=ReplayedMoe)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.average_over == "kept" and self.train_on == "all" and not self.select.is_on:
            raise ConfigError(
                "actor.average_over=kept has no effect: actor.train_on=all and actor.select keep everything"
            )
        if self.average_over == "correct" and self.train_on == "all":
            raise ConfigError("actor.average_over=correct needs actor.train_on=correct")
        if self.moe.replay == "old" and self.update_per_rollout == 1:
            raise ConfigError(
                "actor.moe.replay=old has no effect with actor.update_per_rollout=1: the first update has the experts "
                "of the old policy; set actor.moe.replay=engine"
            )
        if self.tis_coef == 0 and (self.tis_level, self.tis_mode, self.tis_low) != ("token", "truncate", 0):
            raise ConfigError("actor.tis_level, actor.tis_mode and actor.tis_low have no effect with actor.tis_coef=0")
        if self.tis_coef and self.tis_low > self.tis_coef:
            raise ConfigError(f"actor.tis_low={self.tis_low} is above actor.tis_coef={self.tis_coef}")


@dataclass(frozen=True, kw_only=True)
class RewardModel(TrainableChat):
    """The reward model that learns from pairs."""

    center_coef: NonNegative = 0.0
    """Coefficient of (r_chosen + r_rejected)^2, which keeps rewards near 0 (arXiv 2312.09244); 0: off."""


@dataclass(frozen=True, kw_only=True)
class DPOActor(TrainablePolicy):
    """The policy that learns from preferences (objectives/preference.py, reference_free.py and unpaired.py)."""

    loss: str = "sigmoid"
    """Loss on pairs: sigmoid (DPO), ipo, sigmoid_norm, hinge, robust, exo_pair, nca_pair, bco_pair, apo_zero, apo_down,
    pivotal; without a reference cpo, simpo, orpo; on responses with a label kto, bco, apo_zero_unpaired (docs/dpo.md).
    Or path.py:function."""
    loss_args: dict[str, Any] = field(default_factory=dict)
    """Options of the loss by name; the others keep the defaults of its function."""
    beta: PositiveFloat | None = None
    """Scale of the implicit reward; a smaller beta lets the policy move further from the reference. null: 0.1, or the
    default of the loss (simpo: 2)."""
    label_smoothing: Annotated[float, Range(0, 0.499)] = 0.0
    """Probability that a label is wrong, with a loss that reads it: sigmoid and cpo (conservative DPO), robust (0: its
    default, 0.1) and exo_pair (0: its default, 0.001)."""
    reference_free: bool = False
    """Use log-probabilities as they are, not relative to `ref_actor`. cpo, simpo and orpo never load a reference."""


@dataclass(frozen=True, kw_only=True)
class Critic(Trainable):
    """The value model of `adv.estimator=gae`; with another estimator none is loaded."""

    max_inference_length_per_device: Count = interpolated("${critic.max_length_per_device}")
    """Tokens of a microbatch per process in forward passes without gradients."""
    avg_level: Literal["token", "sequence"] = "token"
    """Averaging of the loss. token: over all tokens. sequence: over the tokens of each sequence, then over
    sequences."""
    clip: PositiveFloat = 0.5
    """Clip range of the value: the loss does not reward moving it further than this from the old critic's value."""
    update_per_rollout: Count = interpolated("${actor.update_per_rollout}")
    """Number of optimizer steps per rollout."""


@dataclass(frozen=True, kw_only=True)
class RefActor:
    """The reference policy of the KL divergence and of DPO."""

    model_name: str = interpolated("${actor.model_name}")
    """Hub name or folder of the reference model; by default the model that training starts from."""
    dequantize: bool = interpolated("${actor.dequantize}")
    """Read a quantised checkpoint as value * scale."""
    max_inference_length_per_device: Count = interpolated("${actor.max_inference_length_per_device}")
    """Tokens of a microbatch per process."""


@dataclass(frozen=True, kw_only=True)
class MovingRefActor(RefActor):
    """The reference policy of reinforcement learning, which may follow the policy."""

    sync_every: Count | None = None
    """Number of steps after which the reference becomes the present policy, again and again; trainer.save_freq is a
    multiple, so that a run resumes with the same reference. null: it stays as it was loaded."""


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """The model whose distribution objectives such as opd, gkd and forward_kl compare with the policy's."""

    model_name: str | None = None
    """Hub name or folder of the teacher, which has the policy's tokenizer; start: the model that training starts from;
    ema: the exponential moving average of the policy; policy: the policy itself, with `hint`. It is frozen and has the
    actor's layout. null: no teacher."""
    models: dict[str, Any] = field(default_factory=dict)
    """Several teachers, by names of your own, in place of `model_name`: hub names or folders. Each row names one."""
    column: str = "teacher"
    """With models: field of a row's extra_info that names its teacher."""
    hint: bool = False
    """Let the teacher read what `hint` of the environment's script returns for a row, before the policy's response."""
    dequantize: bool = False
    """Read a quantised checkpoint of the teacher as value * scale."""
    temperature: PositiveFloat | None = None
    """Divisor of the teacher's logits; null: that of the policy's."""
    ema_decay: Annotated[float, Range(0, 0.999999)] = 0.99
    """With model_name=ema: share of the average that stays after each optimizer step; the rest is the policy. The
    average starts at the policy and is kept in checkpoints."""

    @property
    def is_on(self) -> bool:
        """True if there is a teacher."""
        return self.model_name is not None or bool(self.models)

    @property
    def named(self) -> dict[str, str]:
        """Models that are loaded for it alone, by key."""
        if self.model_name not in (None, START, EMA, POLICY):
            return {"teacher.model_name": str(self.model_name)}
        return {f"teacher.models.{name}": str(model) for name, model in self.models.items()}

    def __post_init__(self) -> None:
        if self.models and self.model_name is not None:
            raise ConfigError(f"teacher.model_name={self.model_name} and teacher.models name teachers; set one of them")
        for name, model in self.models.items():
            if not isinstance(model, str) or model in (START, EMA, POLICY):
                raise ConfigError(f"teacher.models.{name}={model}; expected a hub name or folder of a model")
        for key, model in self.named.items():
            if "://" in model:
                raise ConfigError(
                    f"{key}={model} is an address: a server returns its most likely tokens only, and the divergence is "
                    "over the whole vocabulary; name the model, which is then loaded beside the policy"
                )
        if not self.models and self.column != type(self).column:
            raise ConfigError(f"teacher.column={self.column} has no effect without teacher.models")
        if not self.is_on and (self.dequantize or self.hint or self.temperature is not None):
            raise ConfigError("teacher.dequantize, hint and temperature have no effect without teacher.model_name")
        if len(self.models) == 1:
            raise ConfigError("teacher.models has one teacher; name it with teacher.model_name")
        if self.model_name == POLICY and not self.hint:
            raise ConfigError(
                f"teacher.model_name={POLICY} without teacher.hint=true: the teacher would be the policy, which learns "
                "nothing from itself"
            )
        if self.model_name != EMA and self.ema_decay != type(self).ema_decay:
            raise ConfigError(f"teacher.ema_decay={self.ema_decay} has no effect without teacher.model_name={EMA}")


def num_shards(model: Trainable, world_size: int, group: str) -> int:
    """Return the number of FSDP shards of each replica: world_size / (ddp_size * sp_size * tp_size).

    `group` is the model's group of keys, for errors. Raises ConfigError if the sizes do not divide the processes, or
    if `ep_size` does not divide the shards.
    """
    product = model.ddp_size * model.sp_size * model.tp_size
    if world_size % product:
        raise ConfigError(
            f"{group}.ddp_size={model.ddp_size} x {group}.sp_size={model.sp_size} x {group}.tp_size={model.tp_size} "
            f"= {product} does not divide the {world_size} processes "
            f"({world_size} = ddp_size x FSDP shards x sp_size x tp_size)"
        )
    shards = world_size // product
    if model.optimizer == "muon" and shards * model.sp_size * model.tp_size > 1:
        raise ConfigError(
            f"{group}.optimizer=muon needs whole matrices on every process: set {group}.ddp_size={world_size}, "
            f"{group}.sp_size=1 and {group}.tp_size=1, or {group}.optimizer=adamw"
        )
    if model.ep_size > 1 and (model.sp_size > 1 or model.tp_size > 1):
        raise ConfigError(
            f"{group}.ep_size={model.ep_size} needs {group}.sp_size=1 and {group}.tp_size=1, and they are "
            f"{model.sp_size} and {model.tp_size}"
        )
    if model.ep_size > 1 and model.use_liger_kernel:
        raise ConfigError(f"{group}.ep_size={model.ep_size} needs {group}.use_liger_kernel=false")
    if shards % model.ep_size:
        raise ConfigError(
            f"{group}.ep_size={model.ep_size} does not divide the {shards} FSDP shards of a replica "
            f"({world_size} processes / {group}.ddp_size={model.ddp_size})"
        )
    return shards


def times_sp(tokens: int, group: str, sp_size: int) -> str:
    """Return a limit per process as text, with the number of processes that share a microbatch."""
    return f"{tokens}" + (f" x {group}.sp_size={sp_size}" if sp_size > 1 else "")
