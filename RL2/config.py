"""Every knob: its type, unit and meaning. `load` is the one door through which a configuration comes in.

The YAML files in `trainer/config` hold the defaults of each program; a class here says what a key means and what it may
be. Errors are `ConfigError`s that name the override to change.
"""

from __future__ import annotations

import difflib
import importlib.util
import math
import os
import re
import shutil
import types
import typing
from collections.abc import Sequence
from dataclasses import MISSING, Field, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from RL2.legacy_keys import Given, LegacyKeyError, translate
from RL2.printing import masked, printable


class UserError(Exception):
    """An error that the user can fix; programs print it, without a traceback, and end with exit code 1."""

    def __str__(self) -> str:
        return printable(super().__str__())


class ConfigError(UserError, ValueError):
    """A setting that cannot work; the message names the override to change."""

    def __init__(self, text: str) -> None:
        super().__init__(one_line(text))


def one_line(text: str) -> str:
    """`text`, which may quote a file: without ends of lines and what no terminal prints, and not endless."""
    whole = printable(" ".join(text.splitlines()))
    return whole if len(whole) <= MAX_ERROR else f"{whole[:MAX_ERROR]}..."


MAX_ERROR = 1000
"""Characters of an error that quotes a file."""


def first_line(error: BaseException) -> str:
    """Return what `error` says, or is, in one line: its first, with the next where this one only announces it."""
    lines = str(error).strip().splitlines()
    if len(lines) > 1 and lines[0].endswith(":"):
        lines[0] = f"{lines[0]} {lines[1].strip()}"
    return one_line(lines[0] if lines else repr(error))


class LostProcess(UserError):
    """Another process has died, or did not come to a meeting point in time."""


@dataclass(frozen=True)
class Range:
    """Bounds of a number; an open bound is excluded."""

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False

    def holds(self, x: float) -> bool:
        return (self.low < x if self.open_low else self.low <= x) and x <= self.high

    def __str__(self) -> str:
        low = f"{'above' if self.open_low else 'at least'} {self.low:g}" if self.low > -math.inf else ""
        high = f"at most {self.high:g}" if self.high < math.inf else ""
        return " and ".join(filter(None, [low, high]))


NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")
"""What names are like that stand in keys and in metrics: parts of a reward, metrics of an environment, test sets."""
NAME_RULE = "a name has letters, digits, _ and -, and begins with a letter or _"

Count = Annotated[int, Range(1)]
Index = Annotated[int, Range(0)]
Seed = Annotated[int, Range(0, 2**63 - 1)]
Share = Annotated[float, Range(0, 1)]
NonNegative = Annotated[float, Range(0)]
PositiveFloat = Annotated[float, Range(0, open_low=True)]


@dataclass(frozen=True, kw_only=True)
class TrainData:
    path: str | None
    """A .json, .jsonl, .csv, .parquet or .arrow file, or a hub data set as `split@name:subset`; `name` alone is its
    `train` split. null: no rows, the environment's `reset` makes up tasks, new ones at each step; an epoch of
    `trainer.n_epochs` is then one step."""
    prompts_per_rollout: Count
    """Prompts of one training step."""
    responses_per_prompt: Count
    """Samples of each prompt; they form a group."""
    curriculum: Literal["none", "failures", "frontier"]
    """Which rows are drawn once each has been seen. none: all in turn. By their past success rate s, failures:
    proportional to 1 - s; frontier: to s (1 - s), most of what is solved half of the time (data/curriculum.py)."""
    on_bad_row: Literal["stop", "skip"] = "stop"
    """What becomes of rows that cannot be used. stop: an error names them. skip: the run goes on without them, says how
    many there are, and lists them in save_dir/skipped_rows.jsonl."""
    columns: dict[str, Any]
    """Names of the columns in the rows, where they are others: `columns.prompt=question`. null leaves a column out:
    with `columns.messages=null` rows that have both are read by their `prompt`."""

    def __post_init__(self) -> None:
        _check_columns(self.columns, "train_data.columns", ("prompt", "messages", "extra_info"))


@dataclass(frozen=True, kw_only=True)
class TestSet:
    """One of `test_data.sets`."""

    path: str | None = None
    """File or data set of its rows; null: `prompts_per_rollout` tasks that `reset` makes up."""
    env_path: str | None = None
    """Environment of the set; null: `rollout.env_path`."""
    prompts_per_rollout: Count | None = None
    """Prompts in flight at once, or tasks that are made up; null: all rows. `test_data.prompts_per_rollout` does not
    count here."""
    responses_per_prompt: Count | None = None
    """Samples of each prompt; null: `test_data.responses_per_prompt`."""
    max_turns: Count | None = None
    """Responses of one episode at most; null: `rollout.max_turns`."""
    on_bad_row: Literal["stop", "skip"] | None = None
    """null: `test_data.on_bad_row`."""
    columns: dict[str, Any] = field(default_factory=dict)
    """Names of columns that differ from those of `test_data.columns`."""
    sampling: dict[str, Any] = field(default_factory=dict)
    """Keys of `rollout.test_sampling_params` that are others in this set: `sampling.temperature=0.6`."""


