"""Routing of mixtures of experts, seen by forward hooks on the routers of an unmodified model.

A router of transformers returns the logits of all experts, the weights of the chosen ones and their numbers, for each
token of a block.

Shapes: N rows of a block's tokens, E experts, K chosen experts of a token, L routers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.output_capturing import OutputRecorder

UNREAD = {
    "Gemma4TextRouter": "its router returns probabilities in place of logits",
    "ZayaRouter": "its router may skip the experts",
}
"""Routers whose results have another meaning."""

See = Callable[[int, Tensor, Tensor], None]
"""Function (number of the router, logits_NE, experts_NK)."""


@dataclass(frozen=True)
class Router:
    """A module that chooses the experts of each token."""

    module: nn.Module
    scores: Literal["softmax", "sigmoid"]
    """Function from logits to the scores by which experts are chosen and weighted."""

    def probabilities(self, logits_NE: Tensor) -> Tensor:
        """Return the scores in float32, of sum 1; sigmoids are divided by their sum, as in DeepSeek-V3."""
        if self.scores == "softmax":
            return logits_NE.float().softmax(-1)
        score_NE = logits_NE.float().sigmoid()
        return score_NE / score_NE.sum(-1, keepdim=True)


def find_routers(lm: PreTrainedModel) -> tuple[Router, ...]:
    """Return the routers of `lm` from first to last layer; none if it has none, or `why_unseen` has a reason."""
    modules = _modules(lm)
    if not modules or _unseen(modules[0]):
        return ()
    return tuple(Router(module, _scores(module) or "softmax") for module in modules)


def why_unseen(lm: PreTrainedModel) -> str | None:
    """Return why the routing of `lm` cannot be seen, after its name; None if it can."""
    modules = _modules(lm)
    return _unseen(modules[0]) if modules else "has no router that transformers names"


def why_no_losses(lm: PreTrainedModel) -> str | None:
    """Return why the losses of routers are not defined for `lm`, after its name; None if they are."""
    if any(router.scores == "sigmoid" for router in find_routers(lm)):
        return "chooses experts by sigmoids of the router's logits, for which these losses are not defined"
    return why_unseen(lm)


def _modules(lm: PreTrainedModel) -> list[nn.Module]:
    """Return the modules that transformers names as those that return router logits first."""
    named = (getattr(lm, "_can_record_outputs", None) or {}).get("router_logits")
    if not isinstance(named, OutputRecorder) or named.index != 0:
        return []
    return [module for module in lm.modules() if isinstance(module, named.target_class)]


def _unseen(module: nn.Module) -> str | None:
    if (name := type(module).__name__) in UNREAD:
        return UNREAD[name]
    return None if _scores(module) else f"has a router ({name}) whose scores are neither a softmax nor a sigmoid"


def _scores(module: nn.Module) -> Literal["softmax", "sigmoid"] | None:
    """Return the function of a router's scores, by the names in its code; None if that has neither or both."""
    names = inspect.unwrap(type(module).forward).__code__.co_names
    if "softmax" in names:
        return None if "sigmoid" in names else "softmax"
    return "sigmoid" if "sigmoid" in names else None


@contextmanager
def watching(routers: tuple[Router, ...], see: See) -> Iterator[None]:
    """Call `see` with the decisions of each router whenever it runs within the `with` block."""

    def hook(number: int) -> Callable[[nn.Module, object, tuple[Tensor, ...]], None]:
        return lambda module, _, out: see(number, out[0], out[2])

    with ExitStack() as hooks:
        for number, router in enumerate(routers):
            hooks.callback(router.module.register_forward_hook(hook(number)).remove)
        yield


class RoutingSums:
    """Sums over the tokens of a batch of the decisions of each router."""

    def __init__(self, routers: tuple[Router, ...], with_losses: bool = False) -> None:
        """Start at 0; `with_losses` keeps what `balance_loss` and `z_loss` need, with its gradient."""
        self.routers, self.with_losses = routers, with_losses
        self.tokens = 0.0
        self.load_LE = torch.zeros(())
        """Number of tokens of each expert."""
        self.entropy_L = torch.zeros(())
        """Sum of the entropies of the probabilities, in nats."""
        self.p_LE = torch.zeros(())
        """Sum of the probabilities."""
        self.square_L = torch.zeros(())
        """Sum of the squares of logsumexp(logits)."""

    @contextmanager
    def seeing(self, real_N: Tensor) -> Iterator[None]:
        """Add the decisions for a block, of which `real_N` marks the tokens that are not padding."""
        load, entropy, logits = dict[int, Tensor](), dict[int, Tensor](), dict[int, Tensor]()

        @torch.no_grad()
        def see(number: int, logits_NE: Tensor, experts_NK: Tensor) -> None:
            p_NE = self.routers[number].probabilities(logits_NE)
            entropy[number] = (torch.special.entr(p_NE).sum(-1) * real_N).sum()
            counted_NK = real_N[:, None].expand_as(experts_NK)
            load[number] = p_NE.new_zeros(p_NE.shape[1]).index_add_(0, experts_NK.flatten(), counted_NK.flatten())
            if self.with_losses:
                logits[number] = logits_NE

        with watching(self.routers, see):
            yield

        def added(total: Tensor, block: dict[int, Tensor]) -> Tensor:
            return total.to(real_N.device) + torch.stack([block[number] for number in range(len(self.routers))])

        self.tokens += float(real_N.sum())
        self.load_LE, self.entropy_L = added(self.load_LE, load), added(self.entropy_L, entropy)
        if self.with_losses:  # after the layers have ended: nothing here is recomputed with them
            p = {n: real_N @ self.routers[n].probabilities(x_NE) for n, x_NE in logits.items()}
            square = {n: real_N @ x_NE.float().logsumexp(-1).square() for n, x_NE in logits.items()}
            self.p_LE, self.square_L = added(self.p_LE, p), added(self.square_L, square)

    def balance_loss(self) -> Tensor:
        """Return the load balancing loss as `load_balancing_loss_func` of transformers: E sum_e load_e p_e.

        Both are means over all tokens and layers; load has no gradient. It is K if the load is even.
        """
        rows, num_experts = self.tokens * len(self.routers), self.load_LE.shape[1]
        return num_experts * (self.load_LE.sum(0) / rows * self.p_LE.sum(0) / rows).sum()

    def z_loss(self) -> Tensor:
        """Return the mean of logsumexp(logits)^2 over all tokens and layers."""
        return self.square_L.mean() / self.tokens
