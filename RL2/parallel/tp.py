"""Tensor parallelism by the model's own plan (transformers' `tp_plan`), with torch's parallel styles.

A layer costs two all-reduces of its output in the forward pass and two of its input's gradient in the backward pass.
Norms run identically on every process. The head stays sharded by vocabulary for `token_stats`, and so does the
embedding.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module
from transformers import PreTrainedModel

from RL2.errors import ConfigError
from RL2.ops.attention import is_packed
from RL2.parallel.experts import find_experts

STYLES: dict[str, Callable[[], ParallelStyle]] = {
    "colwise": ColwiseParallel,
    "rowwise": RowwiseParallel,
    "colwise_gather_output": partial(ColwiseParallel, output_layouts=Replicate()),
    "rowwise_split_input": partial(RowwiseParallel, input_layouts=Replicate()),
}
"""Words of a plan that split a layer -> torch's parallel style. Between the last two, each process computes everything:
they split the weights of a layer whose heads or units do not stay together."""

PARTIAL = "replicated_with_grad_allreduce"
"""Word of a plan for a module that is whole on each process but sees only its heads; its gradients must be summed."""

SHARED_KEY = "mla_kv_a_proj"
"""Word of a plan for a whole module whose last outputs are a key that all heads share (multi-head latent attention)."""


def check_sizes(lm: PreTrainedModel, tp_size: int, sp_size: int, group: str) -> None:
    """Raise ConfigError if the model cannot be split in these sizes.

    `group` is the prefix of the configuration keys.
    """
    config, model = lm.config, type(lm).__name__
    for name, size in (("tp_size", tp_size), ("sp_size", sp_size)):
        if size > 1 and not is_packed(lm):
            raise ConfigError(
                f"{group}.{name}={size}: {model} runs row by row through its own forward, which only FSDP divides "
                f"over processes; set {group}.{name}=1"
            )
        if size > 1 and find_experts(lm):
            raise ConfigError(
                f"{group}.{name}={size}: {model} is a mixture of experts, which FSDP and ep_size divide over "
                f"processes; set {group}.{name}=1"
            )
    if not is_packed(lm):
        return
    queries, keys = config.num_attention_heads, config.num_key_value_heads
    for what, number in (
        ("key/value heads", keys),
        ("attention heads", queries),
        ("hidden units of an MLP", getattr(config, "intermediate_size", 0)),
    ):
        if number % tp_size:
            raise ConfigError(f"{group}.tp_size={tp_size} does not divide the {number} {what} of {model}")
    if tp_size > 1 and not plan_of(lm):
        raise ConfigError(f"{group}.tp_size={tp_size}: {model} has no tensor-parallel plan in transformers")
    if tp_size > 1 and any(name.rpartition(".")[2] == "sinks" for name, _ in lm.named_parameters()):
        raise ConfigError(f"{group}.tp_size={tp_size}: {model} has attention sinks, which are not split; use sp_size")
    if tp_size > 1:
        split_of(lm)
    of = f"{model}" if tp_size == 1 else f"{model} that {group}.tp_size={tp_size} leaves a process"
    queries, keys = queries // tp_size, keys // tp_size
    if queries % sp_size:
        raise ConfigError(f"{group}.sp_size={sp_size} does not divide the {queries} attention heads of {of}")
    if keys % sp_size and sp_size % keys:
        raise ConfigError(f"{group}.sp_size={sp_size} and the {keys} key/value heads of {of} do not divide one another")


def plan_of(lm: PreTrainedModel) -> dict[str, str]:
    """Return the backbone's plan: pattern such as `layers.*.self_attn.q_proj` -> word."""
    return getattr(lm.config, "base_model_tp_plan", None) or {}


class Split(NamedTuple):
    """The modules of a backbone that tensor parallelism changes."""

    styles: dict[str, ParallelStyle]
    """Parallel style of each split layer, by name."""
    partial: list[nn.Module]
    """Modules whose gradients must be summed over processes."""
    shared_keys: list[str]
    """Names of modules whose last outputs are a key that all heads share."""


