"""A model with an optimizer: gradients of a loss over a global minibatch, and optimizer steps."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any, NoReturn

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_layers import GradientCheckpointingLayer

from RL2.config.model import Moe, ReplayedMoe, Trainable, TrainablePolicy
from RL2.errors import ConfigError
from RL2.models.packed import PackedModel
from RL2.models.policy import Policy, export_adapter
from RL2.models.routing import why_no_biases, why_no_losses, why_unseen
from RL2.models.structure import decoder_layers
from RL2.parallel.fsdp import local
from RL2.parallel.mesh import Mesh
from RL2.parallel.processes import Processes
from RL2.types import StatsRequest, TokenBatch
from RL2.workers.metrics import LossFunction, Totals, mean_of
from RL2.workers.muon import layer_matrices, muon_adamw
from RL2.workers.optim import UpdateStats, adamw, clipped_step, move_state, schedule
from RL2.workers.passes import Progress, backward, trained_sequences
from RL2.workers.routing import RoutingTotals
from RL2.workers.token_wise import TokenWise
from RL2.workers.worker import InvariantError, Worker


class Learner(Worker):
    """A worker with an optimizer; `step` takes one optimizer step on a global minibatch that every process has."""

    def __init__(
        self,
        config: Trainable,
        processes: Processes,
        total_steps: int,
        save_dir: Path,
        group: str = "actor",
        model: type[PackedModel] = Policy,
    ) -> None:
        """Load the model and make its optimizer, whose schedule ends after `total_steps` optimizer steps.

        The batch of a step that fails is saved in `save_dir`. `group` is the prefix of the configuration keys.
        """
        mesh = Mesh.make(processes, config, group)
        lora = config.lora if isinstance(config, TrainablePolicy) and config.lora.rank else None
        where = mesh, processes, group, model, config.offload_model
        super().__init__(config.model_name, config.dtype, *where, lora, config.dequantize)
        self.config, self.total_steps, self.save_dir = config, total_steps, save_dir
        self.moe = config.moe if isinstance(config, TrainablePolicy) else Moe()
        refuse_no_routers(self.lm, self.moe)
        if config.use_liger_kernel:
            _apply_liger(self.lm, group)
        if config.gradient_checkpointing:
            refuse_no_recomputation(self.lm, group)
            _recompute_activations(self.policy)
        settings: dict[str, Any] = {name: getattr(config, name) for name in ("lr", "betas", "eps", "weight_decay")}
        self.optimizer = (
            muon_adamw(self.policy.parameters(), layer_matrices(self.lm), **settings)
            if config.optimizer == "muon"
            else adamw(self.policy.parameters(), **settings)
        )
        self.update_stats = UpdateStats(self.optimizer, self.dtype)
        self.steps = 0
        """Optimizer steps taken."""
        self.token_wise = TokenWise(self.policy) if isinstance(self.policy, Policy) else None
        """Knowledge of the loss, which is the same in all steps."""
        self.last_routing: RoutingTotals | None = None
        """Decisions of routers in the last backward pass."""

    @property
    def kept_model(self) -> PackedModel | None:
        """The model that checkpoints hold beside this one: a teacher whose weights change."""
        return None if self.teacher is None else self.teacher.kept_model

    def step(
        self,
        batch: TokenBatch,
        loss: LossFunction,
        request: StatsRequest,
        progress: Progress = lambda done: None,
    ) -> dict[str, float]:
        """Take one optimizer step on (loss_T * weight_T).sum() over `batch`, the global minibatch.

        Returns the loss, its metrics, gradient norm, learning rate and the update's statistics. Raises `InvariantError`
        on every process, before the optimizer step, if an invariant of ops/invariants.py does not hold, if `fault`
        finds one, or if loss or gradient is not finite.
        """
        with self.at_work("an update"):
            means = self.backward(batch, loss, request, progress)
            means |= self._apply(means["loss"], batch)
            if self.teacher is not None:
                self.teacher.follow()
            return means

    def export(self, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
        """Save the model as `Worker.export` does, or only the adapter with `lora.save=adapter` (collective)."""
        if not (isinstance(self.config, TrainablePolicy) and self.config.lora.save == "adapter"):
            return super().export(tokenizer, folder)
        with self.at_work("gathering the adapters to save"):
            export_adapter(self.lm, folder, self.processes.is_first)
        if self.processes.is_first:
            tokenizer.save_pretrained(folder)

    def backward(
        self,
        batch: TokenBatch,
        loss: LossFunction,
        request: StatsRequest,
        progress: Progress = lambda done: None,
    ) -> dict[str, float]:
        """Compute the gradients of the loss of `step`, summed over microbatches and processes; return its metrics.

        Sequences without any weight are left out on every process. A process without a sequence for a microbatch runs
        one of weight 0, so that all processes take part in the same collectives.
        """
        self.check_packing(batch)
        totals, size = Totals(self.processes, self.mesh.data), self.mesh.data_size
        trained = trained_sequences(batch)
        mine = self.share(batch, trained, self.config.max_length_per_device)
        idle = self.stand_ins(batch, trained, self.config.max_length_per_device)
        routing = self.last_routing = None
        if len(self.policy.routers):
            tokens = int(batch.lengths_B[trained].sum())
            routing = self.last_routing = RoutingTotals(self.moe, tokens, self.processes, self.mesh.data)

        def done(number: int) -> None:
            progress(number * size)

        with self.taught(batch, request) as teach:
            broken = backward(
                self.policy, batch, mine, loss, request, totals, done, routing, teach, idle, self.token_wise
            )
        self._sum_partial_gradients()
        means, faults = totals.means(), self._gather(broken)
        if routing is not None:
            means |= routing.metrics()
        if fault := faults[0] if faults else self.fault(means, totals):
            self._stop("broken_law", fault, batch)
        return means

    def _gather(self, broken: list[str]) -> list[str]:
        """Return the broken invariants of all processes (collective)."""
        anywhere = self.processes.sum(torch.tensor(float(len(broken))))
        return self.processes.gather(broken) if anywhere else []

    def fault(self, metrics: dict[str, float], totals: Totals) -> str:
        """Return why an update with these metrics must not be taken, '' if it may; the same on every process."""
        return ""

    def _sum_partial_gradients(self) -> None:
        """Sum gradients that tensor-parallel processes computed from their own heads only; they are small."""
        parameters = [parameter for module in self.partial for parameter in module.parameters()]
        grads = [local(parameter.grad) for parameter in parameters if parameter.grad is not None]
        if grads:
            whole = self.processes.sum(torch.cat(grads), self.policy.tp)
            torch._foreach_copy_(grads, whole.split([len(grad) for grad in grads]))

    def measure(
        self,
        batch: TokenBatch,
        loss: LossFunction,
        request: StatsRequest,
        progress: Progress = lambda done: None,
    ) -> dict[str, float]:
        """Return the loss of `batch` and its metrics under the current weights, without an update."""
        stats = self.stats(batch, request, self.config.max_length_per_device, progress).at(batch.action_T)
        actions = batch.positions(batch.action_T)
        assert actions.weight_T is not None
        loss_T, metrics = loss(stats, actions)
        trains_T = actions.weight_T != 0
        found = {name: mean_of(metric, trains_T) for name, metric in metrics.items()}
        means = {name: mean for name, mean in found.items() if mean is not None}
        return {"loss": float((loss_T * actions.weight_T).sum())} | means

    def _stop(self, what: str, why: str, batch: TokenBatch) -> NoReturn:
        """Save the batch and raise `InvariantError` (collective)."""
        file = self.save_dir / f"{what}_step_{self.steps}.safetensors"
        if self.processes.is_first:
            batch.save(file)
        self.processes.wait()  # torchrun ends all processes as soon as one has failed
        raise InvariantError(f"optimizer step {self.steps}: {why}; the step was not taken, and its batch is in {file}")

    def _apply(self, loss: float, batch: TokenBatch) -> dict[str, float]:
        """Clip the gradients and take the optimizer step; return its metrics."""

        def check(grad_norm: float) -> None:
            if not (math.isfinite(loss) and math.isfinite(grad_norm)):
                self._stop("nonfinite", f"loss {loss}, gradient norm {grad_norm}", batch)

        rate = self.config.lr * schedule(self.config, self.steps, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.update_stats.open()
        if self.config.offload_optimizer:
            move_state(self.optimizer, self.processes.device)
        grad_norm = clipped_step(self.optimizer, self.policy.parameters(), self.config.max_grad_norm, check)
        if self.last_routing is not None:
            self.last_routing.move_biases(self.policy.routers)
        changes = self.update_stats.close(self.processes)
        if self.config.offload_optimizer:
            move_state(self.optimizer, torch.device("cpu"))
        self.steps += 1
        return {"loss": loss, "grad_norm": grad_norm, "lr": rate} | changes


def refuse_no_recomputation(lm: PreTrainedModel, group: str) -> None:
    """Raise ConfigError if transformers cannot recompute the activations of the model's layers."""
    recomputes = all(isinstance(layer, GradientCheckpointingLayer) for layer in decoder_layers(lm))
    if not (lm.supports_gradient_checkpointing and recomputes):
        raise ConfigError(
            f"{group}.gradient_checkpointing=true: {type(lm).__name__} does not support it in transformers; "
            f"set {group}.gradient_checkpointing=false"
        )