@dataclass(frozen=True)
class TestSettings:
    """A test set with all that holds for it: `test_data` itself, or one of its sets."""

    name: str
    """Name of the set; '' is `test_data` itself."""
    path: str | None
    """File or data set of its rows; None: tasks that `reset` makes up."""
    env_path: str
    """Script of its environment."""
    prompts_per_rollout: int | None
    """Prompts in flight at once, or tasks that are made up."""
    responses_per_prompt: int
    """Samples of each prompt."""
    max_turns: int
    """Responses of one episode at most."""
    on_bad_row: Literal["stop", "skip"]
    """Stop at rows that cannot be used, or leave them out."""
    columns: dict[str, Any]
    """Names of the columns in its rows."""
    sampling: SamplingParams
    """How it is sampled."""

    @property
    def key(self) -> str:
        """The group of its keys."""
        return f"test_data.sets.{self.name}" if self.name else "test_data"

    @property
    def prefix(self) -> str:
        """Prefix of the names of its metrics."""
        return f"test/{self.name}" if self.name else "test"


@dataclass(frozen=True, kw_only=True)
class TestData:
    path: str | None
    """As `train_data.path`; null: tasks that `reset` makes up, the same at each test."""
    prompts_per_rollout: Count | None
    """Prompts in flight at once; the whole file is tested in any case. null: all at once. Without a file, how many
    tasks are made up."""
    responses_per_prompt: Count
    """Samples of each prompt; the score is the mean over all."""
    on_bad_row: Literal["stop", "skip"] = "stop"
    """As `train_data.on_bad_row`."""
    columns: dict[str, Any]
    """As `train_data.columns`, which count here too."""
    sets: dict[str, TestSet] = field(default_factory=dict)
    """Further test sets by name, each with its own rows, environment and sampling: `sets.aime.path=...`. The metrics of
    a set begin with `test/NAME/`."""
    best_by: str | None = None
    """Without rows of `test_data` itself, `test/score` is the score of this set; null: the mean of the sets' scores.
    `test/score` decides what trainer.keep_best, trainer.early_stop and trainer.load_ckpt_from=best take."""

    def __post_init__(self) -> None:
        _check_columns(self.columns, "test_data.columns", ("prompt", "messages", "extra_info"))
        for name, each in self.sets.items():
            key = f"test_data.sets.{name}"
            if not NAME.fullmatch(name):
                raise ConfigError(f"{key}: a test set cannot have this name; {NAME_RULE}")
            if name in ("reward", "env"):
                raise ConfigError(f"{key}: test/{name}/ is where other metrics are; choose another name")
            _check_columns(each.columns, f"{key}.columns", ("prompt", "messages", "extra_info"))
            if each.path is None and each.prompts_per_rollout is None:
                raise ConfigError(
                    f"{key} has nothing to test on: set {key}.path, or {key}.prompts_per_rollout for tasks that its "
                    "environment makes up"
                )
        if self.best_by is not None and self.best_by not in self.sets:
            have = ", ".join(self.sets) or "none"
            raise ConfigError(f"test_data.best_by={self.best_by}: there is no such set in test_data.sets ({have})")
        if self.best_by is not None and self.has_own:
            raise ConfigError(
                f"test_data.best_by={self.best_by} has no effect with rows of test_data itself, whose score decides; "
                "make these a set too: test_data.sets.NAME.path"
            )

    @property
    def has_own(self) -> bool:
        """Return whether there is something to test on beside `sets`."""
        return self.path is not None or self.prompts_per_rollout is not None


@dataclass(frozen=True, kw_only=True)
class SupervisedData:
    path: str
    """As `train_data.path`. Rows of sft: {"prompt", "response"}, {"messages"} or {"messages", "response"}; of rm and
    dpo: {"prompt", "chosen", "rejected"} or {"chosen", "rejected"} as two lists of messages."""
    test_path: str | None
    """As `data.path`: what `trainer.test_freq` tests on."""
    test_ratio: Annotated[float, Range(0, 0.999)]
    """Or this share of the rows of `data.path`, drawn once, which is then not trained on; 0: none."""
    env_path: str | None
    """A script whose `example(row)` turns a raw row into one of these formats."""
    columns: dict[str, Any]
    """Names of the columns in the rows, where they are others, as in `train_data.columns`."""
    max_length: Count
    """Tokens. A longer row, or a pair of which one is longer, is left out. How many is printed. It may be more than
    fits into a microbatch: a row that is really longer than that is refused."""
    batch_size: Count
    """Rows of one optimizer step."""
    on_bad_row: Literal["stop", "skip"] = "stop"
    """What becomes of rows that cannot be used. stop: an error names them. skip: the run goes on without them, says how
    many there are, and lists them in save_dir/skipped_rows.jsonl."""

    def __post_init__(self) -> None:
        if self.test_path is not None and self.test_ratio > 0:
            raise ConfigError(f"data.test_path={self.test_path} and data.test_ratio={self.test_ratio}: choose one")
        _check_columns(self.columns, "data.columns", ("prompt", "messages", "response", "chosen", "rejected"))

    def check(self, test_freq: int | None) -> None:
        """Raise `ConfigError` unless there is a test set where there are tests."""
        if test_freq is not None and self.test_path is None and self.test_ratio == 0:
            raise ConfigError(f"trainer.test_freq={test_freq} needs data.test_path or data.test_ratio")
        if test_freq is None and self.test_ratio > 0:
            raise ConfigError(f"data.test_ratio={self.test_ratio} has no effect without trainer.test_freq")
        if test_freq is None and self.test_path is not None:
            raise ConfigError(f"data.test_path={self.test_path} has no effect without trainer.test_freq")


def _check_columns(columns: dict[str, Any], key: str, known: tuple[str, ...]) -> None:
    for name, theirs in columns.items():
        if name not in known:
            raise ConfigError(f"{key}.{name}: there is no such column; choose one of {', '.join(known)}")
        if theirs is not None and not isinstance(theirs, str):
            raise ConfigError(f"{key}.{name}={theirs!r}; expected the name of a column, or null to leave it out")


