"""Routing of mixtures of experts, seen and replayed by forward hooks on the routers of an unmodified model.

A router of transformers returns the logits of all experts, the weights of the chosen ones and their numbers, for each
token of a block.

Shapes: N rows of a block's tokens, E experts, K chosen experts of a token, L routers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel
from transformers.utils.output_capturing import OutputRecorder

UNREAD = {
    "Gemma4TextRouter": "its router returns probabilities in place of logits",
    "ZayaRouter": "its router may skip the experts",
}
"""Routers whose results have another meaning."""
CORRECTION_BIAS = "e_score_correction_bias"


@dataclass(frozen=True)
class Router:
    """A module that chooses the experts of each token."""

    module: nn.Module
    scores: Literal["softmax", "sigmoid"]
    """Function from logits to the scores by which experts are chosen and weighted."""

    @property
    def bias_E(self) -> Tensor | None:
        """Buffer that is added to the scores when experts are chosen, but not when they are weighted."""
        return dict(self.module.named_buffers(recurse=False)).get(CORRECTION_BIAS)

    def probabilities(self, logits_NE: Tensor) -> Tensor:
        """Return the scores in float32, of sum 1; sigmoids are divided by their sum, as in DeepSeek-V3."""
        if self.scores == "softmax":
            return logits_NE.float().softmax(-1)
        score_NE = logits_NE.float().sigmoid()
        return score_NE / score_NE.sum(-1, keepdim=True)


def find_routers(lm: PreTrainedModel) -> Routers:
    """Return the routers of `lm` from first to last layer; none if it has none, or `why_unseen` has a reason."""
    modules = _modules(lm)
    if not modules or _unseen(modules[0]):
        return Routers(())
    return Routers(tuple(Router(module, _scores(module) or "softmax") for module in modules))


def why_unseen(lm: PreTrainedModel) -> str | None:
    """Return why the routing of `lm` cannot be seen, after its name; None if it can."""
    modules = _modules(lm)
    return _unseen(modules[0]) if modules else "has no router that transformers names"


def why_no_losses(lm: PreTrainedModel) -> str | None:
    """Return why the losses of routers are not defined for `lm`, after its name; None if they are."""
    if any(router.scores == "sigmoid" for router in find_routers(lm).all):
        return "chooses experts by sigmoids of the router's logits, for which these losses are not defined"
    return why_unseen(lm)


def why_no_biases(lm: PreTrainedModel) -> str | None:
    """Return why the routers of `lm` have no correction bias that can be updated, after its name; None if they do."""
    if any(router.bias_E is None for router in find_routers(lm).all):
        return f"has routers without a buffer {CORRECTION_BIAS}"
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


class Routers:
    """The routers of a model, from first to last layer."""

    def __init__(self, routers: tuple[Router, ...]) -> None:
        self.all = routers
        self.given_NLK: Tensor | None = None
        """Experts that the routers take now in place of their choice."""

    def __len__(self) -> int:
        return len(self.all)

    @contextmanager
    def hooked(self, hook: Callable[..., Any]) -> Iterator[None]:
        """Call `hook(number, module, args, kwargs, out)` whenever a router has run within the `with` block.

        What it returns replaces `out`, unless it is None.
        """
        with ExitStack() as hooks:
            for number, router in enumerate(self.all):
                handle = router.module.register_forward_hook(partial(hook, number), with_kwargs=True)
                hooks.callback(handle.remove)
            yield

    @contextmanager
    def watched(self, see: Callable[[int, Tensor, Tensor], None]) -> Iterator[None]:
        """Call `see(number, logits_NE, experts_NK)` with the decisions of each router within the `with` block."""
        with self.hooked(lambda number, _, __, ___, out: see(number, out[0], out[2])):
            yield

    @contextmanager
    def following(
        self, given_NLK: Tensor, see_own: Callable[[int, Tensor], None] = lambda number, own_NK: None
    ) -> Iterator[None]:
        """Let the routers take these experts within the `with` block; weights and gradients follow from their logits.

        `see_own` gets the experts that each would have chosen.
        """

        def hook(number: int, module: nn.Module, args: Any, kwargs: Any, out: tuple[Tensor, ...]) -> Any:
            see_own(number, out[2])
            with _Choice(given_NLK[:, number].long(), out[0].shape[-1]) as choice:
                followed = module.forward(*args, **kwargs)
            assert choice.times == 1, f"{type(module).__name__} does not choose experts by one topk"
            return followed

        before, self.given_NLK = self.given_NLK, given_NLK
        try:
            with self.hooked(hook):
                yield
        finally:
            self.given_NLK = before

    def contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Return contexts of a layer's forward pass and of its recomputation, which takes the same experts."""
        given_NLK = self.given_NLK
        return nullcontext(), nullcontext() if given_NLK is None else self.following(given_NLK)


class _Choice(TorchFunctionMode):
    """Mode in which the `topk` over all E experts returns given experts, with their values."""

    def __init__(self, experts_NK: Tensor, num_experts: int) -> None:
        super().__init__()
        self.experts_NK, self.num_experts, self.times = experts_NK, num_experts, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.topk, Tensor.topk) and args[0].shape == (len(self.experts_NK), self.num_experts):
            self.times += 1
            return torch.return_types.topk((args[0].gather(-1, self.experts_NK), self.experts_NK))
        return func(*args, **(kwargs or {}))


