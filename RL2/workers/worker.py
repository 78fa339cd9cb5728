"""A model on any number of processes, with or without an optimizer."""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from RL2.batch.packing import microbatches, pack_tokens
from RL2.config.model import Lora, Trainable, TrainablePolicy
from RL2.errors import ConfigError, UserError
from RL2.models.dtypes import compute_dtype
from RL2.models.lora import add_adapters, export_adapter
from RL2.models.packed import PackedModel, layers, transformers_attention
from RL2.models.policy import Policy, export, named_weights
from RL2.objectives.objective import Loss
from RL2.ops.invariants import first_breach
from RL2.parallel.fsdp import by_mesh, clip_grad_norm, local, shard
from RL2.parallel.mesh import Mesh
from RL2.parallel.processes import Processes
from RL2.parallel.tp import check_sizes, split
from RL2.types import StatsRequest, TokenBatch, TokenStats
from RL2.workers.update_stats import UpdateStats

Progress = Callable[[int], object]
"""Told how many sequences more are done."""


CHECKED_TOKENS = 64
"""Tokens of a sequence that `Worker.check_packing` looks at."""
PACKING_SLACK = {torch.float32: 1e-4, torch.bfloat16: 0.1}
"""Mean difference of packed and lone log-probabilities that rounding explains, in nats, by compute dtype."""


class InvariantError(UserError, RuntimeError):
    """Statistics that cannot be, or a loss or gradient that is not a number; the optimizer step was not taken."""