@dataclass(frozen=True, kw_only=True)
class SFTData(SupervisedData):
    train_on: Literal["all", "last", "weighted"] = "weighted"
    """Which turns of the assistant train: all, the last one, or all but those with `weight: 0` (OpenAI's rows)."""


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
    """Knobs of the SPO family (objectives/path.py)."""

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
    """What is minimised: a name of objectives/table.py, or path.py:function of your own (docs/objectives.md)."""
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


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    temperature: NonNegative
    """0 takes the most likely token."""
    top_p: Annotated[float, Range(0, 1, open_low=True)]
    """Only the most likely tokens that together have this probability, of those that top_k leaves; 1 keeps all. SGLang
    counts the probability in the whole distribution."""
    top_k: Index
    """0 keeps all tokens."""
    max_new_tokens: Count
    """Tokens of one response (of one turn, if there are several)."""
    stop: tuple[str, ...] | None
    """A response ends with the token that completes one of these strings."""

    @property
    def is_cut(self) -> bool:
        """Some tokens cannot be sampled, and the others are more likely than under the model."""
        return self.top_p < 1 or self.top_k > 0


Transport = Literal["files", "ipc", "broadcast"]
"""How weights reach servers."""


@dataclass(frozen=True, kw_only=True)
class Servers:
    """Servers as the engine (docs/engines.md): what all kinds have; `rollout.KEY.` stands before each name."""

    key = ""

    urls: tuple[str, ...]
    """Running servers to attach to; empty: they are launched. Their token, if they want one, is $VLLM_API_KEY or
    $SGLANG_API_KEY."""
    num_servers: Count
    """Servers that are launched on each machine."""
    python: str
    """Interpreter of the environment that they are installed in: `make engine` builds one with vLLM for CPUs."""
    args: tuple[str, ...]
    """Further arguments of the command line of a launched server; they win over ours."""
    env: dict[str, Any]
    """Further environment variables of a launched server."""
    sync_dir: str | None
    """Folder for weights on their way to the servers, which have to see it under the same name; it holds one copy of
    them. null: shared memory, for servers on this machine."""
    bucket_mib: Count
    """Weights that are gathered in memory before they are written or sent."""
    max_probe_gap: PositiveFloat | None
    """Limit of the mean abs(trainer's logp - server's logp) over a fixed sequence of 64 tokens, in nats, after each
    sync of the weights; beyond it the run stops. null: 1e-4 where both compute in float32, else 0.1."""
    start_timeout_s: PositiveFloat
    """Limit of a server's start."""
    request_timeout_s: PositiveFloat
    """Limit of one sample."""
    max_restarts: Index
    """Times that launched servers are started again after they have died or hung, in all; then the run stops."""

    def __post_init__(self) -> None:
        if self.urls and (self.args or self.env or self.num_servers > 1):
            raise ConfigError(
                f"rollout.{self.key}.args, env and num_servers are of servers that are launched; they have no effect "
                f"with rollout.{self.key}.urls"
            )


@dataclass(frozen=True, kw_only=True)
class VLLM(Servers):
    """vLLM servers; read with `rollout.engine=vllm`."""

    key = "vllm"

    transport: Transport
    """How weights reach the servers. files: in sync_dir. ipc: servers on this machine look at the trainer's GPU.
    broadcast: over a group of trainer and servers, of NCCL on GPUs and gloo on CPUs. Beside ipc and broadcast, launched
    servers have a copy in files to be started again with, unless max_restarts=0."""
    kv_cache_mib: Count | None
    """Memory of a launched server's KV cache. null: what max_running_requests sequences of full length take, up to
    gpu_memory_utilization of what is free (CPUs), or what that share of the GPU leaves."""