class RoutingRecord:
    """Experts of every token, in the order in which a model runs them."""

    def __init__(self, routers: Routers) -> None:
        self.routers = routers
        self.calls: list[list[Tensor]] = [[] for _ in routers.all]

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record the decisions within the `with` block."""
        with self.routers.watched(lambda number, _, experts_NK: self.calls[number].append(experts_NK)):
            yield

    def experts_NLK(self) -> Tensor:
        """Return all experts, int16 [N, L, K]."""
        return torch.stack([torch.cat(calls) for calls in self.calls], 1).to(torch.int16)


class RoutingSums:
    """Sums over the tokens of a batch of the decisions of each router."""

    def __init__(
        self, routers: Routers, *, with_losses: bool = False, follows: bool = False, records: bool = False
    ) -> None:
        """Start at 0; `with_losses` keeps what `balance_loss` and `z_loss` need, with its gradient.

        With `follows`, routers take the experts that a batch has, in place of their choice. With `records`, the experts
        of every token are kept in `experts_T`.
        """
        self.routers, self.with_losses, self.follows, self.records = routers, with_losses, follows, records
        self.blocks: list[Tensor] = []
        self.experts_T: Tensor | None = None
        """int16 [T, L, K], once a batch has run."""
        self.tokens = 0.0
        self.load_LE = torch.zeros(())
        """Number of tokens of each expert."""
        self.entropy_L = torch.zeros(())
        """Sum of the entropies of the probabilities, in nats."""
        self.p_LE = torch.zeros(())
        """Sum of the probabilities."""
        self.square_L = torch.zeros(())
        """Sum of the squares of logsumexp(logits)."""
        self.changed_L: Tensor | None = None
        """Sum of the shares of a token's given experts that its router would not choose; None if none are given."""

    @contextmanager
    def seeing(self, real_N: Tensor, given_NLK: Tensor | None) -> Iterator[None]:
        """Add the decisions for a block, of which `real_N` marks the tokens that are not padding.

        `given_NLK` are the experts that the batch has.
        """
        changed = dict[int, Tensor]()
        load, entropy, logits = dict[int, Tensor](), dict[int, Tensor](), dict[int, Tensor]()

        @torch.no_grad()
        def see(number: int, logits_NE: Tensor, experts_NK: Tensor) -> None:
            p_NE = self.routers.all[number].probabilities(logits_NE)
            entropy[number] = (torch.special.entr(p_NE).sum(-1) * real_N).sum()
            counted_NK = real_N[:, None].expand_as(experts_NK)
            load[number] = p_NE.new_zeros(p_NE.shape[1]).index_add_(0, experts_NK.flatten(), counted_NK.flatten())
            if self.with_losses:
                logits[number] = logits_NE

        def see_own(number: int, own_NK: Tensor) -> None:
            assert given_NLK is not None
            is_own_NK = (given_NLK[:, number, :, None] == own_NK[:, None]).any(-1)
            changed[number] = real_N @ (~is_own_NK).float().mean(-1)

        with ExitStack() as hooks:
            if given_NLK is not None and self.follows:
                hooks.enter_context(self.routers.following(given_NLK, see_own))
            elif given_NLK is not None:
                hooks.enter_context(self.routers.watched(lambda number, _, own_NK: see_own(number, own_NK)))
            hooks.enter_context(self.routers.watched(see))
            if self.records:
                hooks.enter_context((record := RoutingRecord(self.routers)).recording())
            yield
            if self.records:
                self.blocks.append(record.experts_NLK())

        def added(total: Tensor, block: dict[int, Tensor]) -> Tensor:
            return total.to(real_N.device) + torch.stack([block[number] for number in range(len(self.routers))])

        self.tokens += float(real_N.sum())
        if changed:
            self.changed_L = added(torch.zeros(()) if self.changed_L is None else self.changed_L, changed)
        self.load_LE, self.entropy_L = added(self.load_LE, load), added(self.entropy_L, entropy)
        if self.with_losses:  # after the layers have ended: nothing here is recomputed with them
            p = {n: real_N @ self.routers.all[n].probabilities(x_NE) for n, x_NE in logits.items()}
            square = {n: real_N @ x_NE.float().logsumexp(-1).square() for n, x_NE in logits.items()}
            self.p_LE, self.square_L = added(self.p_LE, p), added(self.square_L, square)

    def end(self, place_T: Tensor) -> None:
        """End a batch, of which each token is at `place_T` of its blocks laid end to end."""
        if self.records:
            self.experts_T, self.blocks = torch.cat(self.blocks)[place_T], []

    def balance_loss(self) -> Tensor:
        """Return the load balancing loss as `load_balancing_loss_func` of transformers: E sum_e load_e p_e.

        Both are means over all tokens and layers; load has no gradient. It is K if the load is even.
        """
        rows, num_experts = self.tokens * len(self.routers), self.load_LE.shape[1]
        return num_experts * (self.load_LE.sum(0) / rows * self.p_LE.sum(0) / rows).sum()

    def z_loss(self) -> Tensor:
        """Return the mean of logsumexp(logits)^2 over all tokens and layers."""
        return self.square_L.mean() / self.tokens
