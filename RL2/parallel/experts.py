"""Expert parallelism: each process of a group has some experts of every layer, and tokens travel to their experts.

    tokens of this process --all-to-all--> tokens of its experts: the model's own experts --all-to-all--> back, weighted

transformers calls the experts of a layer, stored in one tensor for each kind of weight, through an interface:
(tokens, numbers of the chosen experts, their weights) -> tokens. `IMPLEMENTATION` is registered there. Everything
except experts is computed as without expert parallelism, so routers and their metrics are unchanged.

Shapes: N tokens of this process, K experts of a token, S = N K pairs of both, E experts of all processes, R pairs of
all processes whose expert is here, D hidden size.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

from RL2.errors import ConfigError
from RL2.parallel.collectives import all_to_all
from RL2.parallel.fsdp import local

IMPLEMENTATION = "rl2_expert_parallel"
"""Name of the experts implementation that sends tokens to their experts."""


def check_experts(lm: PreTrainedModel, ep_size: int, group: str) -> None:
    """Raise ConfigError if `ep_size` processes cannot split the experts of `lm`.

    `group` is the prefix of the configuration keys.
    """
    if ep_size == 1:
        return
    key, model, found = f"{group}.ep_size={ep_size}", type(lm).__name__, find_experts(lm)
    if not found:
        raise ConfigError(
            f"{key}: {model} has no experts that transformers calls through its interface for experts; set "
            f"{group}.ep_size=1"
        )
    for experts in found:
        number: int = experts.num_experts
        if any(
            "." in name or parameter.ndim < 2 or len(parameter) != number
            for name, parameter in experts.named_parameters()
        ):
            raise ConfigError(
                f"{key}: the experts of {model} share parameters, which is not supported; set {group}.ep_size=1"
            )
        if number % ep_size:
            raise ConfigError(f"{key} does not divide the {number} experts of {model}")


def split_experts(lm: PreTrainedModel, mesh: DeviceMesh) -> list[nn.Module]:
    """Split the experts of `lm` in place over `mesh` and return the modules that hold those of a layer."""
    modules = find_experts(lm)
    for experts in modules:
        for name, parameter in list(experts.named_parameters()):
            shard = distribute_tensor(parameter, mesh, [Shard(0)], src_data_rank=None)
            experts.register_parameter(name, nn.Parameter(shard, requires_grad=parameter.requires_grad))
        # its own copy: an engine and the checks of a model build others from the model's configuration
        experts.config = copy.deepcopy(experts.config)
        experts.config._experts_implementation = IMPLEMENTATION
    return modules


def find_experts(lm: PreTrainedModel) -> list[Any]:
    """Return the modules of `lm` that transformers calls through its interface for experts."""
    return [part for part in lm.modules() if hasattr(part, "is_transposed") and hasattr(part, "num_experts")]


def _exchange(experts: Any, hidden_ND: Tensor, chosen_NK: Tensor, weight_NK: Tensor) -> Tensor:
    """Implement transformers' interface for experts: run each token on the processes that have its experts."""
    (N, K), here = chosen_NK.shape, _ExpertsHere(experts)
    group, size = here.mesh.get_group(), here.mesh.size()
    chosen_S = chosen_NK.flatten()
    order_S = chosen_S.argsort(stable=True)  # by expert, so by process
    sent_PE = torch.bincount(chosen_S, minlength=size * here.num_experts).view(size, here.num_experts)
    received_PE = torch.empty_like(sent_PE)
    dist.all_to_all_single(received_PE, sent_PE, group=group)
    sent, received = torch.stack([sent_PE, received_PE]).sum(-1).tolist()

    in_RD = all_to_all(hidden_ND[order_S // K], sent, received, group)
    expert_R = torch.arange(here.num_experts, device=in_RD.device).repeat(size).repeat_interleave(received_PE.flatten())
    # a row of zeros, so that experts without any token take part in the backward pass as on the other processes
    in_RD, expert_R = F.pad(in_RD, (0, 0, 0, 1)), F.pad(expert_R, (0, 1))
    out_RD = grouped_mm_experts_forward(here, in_RD, expert_R[:, None], torch.ones_like(in_RD[:, :1]))  # type: ignore[arg-type]
    sorted_SD = all_to_all(out_RD[:-1], received, sent, group)

    out_SD = torch.empty_like(sorted_SD).index_copy(0, order_S, sorted_SD)
    return (out_SD.view(N, K, -1) * weight_NK[..., None]).sum(1).to(hidden_ND.dtype)


class _ExpertsHere:
    """The experts of this process, with the attributes of a module of experts."""

    def __init__(self, experts: nn.Module) -> None:
        parameter = next(experts.parameters())
        assert isinstance(parameter, DTensor)
        self.experts, self.mesh = experts, parameter.device_mesh
        self.num_experts = len(local(parameter))

    def __getattr__(self, name: str) -> Any:
        return local(getattr(self.experts, name))


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _exchange)