@dataclass(frozen=True, kw_only=True)
class SGLang(Servers):
    """SGLang servers; read with `rollout.engine=sglang`."""

    key = "sglang"

    router_url: str | None
    """SGLang's router in front of the servers of `urls`: it gets the requests for samples, they the weights."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.router_url is not None and not self.urls:
            raise ConfigError(
                "rollout.sglang.router_url needs rollout.sglang.urls: weights go to the servers themselves"
            )


SGLANG_MAX_TOP_K = 4096
"""What a server lets a request ask for (its --sampling-mask-max-tokens)."""


@dataclass(frozen=True, kw_only=True)
class Rollout:
    engine: Literal["embedded", "vllm", "sglang"]
    """Where tokens are sampled: in this process, or by servers."""
    vllm: VLLM
    sglang: SGLang
    model_name: str
    """The model that the engine serves: actor.model_name."""
    dtype: Literal["auto", "float32", "bfloat16"]
    """auto: actor.dtype."""
    tp_size: Literal[1]
    """Tensor parallelism of the engine: not available yet."""
    gpu_memory_utilization: Annotated[float, Range(0, 1, open_low=True)]
    """Share of the free device memory that the KV cache may take."""
    compile: bool | None
    """Join small kernels by torch.compile, in the embedded engine and in vLLM servers on CPUs. It takes a while at
    first, and a C++ compiler on CPUs. null: on GPUs."""
    max_running_requests: Count
    """Requests that are decoded together; the others wait."""
    train_sampling_params: SamplingParams
    test_sampling_params: SamplingParams
    max_turns: Count
    """Responses of one episode at most."""
    env_path: str
    """Script with `async def step(state, action, extra_info)`."""
    env_timeout_s: PositiveFloat
    """Limit of one call of the environment; past it the trajectory is unscored."""
    dynamic_filtering: bool
    """Drop groups whose rewards are all equal (they carry no signal for a group baseline)."""
    dynamic_filtering_rounds: Count
    """Rounds of sampling in a step at most: each after the first rolls out as many further prompts as groups are
    missing (DAPO's dynamic sampling, arXiv 2503.14476). 1: what is dropped is not replaced."""
    overlong_filtering: bool
    """Leave trajectories that ran into a length limit out of training, and so out of their group's mean."""
    max_staleness: Index
    """By how many versions the weights that sampled a token may be older than those that it trains. 0: on-policy. Above
    0, and without partial_rollout, rollouts run beside the training."""
    partial_rollout: Share
    """Groups under way beyond those that a step trains on, as a share of prompts_per_rollout: the step takes those that
    end first, the others go on in the next one, with its weights. 0: none."""

    @property
    def runs_beside_training(self) -> bool:
        return self.max_staleness > 0 and not self.partial_rollout

    def __post_init__(self) -> None:
        if self.partial_rollout and not self.max_staleness:
            raise ConfigError(
                f"rollout.partial_rollout={self.partial_rollout} goes on with what older weights began, and "
                "rollout.max_staleness=0 allows none of it; set that to 1 at least"
            )
        for servers in (self.vllm, self.sglang):
            if self.engine != servers.key and (servers.urls or servers.args or servers.env):
                raise ConfigError(
                    f"rollout.{servers.key}.urls, args and env have no effect with rollout.engine={self.engine}"
                )
        for name in ("train_sampling_params", "test_sampling_params"):
            self.check_sampling(getattr(self, name), f"rollout.{name}")

    def check_sampling(self, sampling: SamplingParams, key: str) -> None:
        """Raise ConfigError for what the engine cannot sample; `key` is the group of the settings."""
        if self.engine == "vllm" and 0 < sampling.temperature < 0.01:
            raise ConfigError(f"{key}.temperature is below 0.01, which vLLM would silently make 0.01")
        is_cut = sampling.temperature > 0 and sampling.is_cut
        if self.engine == "sglang" and is_cut and not 0 < sampling.top_k <= SGLANG_MAX_TOP_K:
            raise ConfigError(
                f"{key}: SGLang gives the log-probabilities of what was drawn from only with a top_k of 1 "
                f"to {SGLANG_MAX_TOP_K} (which top_p may cut further), or without top_k and top_p; here are "
                f"top_k={sampling.top_k} and top_p={sampling.top_p:g}"
            )

    @property
    def servers(self) -> VLLM | SGLang | None:
        """The settings of the servers that sample, if it is not this process."""
        if self.engine == "embedded":
            return None
        return self.vllm if self.engine == "vllm" else self.sglang


@dataclass(frozen=True, kw_only=True)
class Reward:
    weights: dict[str, Any] = field(default_factory=dict)
    """Weights of the parts of a reward, where `step` returns a dict of them: `weights.format=0.1`. A part without one
    counts once; 0 only watches a part, and below 0 it is a cost."""

    def __post_init__(self) -> None:
        check_weights(self.weights, "reward.weights")


MAX_WEIGHT = 1e6
"""Size of a weight beyond which it is no weight but a mistake."""


def check_weights(weights: dict[str, Any], key: str) -> None:
    """Raise ConfigError unless each of `weights`, by the name of a part of a reward, is a number."""
    for name, weight in weights.items():
        if not NAME.fullmatch(str(name)):
            raise ConfigError(f"{key}.{name}: no part of a reward has this name; {NAME_RULE}")
        if type(weight) not in (int, float) or not abs(weight) <= MAX_WEIGHT:
            raise ConfigError(f"{key}.{name}={weight!r}; expected a number of at most {MAX_WEIGHT:g} in size")


@dataclass(frozen=True, kw_only=True)
class Advantage:
    estimator: Literal["reinforce", "gdpo", "rloo", "spo", "gae"]
    """reinforce: reward minus the group's mean (Dr. GRPO). gdpo: the parts of the reward, each normalised within the
    group, weighted, summed, and normalised over the rollout (GDPO, arXiv 2601.05242). rloo: reward minus the mean of
    the group's others. spo: the reward itself. gae: what lies ahead minus what the critic expected (PPO)."""
    gamma: Share
    """gae: what a reward is worth one token earlier."""
    lamda: Share
    """gae: 1 looks at all rewards to come, 0 only at the next one and the critic's value of what follows it."""
    global_norm: bool
    """reinforce: mean (and deviation) over the whole rollout instead of each group. gae: minus the mean over all action
    tokens of the rollout."""
    norm_var: bool
    """reinforce: divide by the standard deviation (GRPO). gae: by that over all action tokens of the rollout."""
    std_over: Literal["rollout", "tokens"] | None
    """reinforce, norm_var: null divides by the deviation of what the mean was taken over, the group or the rollout.
    rollout: by that of all rewards of the rollout. tokens: minus the mean of the advantages over all action tokens of
    the rollout, divided by their deviation (REINFORCE++)."""
    overlong_buffer: Index
    """Over its last so many tokens before max_new_tokens a response pays for its length, linearly (DAPO); 0: never."""
    overlong_penalty: PositiveFloat
    """Penalty of a response of max_new_tokens, taken off the reward that the advantage is computed from. gdpo: weight
    of this penalty, which is a part of the reward there."""


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


@dataclass(frozen=True, kw_only=True)
class RLConfig:
    train_data: TrainData
    test_data: TestData
    actor: Actor
    ref_actor: RefActor
    critic: Critic
    rollout: Rollout
    reward: Reward = field(default_factory=Reward)
    adv: Advantage
    trainer: RLTrainer

    @property
    def logprob_gap_limit(self) -> float:
        """`trainer.max_logprob_gap` where the engine and the trainer have the same distribution."""
        return math.inf if self.rollout.train_sampling_params.is_cut else self.trainer.max_logprob_gap

    @property
    def test_sets(self) -> list[TestSettings]:
        """Return the test sets: `test_data` itself, if it has rows or tasks, and those of `test_data.sets`."""
        data, rollout = self.test_data, self.rollout
        own = TestSettings(
            name="",
            path=data.path,
            env_path=rollout.env_path,
            prompts_per_rollout=data.prompts_per_rollout,
            responses_per_prompt=data.responses_per_prompt,
            max_turns=rollout.max_turns,
            on_bad_row=data.on_bad_row,
            columns=self.train_data.columns | data.columns,
            sampling=rollout.test_sampling_params,
        )
        others = [
            TestSettings(
                name=name,
                path=each.path,
                env_path=each.env_path or own.env_path,
                prompts_per_rollout=each.prompts_per_rollout,
                responses_per_prompt=each.responses_per_prompt or own.responses_per_prompt,
                max_turns=each.max_turns or own.max_turns,
                on_bad_row=each.on_bad_row or own.on_bad_row,
                columns=own.columns | each.columns,
                sampling=_changed(own.sampling, each.sampling, f"test_data.sets.{name}.sampling"),
            )
            for name, each in data.sets.items()
        ]
        return [*([own] if data.has_own else []), *others]

    def __post_init__(self) -> None:
        actor, rollout = self.actor, self.rollout
        _check_schedule("actor", actor)
        _check_schedule("critic", self.critic)
        if rollout.model_name != actor.model_name:
            raise ConfigError(f"rollout.model_name={rollout.model_name!r} is not actor.model_name={actor.model_name!r}")
        if rollout.train_sampling_params.temperature == 0:
            raise ConfigError(
                "rollout.train_sampling_params.temperature=0 samples nothing to learn from; set it above 0"
            )
        if actor.temperature != rollout.train_sampling_params.temperature:
            raise ConfigError(
                f"actor.temperature={actor.temperature} is not rollout.train_sampling_params.temperature="
                f"{rollout.train_sampling_params.temperature}: it would train on a distribution it did not draw from"
            )
        if rollout.train_sampling_params.is_cut and actor.tis_coef > 0:
            raise ConfigError(
                f"actor.tis_coef={actor.tis_coef} compares with the engine's distribution, which top_p and top_k of "
                "rollout.train_sampling_params cut; set actor.tis_coef=0 or sample from all tokens"
            )
        sampled = {
            f"rollout.{name}": getattr(rollout, name) for name in ("train_sampling_params", "test_sampling_params")
        }
        of_sets = {f"{one.key}.sampling": one.sampling for one in self.test_sets if one.name}
        for key, sampling in of_sets.items():
            rollout.check_sampling(sampling, key)
        for key, sampling in (sampled | of_sets).items():
            if sampling.max_new_tokens > actor.max_length:
                raise ConfigError(
                    f"{key}.max_new_tokens={sampling.max_new_tokens} does not fit into "
                    f"actor.max_length_per_device={times_sp(actor.max_length_per_device, 'actor', actor.sp_size)}"
                )
        limits = [
            ("actor.max_inference_length_per_device", actor.max_inference_length_per_device, actor.sp_size),
            (
                "ref_actor.max_inference_length_per_device",
                self.ref_actor.max_inference_length_per_device,
                actor.sp_size,
            ),
        ]
        if self.adv.estimator == "gae":
            critic = self.critic
            limits += [
                ("critic.max_length_per_device", critic.max_length_per_device, critic.sp_size),
                ("critic.max_inference_length_per_device", critic.max_inference_length_per_device, critic.sp_size),
            ]
        for key, tokens, sp_size in limits:
            if tokens * sp_size < actor.max_length:
                group = "critic" if key.startswith("critic") else "actor"
                raise ConfigError(
                    f"{key}={times_sp(tokens, group, sp_size)} is less than actor.max_length_per_device="
                    f"{times_sp(actor.max_length_per_device, 'actor', actor.sp_size)}, so a sequence may not fit"
                )
        if self.adv.estimator not in ("reinforce", "gae") and (self.adv.norm_var or self.adv.global_norm):
            raise ConfigError(
                f"adv.norm_var and adv.global_norm have no effect with adv.estimator={self.adv.estimator}"
            )
        _check_deviation(self.adv, self.train_data)
        if self.adv.estimator == "gdpo" and actor.kl.coef > 0 and actor.kl.type == "reward":
            raise ConfigError(
                "actor.kl.type=reward with adv.estimator=gdpo: parts of a reward are normalised one by one, and a KL "
                "divergence is none of them; set actor.kl.type=advantage or loss"
            )
        if self.adv.estimator != "gae":
            for key, value, idle in (
                ("adv.gamma", self.adv.gamma, 1),
                ("adv.lamda", self.adv.lamda, 1),
                ("actor.freeze_steps", actor.freeze_steps, 0),
            ):
                if value != idle:
                    raise ConfigError(f"{key}={value} has no effect with adv.estimator={self.adv.estimator}")
        if self.adv.overlong_buffer > rollout.train_sampling_params.max_new_tokens:
            raise ConfigError(
                f"adv.overlong_buffer={self.adv.overlong_buffer} is more than "
                f"rollout.train_sampling_params.max_new_tokens={rollout.train_sampling_params.max_new_tokens}"
            )
        if self.adv.overlong_penalty != 1 and not self.adv.overlong_buffer:
            raise ConfigError("adv.overlong_penalty has no effect with adv.overlong_buffer=0")
        if actor.avg_level != "constant" and actor.avg_length != rollout.train_sampling_params.max_new_tokens:
            raise ConfigError(f"actor.avg_length has no effect with actor.avg_level={actor.avg_level}")
        if self.adv.overlong_buffer and rollout.max_turns > 1:
            raise ConfigError(
                f"adv.overlong_buffer={self.adv.overlong_buffer} is defined for one response; "
                f"set it to 0 or rollout.max_turns={rollout.max_turns} to 1"
            )
        _check_regularizers(actor)
        is_off_policy = actor.update_per_rollout > 1 or rollout.max_staleness > 0
        if not actor.kl.importance_weight and actor.kl.used_estimator == "k2" and not is_off_policy:
            raise ConfigError(
                "actor.kl.importance_weight=false has no effect with actor.update_per_rollout=1 and "
                "rollout.max_staleness=0: every weight is 1"
            )
        if actor.select.not_truncated and rollout.overlong_filtering:
            raise ConfigError(
                "actor.select.not_truncated=true has no effect with rollout.overlong_filtering=true, which leaves no "
                "truncated trajectory"
            )
        if actor.select.on_policy and not rollout.max_staleness:
            raise ConfigError("actor.select.on_policy has no effect with rollout.max_staleness=0: all tokens are")
        data = self.train_data
        if (
            self.adv.estimator in ("reinforce", "gdpo", "rloo")
            and data.prompts_per_rollout * data.responses_per_prompt == 1
        ):
            raise ConfigError(
                f"adv.estimator={self.adv.estimator} compares a response with others, and there is one a step; raise "
                "train_data.responses_per_prompt or train_data.prompts_per_rollout"
            )
        if rollout.dynamic_filtering and self.train_data.responses_per_prompt == 1:
            raise ConfigError(
                "rollout.dynamic_filtering=true drops every group of one (train_data.responses_per_prompt=1); "
                "set rollout.dynamic_filtering=false"
            )
        if rollout.dynamic_filtering_rounds > 1 and not rollout.dynamic_filtering:
            raise ConfigError(
                f"rollout.dynamic_filtering_rounds={rollout.dynamic_filtering_rounds} has no effect with "
                "rollout.dynamic_filtering=false"
            )
        if self.trainer.test_freq and not self.test_sets:
            raise ConfigError(
                f"trainer.test_freq={self.trainer.test_freq} needs test_data.path, or test_data.prompts_per_rollout "
                "tasks that the environment makes up, or test_data.sets"
            )
        if self.trainer.eval_only and (source := self.trainer.load_ckpt_from) in ("latest", "best"):
            raise ConfigError(
                f"trainer.load_ckpt_from={source} is of trainer.save_dir, and trainer.eval_only=true writes into a new "
                "folder; name the checkpoint"
            )
        if self.trainer.eval_only and not self.test_sets:
            raise ConfigError(
                "trainer.eval_only=true needs test_data.path, test_data.prompts_per_rollout or test_data.sets"
            )
        for name in ("keep_best", "early_stop"):
            if getattr(self.trainer, name) and self.trainer.test_freq is None:
                raise ConfigError(f"trainer.{name}=true has no effect without trainer.test_freq")
        if self.train_data.path is None and self.train_data.curriculum != "none":
            raise ConfigError(
                f"train_data.curriculum={self.train_data.curriculum} needs train_data.path: tasks that the environment "
                "makes up never come back"
            )


@dataclass(frozen=True, kw_only=True)
class SFTConfig:
    data: SFTData
    actor: SFTActor
    trainer: Trainer

    def __post_init__(self) -> None:
        self.data.check(self.trainer.test_freq)
        _check_schedule("actor", self.actor)


@dataclass(frozen=True, kw_only=True)
class RMConfig:
    data: SupervisedData
    critic: TrainableChat
    trainer: Trainer

    def __post_init__(self) -> None:
        self.data.check(self.trainer.test_freq)
        _check_schedule("critic", self.critic)


@dataclass(frozen=True, kw_only=True)
class DPOConfig:
    data: SupervisedData
    actor: DPOActor
    ref_actor: RefActor
    trainer: Trainer

    def __post_init__(self) -> None:
        self.data.check(self.trainer.test_freq)
        _check_schedule("actor", self.actor)
        if self.actor.reference_free and self.ref_actor.model_name != self.actor.model_name:
            raise ConfigError("ref_actor.model_name has no effect with actor.reference_free=true")


def _changed(sampling: SamplingParams, changes: dict[str, Any], key: str) -> SamplingParams:
    """Return `sampling` with `changes`, which are the settings of the group `key`."""
    values = asdict(sampling) | changes
    values |= {name: list(value) for name, value in values.items() if isinstance(value, tuple)}
    changed: SamplingParams = build(SamplingParams, values, key)
    return changed


def _check_deviation(adv: Advantage, data: TrainData) -> None:
    if adv.std_over is None:
        return
    if adv.estimator != "reinforce":
        raise ConfigError(f"adv.std_over={adv.std_over} has no effect with adv.estimator={adv.estimator}")
    if not adv.norm_var:
        raise ConfigError(f"adv.std_over={adv.std_over} has no effect with adv.norm_var=false")
    if adv.std_over == "rollout" and (adv.global_norm or data.responses_per_prompt == 1):
        raise ConfigError("adv.std_over=rollout has no effect: the mean is over the whole rollout already")


def _check_regularizers(actor: Actor) -> None:
    if actor.regularize_on == "all" and not (actor.entropy.coef or (actor.kl.coef and actor.kl.type == "loss")):
        raise ConfigError(
            "actor.regularize_on=all has no effect with actor.entropy.coef=0 and no KL divergence in the loss"
        )
    if actor.regularize_on == "all" and actor.train_on == "all" and not actor.select.is_on:
        raise ConfigError("actor.regularize_on=all has no effect: actor.train_on=all and actor.select keep everything")


def times_sp(tokens: int, group: str, sp_size: int) -> str:
    """A limit of one process, and how many share a microbatch."""
    return f"{tokens}" + (f" x {group}.sp_size={sp_size}" if sp_size > 1 else "")


def _check_schedule(group: str, model: Trainable) -> None:
    """Here and not in `Trainable`, which does not know the name of its group."""
    if model.scheduler == "wsd" and model.used_warmup_ratio + model.decay_ratio > 1:
        raise ConfigError(
            f"{group}.warmup_ratio={model.used_warmup_ratio} and {group}.decay_ratio={model.decay_ratio} overlap; "
            "together they must be at most 1"
        )


Config = RLConfig | SFTConfig | RMConfig | DPOConfig

PROGRAMS: dict[str, type] = {
    "sft": SFTConfig,
    "rm": RMConfig,
    "dpo": DPOConfig,
    "ppo": RLConfig,
    "spo": RLConfig,
    "spo_0p5": RLConfig,
    "path": RLConfig,
}
"""Program -> its configuration; `trainer/config/PROGRAM.yaml` holds the defaults."""


def trained(config: Config) -> tuple[str, TrainableChat]:
    """The model that a program trains, after the name of its group of keys."""
    return ("critic", config.critic) if isinstance(config, RMConfig) else ("actor", config.actor)


def load(program: str, overrides: Sequence[str]) -> Any:
    """Return the configuration of `program` with `key=value` overrides (Hydra's grammar), old keys of RL2 among them.

    Raises `ConfigError`, naming the override to fix, before anything else is loaded.
    """
    overrides = [setting for one in _translated(program, overrides) for setting in one.settings]
    try:
        with initialize_config_module("RL2.trainer.config", version_base="1.3"):
            tree = compose(program, overrides=[_may_be_new(override) for override in overrides])
        values = OmegaConf.to_container(tree, resolve=True)
    except Exception as error:  # of Hydra and OmegaConf, and what they do not catch: names of files, numbers, recursion
        raise ConfigError(_in_the_users_words(program, overrides, error)) from error
    return build(PROGRAMS[program], values, "")


def renamed(program: str, overrides: Sequence[str]) -> list[str]:
    """Return a line for each override with a key of RL2 or its fork that is another here: what it became."""
    return [one.note for one in _translated(program, overrides) if one.settings != [one.override]]


def _translated(program: str, overrides: Sequence[str]) -> list[Given]:
    try:
        return translate(program, overrides)
    except LegacyKeyError as error:
        raise ConfigError(str(error)) from error


def words(given: Sequence[str]) -> dict[str, Any]:
    """What `key=value` words say, as YAML reads the values. Raises `ConfigError`."""
    if unclear := [word for word in given if "=" not in word]:
        raise ConfigError(f"{unclear[0]!r} is not a setting; write key=value")
    try:
        values: Any = OmegaConf.to_container(OmegaConf.from_dotlist(list(given)))
    except Exception as error:  # of YAML's, of OmegaConf's, of keys that contradict each other
        raise ConfigError(f"{' '.join(given)}: {first_line(error)}") from error
    return {str(key): value for key, value in values.items()}


def show(config: Any) -> str:
    """The resolved configuration as YAML, without secrets."""
    return printable(OmegaConf.to_yaml(OmegaConf.create(masked(asdict(config)))))


def _may_be_new(override: str) -> str:
    """Keys of these groups are not ours: none stands in a YAML."""
    return f"++{override}" if override.startswith(FREE_GROUPS) else override


ARGS = "actor.objective_args"
COLUMNS = ("train_data.columns.", "test_data.columns.", "data.columns.")
FREE_GROUPS = (
    f"{ARGS}.",
    "rollout.vllm.env.",
    "rollout.sglang.env.",
    "actor.chat_template_kwargs.",
    "critic.chat_template_kwargs.",
    "reward.weights.",
    "test_data.sets.",
    *COLUMNS,
)


def _in_the_users_words(program: str, overrides: Sequence[str], error: Exception) -> str:
    keys = _keys(PROGRAMS[program], "")
    for override in overrides:
        if "=" not in override:
            return f"{override!r} is not an override; write key=value"
        key = override.split("=", 1)[0].lstrip("+~")
        if key not in keys and not key.startswith(FREE_GROUPS) and not any(k.startswith(f"{key}.") for k in keys):
            near = difflib.get_close_matches(key, keys, n=1)
            return f"{program} has no key {key!r}" + (f"; did you mean {near[0]}?" if near else "")
    return f"{first_line(error)} (overrides: {' '.join(overrides)})"


def _keys(cls: type, prefix: str) -> list[str]:
    """Return the keys of a group; NAME stands for a name of the user's own."""
    keys = []
    for name, hint in typing.get_type_hints(cls).items():
        if is_dataclass(hint):
            assert isinstance(hint, type)
            keys += _keys(hint, f"{prefix}{name}.")
            continue
        keys.append(f"{prefix}{name}")
        if typing.get_origin(hint) is dict and is_dataclass(member := typing.get_args(hint)[1]):
            assert isinstance(member, type)
            keys += _keys(member, f"{prefix}{name}.NAME.")
    return keys


def build(annotation: Any, value: Any, key: str) -> Any:
    """`value` as `annotation`; `key` is its full name, for errors."""
    if is_dataclass(annotation):
        assert isinstance(annotation, type)
        if not isinstance(value, dict):
            raise ConfigError(f"{key}={value!r}; {key} is a group: set {key}.NAME=value")
        hints = typing.get_type_hints(annotation, include_extras=True)
        prefix = f"{key}." if key else ""
        if unknown := sorted(f"{prefix}{name}" for name in set(value) - set(hints)):
            raise ConfigError(f"nothing reads {', '.join(unknown)}")
        if missing := [f.name for f in fields(annotation) if f.name not in value and needs_value(f)]:
            raise ConfigError(f"{', '.join(prefix + name for name in missing)} missing in the YAML")
        given = [f.name for f in fields(annotation) if f.name in value]
        return annotation(**{name: build(hints[name], value[name], prefix + name) for name in given})

    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        number = build(args[0], value, key)
        if not args[1].holds(number):
            raise ConfigError(f"{key}={value!r}; must be {args[1]}")
        return number
    if origin is Literal:
        if value not in args:
            raise ConfigError(
                f"{key}={value!r}; choose {'one of ' if len(args) > 1 else ''}{', '.join(map(str, args))}"
            )
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return build(next(a for a in args if a is not type(None)), value, key)
    if origin is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{key}={value!r}; {key} is a group: set {key}.NAME=value")
        if is_dataclass(args[1]):
            return {str(name): build(args[1], each, f"{key}.{name}") for name, each in value.items()}
        return value
    if origin is tuple:
        if not isinstance(value, list) or (args[-1] is not Ellipsis and len(value) != len(args)):
            raise ConfigError(f"{key}={value!r}; expected a list: '{key}=[...]'")
        each = [args[0]] * len(value) if args[-1] is Ellipsis else args
        return tuple(build(a, x, f"{key}[{i}]") for i, (a, x) in enumerate(zip(each, value, strict=True)))
    if value is None:
        raise ConfigError(f"{key} is not set; pass {key}=...")
    if annotation is float and type(value) is int:
        value = float(value) if abs(value) < 2**1023 else math.inf
    if annotation is str and type(value) in (int, float):
        return str(value)
    if type(value) is not annotation:
        raise ConfigError(f"{key}={value!r}; expected {_NAMES[annotation]}")
    if annotation is float and not math.isfinite(value):
        raise ConfigError(f"{key}={value!r}; expected a finite number")
    return value


def needs_value(f: Field[Any]) -> bool:
    """Return whether a field of a dataclass has no default."""
    return f.default is MISSING and f.default_factory is MISSING


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


_NAMES = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


def missing_here(config: Config) -> list[str]:
    """Return what a run on this machine would lack, a line each: packages, and the interpreter of its servers."""
    group, model = trained(config)
    packages = {
        "trainer.use_wandb": ("wandb", "wandb", config.trainer.use_wandb),
        "trainer.use_trackio": ("trackio", "trackio", config.trainer.use_trackio),
        "trainer.use_tensorboard": ("tensorboard", "tensorboard", config.trainer.use_tensorboard),
    }
    models: dict[str, Trainable] = {group: model}
    if isinstance(config, RLConfig) and config.adv.estimator == "gae":
        models["critic"] = config.critic
    packages |= {f"{k}.use_liger_kernel": ("liger_kernel", "liger", m.use_liger_kernel) for k, m in models.items()}
    if isinstance(model, TrainablePolicy):
        packages[f"{group}.lora.rank"] = ("peft", "lora", model.lora.rank > 0)
    missing = [
        f"{key} needs a package that is not installed: pip install 'rl2-spo[{extra}]'"
        for key, (package, extra, wanted) in packages.items()
        if wanted and importlib.util.find_spec(package) is None
    ]
    servers = config.rollout.servers if isinstance(config, RLConfig) else None
    if servers is not None and not servers.urls and shutil.which(servers.python) is None:
        how = " (`make engine` builds .venv-vllm)" if servers.key == "vllm" else ""
        missing.append(f"rollout.{servers.key}.python={servers.python}: there is no such interpreter{how}")
    return missing


def check_here(config: Config) -> None:
    """Raise `ConfigError` for what is not here: files that are named, packages, processes to split a model over."""
    group, model = trained(config)
    if not config.trainer.dry_run and (missing := missing_here(config)):
        raise ConfigError(missing[0])
    models: dict[str, Trainable] = {group: model}
    if isinstance(config, RLConfig) and config.adv.estimator == "gae":
        models["critic"] = config.critic
    for each, sizes in models.items():
        if "WORLD_SIZE" in os.environ or not config.trainer.dry_run:  # a dry run may be for other machines
            num_shards(sizes, int(os.environ.get("WORLD_SIZE", 1)), each)
    named: dict[str, str | None] = {f"{group}.chat_template": model.chat_template}
    if isinstance(config, RLConfig):
        named |= {"rollout.env_path": config.rollout.env_path, "train_data.path": config.train_data.path}
        for test_set in config.test_sets:
            named[f"{test_set.key}.path"] = test_set.path
            if test_set.env_path != config.rollout.env_path:
                named[f"{test_set.key}.env_path"] = test_set.env_path
    else:
        named |= {"data.path": config.data.path, "data.test_path": config.data.test_path}
        named |= {"data.env_path": config.data.env_path}
    for key, path in named.items():
        # a name without suffix may be a hub data set or a folder; scripts and templates are always files
        if path is None:
            continue
        if key.endswith(("env_path", "chat_template")) and not Path(path).is_file():
            raise ConfigError(f"{key}={path}: there is no such file")
        if Path(path).suffix[1:].isalpha() and "@" not in path and not Path(path).exists():
            raise ConfigError(f"{key}={path}: there is no such file")