def split_of(lm: PreTrainedModel) -> Split:
    """Return how the plan of `lm` splits it. Raise ConfigError for an unknown word in the plan."""
    plan = {re.compile(re.escape(pattern).replace(r"\*", r"\d+")): style for pattern, style in plan_of(lm).items()}
    found = Split({}, [], [])
    for name, module in lm.base_model.named_modules():
        style = next((style for pattern, style in plan.items() if pattern.fullmatch(name)), None)
        if style == PARTIAL:
            found.partial.append(module)
        elif style == SHARED_KEY:
            found.shared_keys.append(name)
        elif style in STYLES:
            found.styles[name] = STYLES[style]()
        elif style is not None:
            raise ConfigError(f"tensor parallelism: {type(lm).__name__} splits {name} by {style!r}, not supported")
    blocks = {name.rpartition(".")[0] for name in found.styles}
    # plans leave out activations; those with parameters (xIELU of Apertus) see only this process's units
    activations = [
        module
        for name, module in lm.base_model.named_modules()
        if name.rpartition(".")[2] == "act_fn" and name.rpartition(".")[0] in blocks
    ]
    return found._replace(partial=found.partial + activations)


def split(lm: PreTrainedModel, mesh: DeviceMesh) -> list[nn.Module]:
    """Split `lm` in place over `mesh` and return the modules whose gradients must be summed over processes.

    Raise ConfigError as `split_of`.
    """
    styles, with_partial_gradients, shared_keys = split_of(lm)
    embedding = lm.get_input_embeddings()
    names = {module: name for name, module in lm.base_model.named_modules()}
    styles[names[embedding]] = RowwiseParallel(input_layouts=Replicate())
    parallelize_module(lm.base_model, mesh, styles)
    blocks = {name.rpartition(".")[0] for name, style in styles.items() if isinstance(style, ColwiseParallel)}
    # layers with a shared key have whole layers too, which take no DTensor
    for block in blocks - {name.rpartition(".")[0] for name in shared_keys}:
        lm.base_model.get_submodule(block).register_forward_pre_hook(_Replicated(mesh), with_kwargs=True)
    for name in shared_keys:
        lm.base_model.get_submodule(name).register_forward_hook(_SharedKey(mesh, lm.config.qk_rope_head_dim))
    head = lm.get_output_embeddings()
    if head is not None and lm.config.tie_word_embeddings:
        head.weight = embedding.weight
    elif head is not None:
        head.weight = _by_rows(head.weight, mesh)
    if head is not None and head.bias is not None:
        head.bias = _by_rows(head.bias, mesh)
    return with_partial_gradients


def _by_rows(x: Tensor | nn.Module, mesh: DeviceMesh) -> nn.Parameter:
    assert isinstance(x, Tensor)
    return nn.Parameter(distribute_tensor(x, mesh, [Shard(0)], src_data_rank=None))


class _Replicated:
    """Forward pre-hook that marks a block's input as replicated once, so that its gradient is summed once."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh = mesh

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        if args:
            return (self._mark(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self._mark(kwargs["hidden_states"])}

    def _mark(self, x: Tensor) -> DTensor:
        return DTensor.from_local(x, self.mesh, [Replicate()], run_check=False)


class _SharedKey:
    """Forward hook that sums the gradient of the last outputs of a module, a key that all heads share."""

    def __init__(self, mesh: DeviceMesh, size: int) -> None:
        self.mesh, self.size = mesh, size

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        rest, key = output.split([output.shape[-1] - self.size, self.size], dim=-1)
        shared = DTensor.from_local(key, self.mesh, [Replicate()], run_check=False)
        return torch.cat([rest, shared.to_local(grad_placements=[Partial()])], dim=-1)


def first_row(total: int, group: dist.ProcessGroup, after: int = 0) -> int:
    """Return the index of the first of `total` rows that this process holds when they are split over `group`.

    `after` asks for the process so many places further on.
    """
    return min(total, -(-total // dist.get_world_size(group)) * (dist.get_rank(group) + after))


def whole_rows(own: Tensor, total: int, group: dist.ProcessGroup) -> Tensor:
    """Return all `total` rows of a matrix whose rows are split over `group` (collective). It has no gradient."""
    most = -(-total // dist.get_world_size(group))
    padded = own.new_zeros(most, own.shape[1])
    padded[: len(own)] = own.detach()
    parts = [torch.empty_like(padded) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, padded, group=group)
    return torch.cat(parts)[:total]