class Worker:
    """A model spread over the processes: statistics of a batch, and its weights."""

    def __init__(
        self,
        model_name: str,
        dtype: str,
        mesh: Mesh,
        processes: Processes,
        key: str = "actor.model_name",
        model: type[PackedModel] = Policy,
        offload_model: bool = False,
        lora: Lora | None = None,
    ) -> None:
        """`key` named the model, for errors; `model` is what is made of it; `lora` has a rank, if it is given."""
        self.processes, self.mesh = processes, mesh
        self.dtype = compute_dtype(dtype, processes.device)
        group = key.partition(".")[0]
        lm = model.build(model_name, key)
        check_sizes(lm, mesh.tp_size, mesh.sp_size, group)
        self.has_adapters = lora is not None
        if lora is not None:
            add_adapters(lm, lora, self.dtype, model_name, group)
        # split, then shard, then read: no process ever holds the whole
        self.partial = split(lm, mesh.tp) if mesh.tp is not None else []
        """Modules whose gradients are summands of each tensor-parallel process."""
        self.policy = model(lm, mesh.sp, None if mesh.tp is None else mesh.tp.get_group())
        # one process in float32 needs no sharding, and its weights can then be the engine's own
        if processes.world_size > 1 or self.dtype != torch.float32:
            shard(self.policy, layers(lm), mesh.shards, self.dtype)
        self.offload_model, self.users = offload_model, 0
        self.named = f"{key}={model_name}"
        self.packing_checked = False
        self.policy.fill(model_name, key, torch.device("cpu") if offload_model else processes.device)

    @property
    def lm(self) -> PreTrainedModel:
        return self.policy.lm

    @property
    def can_share_weights(self) -> bool:
        """An engine of this process may read the very tensors: whole, on the device, and nothing to merge."""
        return not (isinstance(self.policy, FSDPModule) or self.offload_model or self.has_adapters)

    def stats(
        self, batch: TokenBatch, request: StatsRequest, max_tokens: int, progress: Progress = lambda done: None
    ) -> TokenStats:
        """Statistics at all T positions of `batch`, the same on every process; 0 where there is no action."""
        self.check_packing(batch)
        self.policy.eval()
        out: dict[str, Tensor] = {}
        starts = batch.cu_seqlens.tolist()
        everything = range(batch.num_sequences)
        with self.at_work("the statistics of a batch"):
            for ids in self.share(batch, everything, max_tokens):
                microbatch = batch.sequences(ids or [0])
                with torch.no_grad():
                    stats = self._forward(microbatch, request)
                for name, value in stats.items():
                    out.setdefault(name, value.new_zeros(len(batch.labels_T), *value.shape[1:], device="cpu"))
                    if ids:
                        places = torch.cat([torch.arange(starts[b], starts[b + 1]) for b in ids])[microbatch.action_T]
                        out[name][places] = value.cpu()
                progress(len(ids) * self.mesh.data_size)
            self._reshard()
        return TokenStats(**{name: self.processes.sum(value, self.mesh.data) for name, value in out.items()})

    def check_packing(self, batch: TokenBatch) -> None:
        """Compare sequences of `batch`, packed, with each alone through transformers' own forward; once for a model.

        Raises InvariantError, on every process, if they differ by more than rounding; nothing may be trained then.
        """
        sequences = _some_sequences(batch)
        if self.packing_checked or len(sequences) < 2:
            return
        self.packing_checked = True
        self.policy.eval()
        request = self.policy.CHECKED
        together = pack_tokens(sequences)
        together = together.with_(group_B=torch.zeros_like(together.group_B))  # what they have in common runs once
        with self.at_work("the comparison of packed and lone sequences"), torch.no_grad():
            (packed_A,) = self._forward(together, request).values()
            with transformers_attention(self.lm):
                lone = [
                    self.policy(pack_tokens([ids]).to(self.processes.device), None, request, alone=True)
                    for ids in sequences
                ]
            self._reshard()
        alone_A = torch.cat([value for of_one in lone for value in of_one.values()])
        gap = float((packed_A - alone_A).abs().mean() / alone_A.abs().mean().clamp(min=1))
        most = PACKING_SLACK[self.dtype]
        if not math.isfinite(float(alone_A.sum())):
            raise InvariantError(f"{self.named}: the model's own numbers are not finite; look for NaN in its weights")
        if not gap <= most:
            raise InvariantError(
                f"{self.named}: in a packed batch its sequences get numbers that differ by {gap:.2g} in the mean from "
                f"those that each gets alone through transformers' own forward (rounding explains {most:g}); "
                f"{type(self.lm).__name__} is not computed exactly here, so nothing was trained"
            )

    def share(self, batch: TokenBatch, ids: Sequence[int], max_tokens: int) -> list[list[int]]:
        """This process's microbatches of the sequences `ids`: at most `max_tokens` for each process that shares one."""
        mesh = self.mesh
        return microbatches(batch, ids, max_tokens * mesh.sp_size, mesh.data_size)[mesh.data_rank]

    def _forward(self, microbatch: TokenBatch, request: StatsRequest) -> dict[str, Tensor]:
        device, shared = self.processes.device, microbatch.shared()
        return self.policy(microbatch.to(device), shared and shared.to(device), request)

    def _reshard(self) -> None:
        """Let go of the whole root, which would stay in the compute dtype until the next backward."""
        if isinstance(self.policy, FSDPModule):
            self.policy.reshard()

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every weight as the forward pass sees it, in the compute dtype; whole, one at a time (collective)."""
        with self.at_work("gathering the weights"):
            yield from named_weights(self.lm, self.dtype)

    def export(self, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
        """The model in Hugging Face format, in float32 (collective)."""
        with self.at_work("gathering the model to save"):
            export(self.lm, tokenizer, folder, self.processes.is_first)

    @contextmanager
    def at_work(self, what: str) -> Iterator[None]:
        """While it is needed the model is on the device; with `offload_model` otherwise in host memory.

        `what` is done, for the error if another process does not take part.
        """
        self.users += 1
        if self.offload_model and self.users == 1:
            self.policy.to(self.processes.device)
        try:
            with self.processes.expecting(f"the others in {what}"):
                yield
        finally:
            self.users -= 1
            if self.offload_model and self.users == 0:
                self.policy.to("cpu")


class Learner(Worker):
    """A model with an optimizer; `step` makes one optimizer step on a global minibatch that every process holds."""

    def __init__(
        self,
        config: Trainable,
        processes: Processes,
        total_steps: int,
        save_dir: Path,
        key: str = "actor.model_name",
        model: type[PackedModel] = Policy,
    ) -> None:
        """`total_steps`: optimizer steps of the whole run, for the schedule. `save_dir`: where a broken batch goes."""
        group = key.partition(".")[0]
        mesh = Mesh.make(processes, config, group)
        lora = config.lora if isinstance(config, TrainablePolicy) and config.lora.rank else None
        super().__init__(config.model_name, config.dtype, mesh, processes, key, model, config.offload_model, lora)
        self.config, self.total_steps, self.save_dir = config, total_steps, save_dir
        if config.use_liger_kernel:
            _apply_liger(self.lm, group)
        if config.gradient_checkpointing:
            refuse_no_recomputation(self.lm, group)
            _recompute_activations(self.lm)
        self.optimizer = _adamw(self.policy, config)
        self.update_stats = UpdateStats(self.optimizer, self.dtype)
        self.steps = 0
        """Optimizer steps taken."""
        self.max_logprob_gap = math.inf
        """Limit of the mean of the metric `logp_gap`."""

    def step(
        self,
        batch: TokenBatch,
        loss: Callable[[TokenStats, TokenBatch], Loss],
        request: StatsRequest,
        progress: Progress = lambda done: None,
    ) -> dict[str, float]:
        """Take one optimizer step on (loss_T * weight_T).sum() over `batch`, the global minibatch.

        Returns the loss, means over the tokens that train, gradient norm, learning rate and the update's statistics.
        Raises `InvariantError` on every process, before the optimizer step, if an invariant of ops/invariants.py does
        not hold, if trainer and engine are further apart than `max_logprob_gap`, or if loss or gradient is not finite.
        """
        with self.at_work("an update"):
            means = self.backward(batch, loss, request, progress)
            return means | self._apply(means["loss"], batch)

    def export(self, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
        """As `Worker.export`, or with `lora.save=adapter` the adapter alone."""
        if not (isinstance(self.config, TrainablePolicy) and self.config.lora.save == "adapter"):
            return super().export(tokenizer, folder)
        with self.at_work("gathering the adapters to save"):
            export_adapter(self.lm, folder, self.processes.is_first)
        if self.processes.is_first:
            tokenizer.save_pretrained(folder)

    def backward(
        self,
        batch: TokenBatch,
        loss: Callable[[TokenStats, TokenBatch], Loss],
        request: StatsRequest,
        progress: Progress = lambda done: None,
    ) -> dict[str, float]:
        """Gradients of the loss of `step`, summed over microbatches and processes.

        Sequences without any weight are left out of the plan, on every process alike; a microbatch that is empty runs
        on a sequence of weight 0, so all processes meet in the same collectives.
        """
        self.check_packing(batch)
        self.policy.train()
        assert batch.weight_T is not None
        totals = _Totals(self.processes, self.mesh)
        trained = batch.sequence_T[batch.weight_T != 0].unique().tolist()
        shortest = int(batch.lengths_B.argmin())
        mine = self.share(batch, trained, self.config.max_length_per_device)
        for number, ids in enumerate(mine, start=1):
            if isinstance(self.policy, FSDPModule):  # replicas add up their gradients once a step
                self.policy.set_requires_all_reduce(number == len(mine))
            microbatch = batch.sequences(ids or [shortest])
            if not ids:
                microbatch = microbatch.with_(weight_T=torch.zeros_like(microbatch.reward_T))
            stats = TokenStats(**self._forward(microbatch, request))
            actions = microbatch.positions(microbatch.action_T).to(self.processes.device)
            assert actions.weight_T is not None
            loss_T, metrics = loss(stats, actions)
            total = (loss_T * actions.weight_T).sum()
            total.backward()
            where = _Where(ids or [shortest], actions)
            totals.add(total, actions.weight_T != 0, metrics, where)
            if breach := first_breach(stats, self.lm.config.vocab_size):
                law, t, value = breach
                totals.broken.append(f"{law} does not hold: {value:g} at {where(t)}")
            progress(len(ids) * self.mesh.data_size)
        self._sum_partial_gradients()
        means, broken = _of_the_present(totals.means()), totals.all_broken()
        gap = means.get("logp_gap", 0.0)
        if math.isnan(means.get("drift", 0.0)):  # tokens of older weights may be far off, but have to be numbers
            gap = math.nan
        if not broken and not gap <= self.max_logprob_gap:  # true of nan as well
            broken = [
                f"trainer and engine are {gap:g} nats apart in the mean, more than trainer.max_logprob_gap="
                f"{self.max_logprob_gap:g}: {max(self.processes.gather([totals.worst]))[1]}"
            ]
        if broken:
            self._stop("broken_law", broken[0], batch)
        return means

    def _sum_partial_gradients(self) -> None:
        """Of what each tensor-parallel process has seen with its own heads only: few and small, so once a step."""
        parameters = [parameter for module in self.partial for parameter in module.parameters()]
        grads = [local(parameter.grad) for parameter in parameters if parameter.grad is not None]
        if grads:
            whole = self.processes.sum(torch.cat(grads), self.policy.tp)
            torch._foreach_copy_(grads, whole.split([len(grad) for grad in grads]))

    def measure(
        self,
        batch: TokenBatch,
        loss: Callable[[TokenStats, TokenBatch], Loss],
        request: StatsRequest,
        progress: Progress = lambda done: None,
    ) -> dict[str, float]:
        """The loss of `batch` under the present weights, and its metrics, as `step` counts them; nothing is learnt."""
        stats = self.stats(batch, request, self.config.max_length_per_device, progress)
        actions = batch.positions(batch.action_T)
        assert actions.weight_T is not None
        at_actions = {name: x[batch.action_T] for name, x in vars(stats).items()}
        loss_T, metrics = loss(TokenStats(**at_actions), actions)
        trains_T = actions.weight_T != 0
        means = {name: float(value_T[trains_T].double().mean()) for name, value_T in metrics.items()}
        return {"loss": float((loss_T * actions.weight_T).sum())} | means

    def _stop(self, what: str, why: str, batch: TokenBatch) -> NoReturn:
        """Save the batch and raise `InvariantError`, on every process."""
        file = self.save_dir / f"{what}_step_{self.steps}.safetensors"
        if self.processes.is_first:
            batch.save(file)
        self.processes.wait()  # torchrun ends all processes as soon as one has failed
        raise InvariantError(f"optimizer step {self.steps}: {why}; the step was not taken, and its batch is in {file}")

    def _apply(self, loss: float, batch: TokenBatch) -> dict[str, float]:
        grad_norm = clip_grad_norm(self.policy.parameters(), self.config.max_grad_norm)
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            self._stop("nonfinite", f"loss {loss}, gradient norm {grad_norm}", batch)
        rate = self.config.lr * schedule(self.config, self.steps, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.update_stats.open()
        if self.config.offload_optimizer:
            self._move_optimizer(self.processes.device)
        self.optimizer.step()
        changes = self.update_stats.close(self.processes)
        if self.config.offload_optimizer:
            self._move_optimizer(torch.device("cpu"))
        self.optimizer.zero_grad()
        self.steps += 1
        return {"loss": loss, "grad_norm": grad_norm, "lr": rate} | changes

    def _move_optimizer(self, device: torch.device) -> None:
        for state in self.optimizer.state.values():
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = state[name].to(device)


@dataclass(frozen=True)
class _Where:
    """Finds a token of a microbatch in the minibatch, to say which it is."""

    ids: list[int]
    actions: TokenBatch

    def __call__(self, t: int) -> str:
        b = int(self.actions.sequence_T[t])
        place = t - int(self.actions.cu_seqlens[b])
        return f"action {place} (token {int(self.actions.labels_T[t])}) of sequence {self.ids[b]}"


class _Totals:
    """Sums over microbatches and processes. The names come from the objective, so they are alike everywhere."""

    def __init__(self, processes: Processes, mesh: Mesh) -> None:
        self.processes, self.mesh = processes, mesh
        self.sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), dtype=torch.float64))
        self.peaks: dict[str, Tensor] = {}
        self.worst = (-math.inf, "")
        """The largest of all gaps on this process, and where it is."""
        self.broken: list[str] = []
        """Laws that are broken on this process."""

    def add(self, loss: Tensor, trains_T: Tensor, metrics: dict[str, Tensor], where: _Where) -> None:
        self.sums["loss"] += loss.detach().double().cpu()
        self.sums["tokens"] += trains_T.sum().double().cpu()
        for name, value_T in metrics.items():
            value_T = torch.where(trains_T, value_T.detach(), 0)
            self.sums[name] += value_T.double().sum().cpu()
            if name.endswith("_gap"):
                gap_T = value_T.double().nan_to_num(
                    nan=math.inf, posinf=math.inf
                )  # or a maximum would depend on the order
                peak = gap_T.max().cpu() if len(gap_T) else torch.zeros((), dtype=torch.float64)
                self.peaks[name] = torch.maximum(self.peaks.get(name, peak), peak)
                if float(peak) > self.worst[0] and len(value_T):
                    self.worst = float(peak), f"the largest is {float(peak):g} at {where(int(gap_T.argmax()))}"

    def means(self) -> dict[str, float]:
        """The loss as it is (its weights make it a mean already), the rest over the tokens that train, if any does."""
        summed = self.processes.sum(torch.stack(list(self.sums.values())), self.mesh.data).tolist()
        sums = dict(zip(self.sums, summed, strict=True))
        peaks = {f"{name}_max": float(self.processes.max(peak, self.mesh.data)) for name, peak in self.peaks.items()}
        means = {"loss": sums.pop("loss"), "tokens": sums.pop("tokens")}
        if means["tokens"]:
            means |= {name: x / means["tokens"] for name, x in sums.items()} | peaks
        return means

    def all_broken(self) -> list[str]:
        """The broken laws of all processes."""
        anywhere = self.processes.sum(torch.tensor(float(len(self.broken))))
        return self.processes.gather(self.broken) if anywhere else []


ON_POLICY = "on_policy"
"""Metric: share of the trained tokens that the present weights sampled, where it is not all of them."""


def _of_the_present(means: dict[str, float]) -> dict[str, float]:
    """`logp_gap` is of tokens that the present weights sampled, `drift` of the others; of none it says nothing."""
    if ON_POLICY not in means:
        return means
    for name, share in (("logp_gap", means[ON_POLICY]), ("drift", 1 - means[ON_POLICY])):
        value = means.pop(name)
        means |= {name: value / share} if share > 0 else {}
    return means


def _some_sequences(batch: TokenBatch) -> list[list[int]]:
    """Return the first tokens of the first two and the last sequence of `batch`; of a lone one, its two halves."""
    chosen = sorted({0, min(1, batch.num_sequences - 1), batch.num_sequences - 1})
    found = []
    for b in chosen:
        start, end = batch.cu_seqlens[b : b + 2].tolist()
        found.append([*batch.token_ids_T[start:end][:CHECKED_TOKENS].tolist(), int(batch.labels_T[end - 1])])
    if len(found) == 1:
        half = len(found[0]) // 2
        found = [found[0][:half], found[0][half:]]
    return [ids for ids in found if len(ids) > 1]


def schedule(config: Trainable, step: int, total: int) -> float:
    """Factor of the learning rate at optimizer step `step` (from 0) of `total`: a pure function, nothing to restore."""
    warmup = round(config.used_warmup_ratio * total)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if config.scheduler == "constant":
        return 1.0
    if config.scheduler == "wsd":
        return min(1.0, (total - step) / max(1.0, config.decay_ratio * total))
    progress = (step - warmup) / max(1, total - warmup)
    return 1 - progress if config.scheduler == "linear" else 0.5 * (1 + math.cos(math.pi * progress))


def _adamw(policy: PackedModel, config: Trainable) -> torch.optim.AdamW:
    parameters = [p for p in policy.parameters() if p.requires_grad]
    matrices, vectors = [p for p in parameters if p.ndim >= 2], [p for p in parameters if p.ndim < 2]
    return torch.optim.AdamW(
        [
            *({"params": group, "weight_decay": config.weight_decay} for group in by_mesh(matrices)),
            *({"params": group, "weight_decay": 0.0} for group in by_mesh(vectors)),
        ],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
    )


def refuse_no_recomputation(lm: PreTrainedModel, group: str) -> None:
    """Raise ConfigError if transformers cannot recompute the activations of the model."""
    if not lm.supports_gradient_checkpointing:
        raise ConfigError(
            f"{group}.gradient_checkpointing=true: {type(lm).__name__} does not support it in transformers; "
            f"set {group}.gradient_checkpointing=false"
        )


def _recompute_activations(lm: PreTrainedModel) -> None:
    with warnings.catch_warnings():  # newer transformers have another name for it, older ones only this
        warnings.simplefilter("ignore", FutureWarning)
        lm.gradient_checkpointing_enable({"use_reentrant": False})


def _apply_liger(lm: PreTrainedModel, group: str) -> None:
    try:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance
    except ImportError as error:
        raise ConfigError(f"{group}.use_liger_kernel=true needs liger-kernel: pip install rl2-spo[liger]") from error
    _apply_liger_kernel_to_instance(model=lm)
