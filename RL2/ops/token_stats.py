"""The statistics seam: the only training code that sees logits.

Shapes: T tokens, V vocabulary, D hidden size, C tokens of one chunk.

Everything is computed relative to the two largest logits. With m the mode, d = z_m - logsumexp(the other logits), and
q the distribution over the other tokens (p_i = (1 - p_m) q_i for i != m):

    max_logp   = log sigmoid(d)          max_log1mp = log sigmoid(-d)
    logp       = (z_a - z_m) + max_logp
    log1mp     = max_log1mp if a = m, else log1p(-p_a), where p_a <= 1/2
    entropy    = H(Bern(p_m)) + (1 - p_m) H(q)

so no large number is subtracted from another: float32 keeps its relative precision up to p_m = 1 - 1e-38.
`log(-expm1(logp))`, the obvious way to log1mp, is off by up to 0.3 there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from RL2.types import MENU, TokenStats

CHUNK_BYTES = 64 * 2**20
"""Logits that the chunked path holds at a time."""


def token_stats(
    hidden_TD: Tensor,
    head_VD: Tensor,
    labels_T: Tensor,
    *,
    temperature: float = 1.0,
    fields: Sequence[str],
    implementation: Literal["auto", "reference", "chunked"] = "auto",
) -> TokenStats:
    """Statistics of softmax(hidden @ head.T / temperature) at each token, differentiable in `hidden` and `head`.

    `fields` names what is computed, out of `types.MENU`. Results are float32, or float64 for float64 inputs.
    `reference` builds the dense logits and lets autograd work; `chunked` never holds [T, V] and recomputes logits in
    the backward pass, whose gradient is in closed form. `auto` is chunked.
    """
    if unknown := set(fields) - set(MENU):
        raise ValueError(f"no such token statistic: {', '.join(sorted(unknown))}; the menu is {', '.join(MENU)}")
    if implementation == "reference":
        return reference_stats(_logits(hidden_TD, head_VD, temperature), labels_T, fields)
    names = tuple(name for name in MENU if name in fields)
    return TokenStats(**dict(zip(names, _Chunked.apply(hidden_TD, head_VD, labels_T, temperature, names), strict=True)))


def reference_stats(logits_TV: Tensor, labels_T: Tensor, fields: Sequence[str]) -> TokenStats:
    """The dense definition that everyone can check, in the dtype of the logits (float64 for tests)."""
    logp_TV = logits_TV.log_softmax(-1)
    mode_T = logits_TV.argmax(-1)

    def log_of_the_others(label_T: Tensor) -> Tensor:
        others_TV = logits_TV.scatter(1, label_T[:, None], -torch.inf)
        return others_TV.logsumexp(-1) - logits_TV.logsumexp(-1)

    menu = {
        "logp": lambda: logp_TV.gather(1, labels_T[:, None])[:, 0],
        "log1mp": lambda: log_of_the_others(labels_T),
        "max_logp": lambda: logp_TV.gather(1, mode_T[:, None])[:, 0],
        "max_log1mp": lambda: log_of_the_others(mode_T),
        "entropy": lambda: -(logp_TV.exp() * logp_TV).sum(-1),
    }
    return TokenStats(**{name: menu[name]() for name in fields})


def _logits(hidden_CD: Tensor, head_VD: Tensor, temperature: float) -> Tensor:
    """float32 logits (float64 for float64 inputs). Half-precision inputs are not rounded to half on the way out."""
    logits_CV = _product(hidden_CD, head_VD.T)
    return logits_CV if temperature == 1.0 else logits_CV / temperature


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b with the result in float32 for half-precision inputs: accumulated there and not rounded on the way out."""
    if a.dtype in (torch.float32, torch.float64):
        return a @ b
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