def refuse_no_routers(lm: PreTrainedModel, moe: Moe) -> None:
    """Raise ConfigError if a setting of `moe` is not defined for the model."""
    for key, coef in moe.terms.items():
        if why := why_no_losses(lm):
            raise ConfigError(f"actor.moe.{key}={coef}: {type(lm).__name__} {why}; set actor.moe.{key}=0")
    if moe.bias_rate and (why := why_no_biases(lm)):
        raise ConfigError(f"actor.moe.bias_rate={moe.bias_rate}: {type(lm).__name__} {why}; set actor.moe.bias_rate=0")
    if isinstance(moe, ReplayedMoe) and moe.replay != "none" and (why := why_unseen(lm)):
        raise ConfigError(f"actor.moe.replay={moe.replay}: {type(lm).__name__} {why}; set actor.moe.replay=none")


def _recompute_activations(policy: PackedModel) -> None:
    settings: dict[str, Any] = {"use_reentrant": False}
    if len(policy.routers):
        settings["context_fn"] = policy.routers.contexts
    with warnings.catch_warnings():  # newer transformers have another name for it, older ones only this
        warnings.simplefilter("ignore", FutureWarning)
        policy.lm.gradient_checkpointing_enable(settings)


def _apply_liger(lm: PreTrainedModel, group: str) -> None:
    try:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance
    except ImportError as error:
        raise ConfigError(f"{group}.use_liger_kernel=true needs liger-kernel: pip install rl2-spo[liger]") from error
    _apply_liger_kernel_to_instance(model=lm)
