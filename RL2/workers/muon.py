"""Muon for the weight matrices of the decoder layers, and AdamW for everything else."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

# the function behind torch.optim.Muon, which itself takes no parameters beside matrices
from torch.optim._muon import DEFAULT_A, DEFAULT_B, DEFAULT_C, DEFAULT_NS_STEPS, EPS, muon
from transformers import PreTrainedModel

from RL2.models.structure import decoder_layers
from RL2.parallel.fsdp import by_mesh, local
from RL2.workers.optim import parameter_groups

MOMENTUM = 0.95


class MuonAdamW(torch.optim.AdamW):
    """AdamW, except for parameter groups with `muon`, whose matrices take steps of Muon.

    Muon is that of torch.optim.Muon with Nesterov momentum 0.95 and `adjust_lr_fn="match_rms_adamw"`: its steps are
    about as long as those of AdamW, so one learning rate and weight decay serve both (arXiv 2502.16982, section 2.2).
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Take a step with the gradients of the parameters. Those of Muon's matrices are forgotten."""
        assert closure is None
        for group in self.param_groups:
            if not group["muon"]:
                continue
            moving = [p for p in group["params"] if p.grad is not None]
            for parameter in moving:
                state = self.state[parameter]
                if not state:  # AdamW wants a number of steps in every state that it loads
                    state |= {"step": torch.zeros(()), "momentum_buffer": torch.zeros_like(parameter.grad)}
                state["step"] += 1
            muon(
                [local(p) for p in moving],
                [local(p.grad) for p in moving],
                [local(self.state[p]["momentum_buffer"]) for p in moving],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                momentum=MOMENTUM,
                nesterov=True,
                ns_coefficients=(DEFAULT_A, DEFAULT_B, DEFAULT_C),
                ns_steps=DEFAULT_NS_STEPS,
                eps=EPS,
                adjust_lr_fn="match_rms_adamw",
                has_complex=False,
            )
            for parameter in moving:  # AdamW leaves out parameters without a gradient
                parameter.grad = None
        return super().step()


def muon_adamw(
    parameters: Iterable[nn.Parameter],
    matrices: Iterable[Tensor],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> MuonAdamW:
    """Return Muon over `matrices` and AdamW over the other `parameters` that train.

    All matrices must be whole on each process: the step of Muon is no sum over shards.
    """
    mine = {id(p) for p in matrices if p.requires_grad}
    every = list(parameters)
    of_muon = [{"params": group, "weight_decay": weight_decay} for group in by_mesh(p for p in every if id(p) in mine)]
    others = parameter_groups((p for p in every if id(p) not in mine), weight_decay)
    groups = [group | {"muon": is_muon} for is_muon, found in ((True, of_muon), (False, others)) for group in found]
    return MuonAdamW(groups, lr=lr, betas=betas, eps=eps)


def layer_matrices(lm: PreTrainedModel) -> Iterator[Tensor]:
    """Yield the weights of the linear layers in the decoder layers: not embeddings, head, fused experts and routers."""
    for layer in decoder_layers(lm):
        for module in layer.modules():
            if isinstance(module, nn.Linear):
                yield module.weight