class _Softmax:
    """One chunk's distribution, in the terms of the module's docstring."""

    def __init__(self, logits_CV: Tensor, labels_C: Tensor) -> None:
        """Takes `logits_CV` over: afterwards `e_CV` lives in its memory, holding q_i up to its sum."""
        top_C, self.mode_C = logits_CV.max(-1)
        label_logit_C = logits_CV.gather(1, labels_C[:, None])[:, 0]
        # with the mode out of the way the largest of the rest is the reference: nothing underflows that matters
        second_C = logits_CV.scatter_(1, self.mode_C[:, None], -torch.inf).amax(-1)
        self.z_CV = logits_CV.sub_(second_C[:, None])
        self.z_CV.scatter_(1, self.mode_C[:, None], 0.0)
        self.e_CV = self.z_CV.exp()
        self.e_CV.scatter_(1, self.mode_C[:, None], 0.0)
        self.sum_C = self.e_CV.sum(-1)
        odds_C = (top_C - second_C) - self.sum_C.log()
        self.max_logp_C = F.logsigmoid(odds_C)
        self.max_log1mp_C = F.logsigmoid(-odds_C)
        self.is_mode_C = labels_C == self.mode_C
        self.logp_C = (label_logit_C - top_C) + self.max_logp_C
        below_half_C = self.logp_C.clamp(max=-0.5)  # keeps log1p finite where the other branch is taken
        self.log1mp_C = torch.where(self.is_mode_C, self.max_log1mp_C, torch.log1p(-below_half_C.exp()))

    def entropy_C(self) -> Tensor:
        mean_z_C = torch.linalg.vecdot(self.e_CV, self.z_CV) / self.sum_C
        rest_C = self.sum_C.log() - mean_z_C
        p_mode_C, p_rest_C = self.max_logp_C.exp(), self.max_log1mp_C.exp()
        return -p_mode_C * self.max_logp_C + p_rest_C * (rest_C - self.max_log1mp_C)

    def fields(self, names: Sequence[str]) -> list[Tensor]:
        return [self.entropy_C() if name == "entropy" else getattr(self, f"{name}_C") for name in names]

    def grad_logits(self, labels_C: Tensor, grads: dict[str, Tensor]) -> Tensor:
        """sum over fields f of grad_f df/dz, [C, V], written over `e_CV`.

        For i other than a and m, with p_i = (1 - p_m) q_i:
            dlogp/dz_i = dmax_logp/dz_i = -p_i,  dlog1mp/dz_i = p_a p_i / (1 - p_a),  dmax_log1mp/dz_i = p_m q_i,
            dH/dz_i = -p_i (log p_i + H).
        a and m have terms of their own. 1 - p is never formed by subtraction.
        """
        zero_C = torch.zeros_like(self.sum_C)
        logp, log1mp, max_logp, max_log1mp = (
            grads.get(name, zero_C) for name in ("logp", "log1mp", "max_logp", "max_log1mp")
        )
        p_mode_C, p_rest_C = self.max_logp_C.exp(), self.max_log1mp_C.exp()
        # where a is the mode, log1mp *is* max_log1mp and logp is max_logp
        on_mode_logp_C = max_logp + torch.where(self.is_mode_C, logp, zero_C)
        on_mode_log1mp_C = max_log1mp + torch.where(self.is_mode_C, log1mp, zero_C)
        other_logp_C = torch.where(self.is_mode_C, zero_C, logp)
        odds_a_C = (self.logp_C - self.log1mp_C).exp()
        other_log1mp_C = torch.where(self.is_mode_C, zero_C, log1mp * odds_a_C)

        rest_C = p_rest_C * (other_log1mp_C - on_mode_logp_C - other_logp_C) + p_mode_C * on_mode_log1mp_C
        mode_C = p_rest_C * on_mode_logp_C + p_mode_C * (other_log1mp_C - other_logp_C - on_mode_log1mp_C)
        if (grad_entropy := grads.get("entropy")) is not None:
            entropy_C = self.entropy_C()
            shift_C = self.max_log1mp_C - self.sum_C.log() + entropy_C  # log p_i + H = z_i + shift
            scale_C = grad_entropy * p_rest_C
            grad_CV = self.z_CV.mul_(-scale_C[:, None]).add_((rest_C - scale_C * shift_C)[:, None])
            grad_CV.mul_(self.e_CV).div_(self.sum_C[:, None])
            mode_C = mode_C - grad_entropy * p_mode_C * (self.max_logp_C + entropy_C)
        else:
            grad_CV = self.e_CV.mul_((rest_C / self.sum_C)[:, None])
        grad_CV.scatter_(1, self.mode_C[:, None], mode_C[:, None])
        return grad_CV.scatter_add_(1, labels_C[:, None], (other_logp_C - other_log1mp_C)[:, None])


class _Chunked(torch.autograd.Function):
    """Forward keeps nothing of size [T, V]; backward computes the logits again, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any, hidden_TD: Tensor, head_VD: Tensor, labels_T: Tensor, temperature: float, names: tuple[str, ...]
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)  # a statistic that no loss reads costs nothing in the backward pass
        ctx.save_for_backward(hidden_TD, head_VD, labels_T)
        ctx.temperature, ctx.names = temperature, names
        out = [hidden_TD.new_empty(len(labels_T), dtype=_dtype(hidden_TD)) for _ in names]
        for at in _chunks(len(labels_T), len(head_VD)):
            softmax = _Softmax(_logits(hidden_TD[at], head_VD, temperature), labels_T[at])
            for whole_T, part_C in zip(out, softmax.fields(names), strict=True):
                whole_T[at] = part_C
        return tuple(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        asked = {name: grad_T for name, grad_T in zip(ctx.names, grads, strict=True) if grad_T is not None}
        hidden_TD, head_VD, labels_T = ctx.saved_tensors
        needs_hidden, needs_head = ctx.needs_input_grad[:2]
        grad_hidden_TD = torch.empty_like(hidden_TD) if needs_hidden else None
        # accumulated over chunks in float32 whatever the dtype of the head
        grad_head_VD = torch.zeros_like(head_VD, dtype=_dtype(hidden_TD)) if needs_head else None
        for at in _chunks(len(labels_T), len(head_VD)):
            softmax = _Softmax(_logits(hidden_TD[at], head_VD, ctx.temperature), labels_T[at])
            grad_CV = softmax.grad_logits(labels_T[at], {name: grad_T[at] for name, grad_T in asked.items()})
            grad_CV = (grad_CV / ctx.temperature if ctx.temperature != 1.0 else grad_CV).to(hidden_TD.dtype)
            if grad_hidden_TD is not None:
                grad_hidden_TD[at] = grad_CV @ head_VD
            if grad_head_VD is not None:
                grad_head_VD += _product(grad_CV.T, hidden_TD[at])
        return grad_hidden_TD, None if grad_head_VD is None else grad_head_VD.to(head_VD.dtype), None, None, None


def _dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _chunks(num_tokens: int, vocabulary: int) -> list[slice]:
    size = max(1, CHUNK_BYTES // (4 * vocabulary))
    return [slice(start, start + size) for start in range(0, num_tokens, size)]
