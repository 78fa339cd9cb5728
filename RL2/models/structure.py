"""Parts that every causal language model has: decoder layers, and a head from hidden states to logits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from RL2.ops.token_stats import LogitTransform

PROBE = torch.cat([torch.tensor([1.0, 1e9]), torch.linspace(-100, 100, 199)]).double()
"""Logits by which the change after the head is measured: the second one is far beyond any soft cap."""


class Unsupported(Exception):
    """A reason to refuse a model; the text continues a sentence that begins with the model's name."""


class Unpacked(Unsupported):
    """A reason why packed attention is not exact for a model that may be exact row by row."""


def decoder_layers(lm: PreTrainedModel) -> nn.ModuleList:
    """Return the decoder layers: `layers` of the backbone, else its list of modules with the most parameters.

    Raise Unsupported if the model has no list of layers.
    """
    found = getattr(lm.base_model, "layers", None)
    if isinstance(found, nn.ModuleList):
        return found
    lists = [part for part in lm.base_model.modules() if isinstance(part, nn.ModuleList)]
    if not lists:
        raise Unsupported("has no list of layers")
    return max(lists, key=lambda part: sum(p.numel() for p in part.parameters()))


def has_head(lm: PreTrainedModel) -> bool:
    return hasattr(lm, "get_output_embeddings") and lm.get_output_embeddings() is not None


def measured_transform(lm: PreTrainedModel, layers: nn.ModuleList | None = None) -> LogitTransform:
    """Return what the forward of `lm` does to the logits of its head.

    `lm` is on the meta device and runs without `layers`, by default its decoder layers: only its embedding, last norm
    and head. In place of the head's result its forward gets `PROBE`. Raise Unsupported if hidden states change before
    the head, or if the change of the logits is neither a factor nor a soft cap.
    """
    head = lm.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise Unsupported(f"has no linear head ({type(head).__name__})")
    seen: dict[str, Any] = {}

    def probe(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        seen["head_in"] = args[0]
        logits = torch.zeros(out.shape, dtype=torch.double)
        logits[..., : len(PROBE)] = PROBE[: out.shape[-1]]
        return logits

    lm.base_model.register_forward_hook(lambda _, __, out: seen.update(hidden=out[0]))
    head.register_forward_hook(probe)
    with _without(lm, decoder_layers(lm) if layers is None else layers):
        try:
            logits = _logits(lm, torch.device("meta"))
        except RuntimeError:  # it looks at a number, such as a position
            reset_buffers(lm.to_empty(device="cpu"))
            logits = _logits(lm, torch.device("cpu"))
    if seen.keys() != {"head_in", "hidden"} or not is_same(seen["head_in"], seen["hidden"]):
        raise Unsupported("changes the hidden states before the head, which is not supported")
    after = logits[0, -1, : len(PROBE)].double()
    before = PROBE[: len(after)]
    cap = float(after[1]) if abs(after[1]) < 1e6 else None
    found = LogitTransform(scale=1.0 if cap else float(after[0]), softcap=cap)
    if not torch.allclose(found(before), after, rtol=1e-5, atol=1e-5):
        raise Unsupported("changes its logits after the head by neither a factor nor a soft cap")
    return found


@contextmanager
def _without(lm: PreTrainedModel, layers: nn.ModuleList) -> Iterator[None]:
    """Take `layers` out of `lm` within the `with` block."""
    places = [
        (part, name) for part in lm.base_model.modules() for name, child in part.named_children() if child is layers
    ]
    for part, name in places:
        setattr(part, name, nn.ModuleList())
    try:
        yield
    finally:
        for part, name in places:
            setattr(part, name, layers)


def _logits(lm: PreTrainedModel, device: torch.device) -> Tensor:
    ids = torch.zeros((1, 2), dtype=torch.long, device=device)
    with torch.no_grad():
        logits: Tensor = lm.eval()(input_ids=ids, use_cache=False).logits
    return logits


def reset_buffers(lm: PreTrainedModel) -> None:
    """Compute the buffers of `lm` that follow from the configuration, such as rotary frequencies; set others to NaN.

    Parameters are unchanged.
    """
    for buffer in lm.buffers():
        if buffer.is_floating_point():
            buffer.fill_(float("nan"))
    for parameter in lm.parameters():
        vars(parameter)["_is_hf_initialized"] = True  # transformers then skips it
    with torch.no_grad():
        _initialise(lm, lm)


def _initialise(module: nn.Module, model: PreTrainedModel) -> None:
    """Initialise `module` and its parts as part of `model`; a model within a model initialises its own parts.

    Parts without buffers are left out: the code of some (RWKV) computes with parameters, which may be sharded.
    """
    if next(module.buffers(), None) is None:
        return
    model = module if isinstance(module, PreTrainedModel) else model
    for part in module.children():
        _initialise(part, model)
    model._init_weights(module)


def is_same(x: Tensor, y: Tensor) -> bool:
    """Return whether `x` is `y` or a view of all of `y`."""
    return x.shape == y.shape and (x is y or (x._base is not None and x._base is (y if y._base is None else y._base)))
