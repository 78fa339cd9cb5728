"""Checks of a model's structure, before any weights are read: is it exact packed, exact row by row, or neither?

A second model of the same configuration runs on the meta device, which computes shapes but no numbers. Its attention
records how it is called. A model that packed attention would compute wrongly runs row by row through its own forward,
if that ends in a head that `token_stats` computes. Differences that only numbers show are found by
`Worker.check_packing` on the first batch of every run.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.module_tracker import ModuleTracker
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from RL2.errors import ModelError, first_line
from RL2.models.quantised import READABLE, method_of
from RL2.models.structure import (
    Unpacked,
    Unsupported,
    decoder_layers,
    has_head,
    measured_transform,
    reset_buffers,
)
from RL2.ops.attention import IMPLEMENTATION, is_packed
from RL2.ops.causal_attention import Scoring
from RL2.ops.token_stats import LogitTransform
from RL2.parallel.experts import find_experts

INSPECTED = "rl2_inspected"
"""Name of the attention implementation that checks and records its arguments, and of one of experts without numbers."""
INSPECTED_MASKS = "rl2_inspected_masks"
"""Name of the attention implementation that checks the masks which transformers would apply."""
QUERIES = (2**18 + 2, 2**18 - 2**16 - 1, 97)
"""Positions whose masks are checked: beyond the usual windows, and no multiples of one another's differences."""
KEYS_AT_ONCE = 2**14
"""Number of keys whose masks are checked at a time, so that the check adds nothing to the memory of loading."""
TOKENS = (37, 41, 43, 47, 53, 59, 61, 67, 71, 73, 79, 83, 89, 97, 101, 103, 107, 109, 113, 127)
"""Candidates for the number of tokens of the inspected forward.

The first one that divides no size of the model is used, so that shapes show which dimension holds the tokens.
"""
# fmt: off
RESHAPES = {
    "view", "_unsafe_view", "reshape", "transpose", "permute", "t", "expand", "unsqueeze", "squeeze", "alias",
    "detach", "clone", "_to_copy", "copy_", "lift_fresh", "split", "split_with_sizes", "chunk", "unbind",
    "repeat", "empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "new_empty", "new_zeros",
    "new_ones", "new_full", "masked_fill", "masked_fill_", "polar", "view_as_complex", "view_as_real",
}
"""Operations that move or create values; they act on each token if their result keeps the token dimension."""
# fmt: on
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm"}
LOOKUPS = {"embedding", "index", "index_select"}
WITHOUT_EFFECT = {"dropout", "is_causal", "position_ids", "use_cache", "cache_position", "past_key_values"}
"""Keyword arguments without effect: dropout is never applied, and the packed layout determines the rest."""
RANDOM = "draws random numbers in its layers (dropout), which cannot be switched off here"
OWN_ATTENTION = "computes attention itself, not through transformers' interface"
BY_LENGTH = ("longrope", "dynamic")
"""Types of rotary embedding whose frequencies depend on the longest sequence of a batch."""


Make = Callable[..., PreTrainedModel]
"""Function (configuration, **settings) -> model: `from_config` of an auto class or of a model's own class."""


def refuse_inexact(auto: Any, config: PretrainedConfig, model_name: str) -> str | None:
    """Return None if packed attention is exact for the model, else the reason why it runs row by row.

    `auto` is the transformers auto class that builds the model of `config`. Raise ModelError if neither is exact.
    """
    try:
        return _reason(auto.from_config, config)
    except Unsupported as reason:
        raise ModelError(f"{model_name}: {config.model_type} {reason}") from reason


def runs_packed(lm: PreTrainedModel) -> str | None:
    """Return None if packed attention is exact for `lm`, else the reason why not.

    With a reason, `lm` runs row by row through its own forward. The reason continues a sentence that begins with the
    model's name, such as "computes attention itself, not through transformers' interface".
    """
    if is_packed(lm):
        return None
    try:
        return _reason(type(lm)._from_config, lm.config)
    except Unsupported as reason:
        return str(reason)


def own_forward_line(lm: PreTrainedModel) -> str | None:
    """Return the line that a run prints about a model that runs row by row; None for a packed one."""
    why = runs_packed(lm)
    return why and f"{lm.config.model_type} runs row by row through its own forward (slower): it {why}"


def _reason(make: Make, config: PretrainedConfig) -> str | None:
    """Return None if packed attention is exact, else the reason why not. Raise Unsupported if nothing is."""
    _refuse_quantised(config)
    lm = _tried(lambda: _build_any(make, config), "cannot be built")
    _refuse_more_than_text(config, lm)
    why = _why_not_packed(lm)
    if why is not None:
        _refuse_own_forward(make, config)
    elif has_head(lm):
        _tried(lambda: measured_transform(lm), "does not run")
    _tried(lambda: _refuse_unset_buffers(lm), "has buffers that cannot be computed")
    return why


def _why_not_packed(lm: PreTrainedModel) -> str | None:
    """Return None if packed attention is exact for the inspected model, else the reason why not."""
    try:
        if lm.config._attn_implementation != INSPECTED:
            raise Unpacked(OWN_ATTENTION)
        _tried(lambda: _refuse_structure(lm), "is of an unknown structure", Unpacked)
        _refuse_forward(lm)
        _tried(lambda: _refuse_masks(lm), "has masks that cannot be read", Unpacked)
    except Unpacked as reason:
        return str(reason)
    return None


def _refuse_quantised(config: PretrainedConfig) -> None:
    method = method_of(config)
    if method is not None:
        ask = "set dequantize=true beside model_name, or " if method in READABLE else ""
        raise Unsupported(
            f"is quantised ({method}), and its scales would be lost; {ask}use a checkpoint in bfloat16 or float32"
        )


def _build_any(make: Make, config: PretrainedConfig) -> PreTrainedModel:
    """Build the model to inspect: with inspected attention, or with its own if transformers cannot exchange it."""
    try:
        return _build(make, config, INSPECTED)
    except (KeyError, ValueError) as error:
        if INSPECTED not in str(error):
            raise
        return _build(make, config, None)


def _build(make: Make, config: PretrainedConfig, attention: str | None) -> PreTrainedModel:
    """Build a model on the meta device with an attention implementation; None leaves the choice to transformers.

    Rotary embeddings by length get the plain type; `length_limit` covers them. Experts compute no numbers.
    """
    config = copy.deepcopy(config)
    for rope in _ropes(config):
        if rope["rope_type"] in BY_LENGTH:
            rope["rope_type"] = "default"
    with torch.device("meta"):
        lm = make(config, dtype=torch.float32, attn_implementation=attention)
    for experts in find_experts(lm):
        experts.config = copy.copy(experts.config)
        experts.config._experts_implementation = INSPECTED
    return lm


def _refuse_more_than_text(config: PretrainedConfig, lm: PreTrainedModel) -> None:
    """Raise Unsupported for a model with more than text, also if transformers could extract its text model."""
    if type(config).sub_configs or type(lm.config).sub_configs:
        raise Unsupported(f"({type(lm).__name__}) is not a text-only model")


def _refuse_structure(lm: PreTrainedModel) -> None:
    layers = getattr(lm.base_model, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not hasattr(lm.config, "num_key_value_heads"):
        raise Unpacked(f"({type(lm).__name__}) is not built like Llama or Qwen")
    of_experts = {p for experts in find_experts(lm) for p in experts.parameters()}
    for name, p in layers.named_parameters():
        if p.ndim == 3 and "conv" not in name and p not in of_experts:
            raise Unpacked(
                f"has a weight of three dimensions outside transformers' interface for experts (layers.{name})"
            )


def _refuse_forward(lm: PreTrainedModel) -> None:
    """Run the model on the meta device; raise Unsupported for anything that the packed forward does not compute."""
    calls: list[int] = []
    # heads, their sizes and halves of these divide a size of a parameter
    sizes = {size for x in (*lm.parameters(), *lm.buffers()) for size in x.shape}
    tokens = next((number for number in TOKENS if all(size % number for size in sizes)), None)
    if tokens is None:
        raise Unpacked("has sizes that every candidate number of tokens divides")
    ids = torch.zeros((1, tokens), dtype=torch.long, device="meta")
    positions = torch.arange(tokens, device="meta")[None]
    unused = {name: part for name, part in lm.base_model.named_modules() if any(True for _ in part.parameters(False))}
    for name, part in list(unused.items()):
        part.register_forward_hook(lambda *_, name=name: unused.pop(name, None) and None)
    lm.eval()
    for layer in lm.base_model.layers:  # type: ignore[union-attr]
        layer.training = True  # the mode in which PackedModel.train leaves the layers
    run = lm if has_head(lm) else lm.base_model
    with torch.no_grad(), ModuleTracker() as modules, _TokenMixing(tokens, modules):
        _tried(
            lambda: run(input_ids=ids, position_ids=positions, use_cache=False, attend=calls.append),
            "does not run with packed attention alone",
            Unpacked,
        )
    if sorted(calls) != list(range(len(lm.base_model.layers))):  # type: ignore[arg-type]
        raise Unpacked(f"calls attention {len(calls)} times in {len(lm.base_model.layers)} layers")  # type: ignore[arg-type]
    if unused:
        raise Unsupported(f"has weights that text does not use ({next(iter(unused))}): it is not a text-only model")


def _refuse_masks(lm: PreTrainedModel) -> None:
    """Raise Unpacked if the mask of a layer is not the one that follows from the arguments of its attention.

    transformers' own attention applies the mask; packed attention sees the arguments alone.
    """
    lm.set_attn_implementation(INSPECTED_MASKS)
    ids, no_padding = torch.zeros((1, 2), dtype=torch.long, device="meta"), torch.ones((1, 2), dtype=torch.bool)
    with torch.no_grad():
        lm.base_model(input_ids=ids, attention_mask=no_padding, use_cache=False)


def _refuse_own_forward(make: Make, config: PretrainedConfig) -> None:
    """Raise Unsupported if the model's own forward is not causal, or does not end in a head that is supported."""
    lm = _tried(lambda: _build_any(make, config), "cannot be built")
    for setting in ("is_decoder", "is_causal"):
        if any(vars(part).get(setting) is False for part in lm.modules()):
            raise Unsupported(f"has attention that is not causal ({setting}=false)")
    drops = any("drop" in name and value for name, value in lm.config.to_dict().items() if isinstance(value, float))
    if drops and "training=self.training" in inspect.getsource(type(decoder_layers(lm)[0])):
        raise Unsupported(RANDOM)
    if any(re.search("Indexer|Compressor", type(part).__name__) for part in lm.modules()):
        raise Unsupported("selects the keys of its attention by an indexer, which looks at padding too")
    if has_head(lm):
        _tried(lambda: measured_transform(lm), "does not run")
    else:
        decoder_layers(lm)


def logit_transform(lm: PreTrainedModel) -> LogitTransform:
    """Return what `lm` does to the logits of its head, as the forward of a second model on the meta device shows."""
    return measured_transform(_build_any(type(lm)._from_config, lm.config))


def attention_windows(lm: PreTrainedModel) -> dict[int, int]:
    """Return number of a layer -> sliding window, for the layers of a packed `lm` that have one.

    A second model on the meta device shows what each layer tells packed attention.
    """
    windows: dict[int, int] = {}

    def attend(layer: int, query_THD: Tensor, key_TKD: Tensor, value_TKD: Tensor, scoring: Scoring) -> Tensor:
        if scoring.window is not None:
            windows[layer] = scoring.window
        return query_THD.new_empty(len(query_THD), query_THD.shape[1] * value_TKD.shape[2])

    second = _build(type(lm)._from_config, lm.config, IMPLEMENTATION)
    ids = torch.zeros((1, 2), dtype=torch.long, device="meta")
    with torch.no_grad():
        second.base_model(input_ids=ids, position_ids=ids, use_cache=False, attend=attend)
    return windows


def _refuse_unset_buffers(lm: PreTrainedModel) -> None:
    lm.apply(_buffers_to_cpu)
    found = []
    for before in (0, 1):  # a buffer that nothing sets keeps this value
        for buffer in lm.buffers():
            buffer.fill_(before)
        reset_buffers(lm)
        found.append({name: buffer.clone() for name, buffer in lm.named_buffers()})
    stored = stored_buffers(lm)
    unset = [name for name, x in found[0].items() if name not in stored and not torch.equal(x, found[1][name])]
    if unset:
        raise Unsupported(f"has buffers that nothing sets, among them {unset[0]}")


def _buffers_to_cpu(module: nn.Module) -> None:
    for name, buffer in module.named_buffers(recurse=False):
        setattr(module, name, torch.empty_like(buffer, device="cpu"))


def stored_buffers(lm: PreTrainedModel) -> dict[str, Tensor]:
    """Return the persistent buffers of `lm` by name: those that a checkpoint stores beside its parameters."""
    stored = lm.state_dict().keys()
    return {name: buffer for name, buffer in lm.named_buffers() if name in stored}


def _inspect(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
) -> tuple[Tensor, None]:
    """Record a call of attention by its layer. Raise Unsupported for arguments that packed attention ignores."""
    attend = settings.pop("attend", None)
    if attend is None:
        raise Unpacked("does not forward keyword arguments to its attention")
    scaling, window, softcap, sinks = (settings.pop(x, None) for x in ("scaling", "sliding_window", "softcap", "s_aux"))
    if attention_mask is not None:
        raise Unpacked("passes its own mask to attention, which packed attention would ignore")
    if not getattr(module, "is_causal", True) or settings.get("is_causal") is False:
        raise Unsupported("has attention that is not causal")
    ignored = sorted(k for k, x in settings.items() if k not in WITHOUT_EFFECT and x is not None and x is not False)
    if ignored:
        raise Unpacked(f"passes {', '.join(ignored)} to attention, which packed attention would ignore")
    if not query.shape[-1] == key.shape[-1] >= value.shape[-1]:
        raise Unpacked(f"has keys of size {key.shape[-1]} and values of size {value.shape[-1]}")
    if not all(isinstance(number, float | int | None) for number in (scaling, window, softcap)):
        raise Unpacked("scales, caps or limits attention by something other than a number")
    if sinks is not None and sinks.shape != (query.shape[1],):
        raise Unpacked("has attention sinks that are not one number per head")
    if not hasattr(module, "layer_idx"):
        raise Unpacked("has attention modules without `layer_idx`")
    attend(module.layer_idx)
    return _result(query, value), None


def _result(query_BHTD: Tensor, value_BKTE: Tensor) -> Tensor:
    """Return a tensor of the shape of attention's result, [B, T, H * E]."""
    batch, heads, tokens, _ = query_BHTD.shape
    return query_BHTD.new_empty((batch, tokens, heads * value_BKTE.shape[-1]))


AttentionInterface.register(INSPECTED, _inspect)


def _inspect_experts(experts: nn.Module, hidden_ND: Tensor, chosen_NK: Tensor, weight_NK: Tensor) -> Tensor:
    """Implement transformers' interface for experts, which computes each token alone: return a tensor of the result."""
    return torch.empty_like(hidden_ND)


ALL_EXPERTS_FUNCTIONS.register(INSPECTED, _inspect_experts)


def _mask_to_inspect(*, q_length: int, kv_length: int, mask_function: Callable[..., Tensor], **_: Any) -> Tensor:
    """Implement transformers' mask interface: return a mask without values that carries the rule of its values."""
    mask = torch.empty((1, 1, q_length, kv_length), dtype=torch.bool, device="meta")
    vars(mask)["sees"] = mask_function
    return mask


def _inspect_mask(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
) -> tuple[Tensor, None]:
    """Raise Unpacked if the mask is not that of causal attention with the sliding window in the arguments."""
    mask = attention_mask
    if mask is not None and mask._base is not None and mask.shape == mask._base.shape:
        mask = mask._base
    sees = getattr(mask, "sees", None)
    if sees is None:
        raise Unpacked("does not take the masks of its attention from transformers")
    window = settings.get("sliding_window") or 2**62
    zero = torch.zeros((), dtype=torch.long)
    for position in QUERIES:
        for start in range(0, position + 2, KEYS_AT_ONCE):
            keys = torch.arange(start, min(position + 2, start + KEYS_AT_ONCE))
            visible = sees(zero, zero, torch.tensor(position), keys)
            if not torch.equal(visible.expand_as(keys), (keys <= position) & (keys > position - window)):
                raise Unpacked("masks attention by a rule that packed attention does not have")
    return _result(query, value), None


AttentionInterface.register(INSPECTED_MASKS, _inspect_mask)
AttentionMaskInterface.register(INSPECTED_MASKS, _mask_to_inspect)


class _TokenMixing(TorchDispatchMode):
    """Dispatch mode that refuses operations outside attention that may mix tokens.

    A convolution, a recurrence or a shift would read across the border of two packed sequences. An operation is judged
    by torch's own schema and tags, and by the dimension whose size is the number of tokens.
    """

    def __init__(self, tokens: int, modules: ModuleTracker) -> None:
        super().__init__()
        self.tokens, self.modules = tokens, modules

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        taken = func._schema.arguments
        arguments = {x.name: x.default_value for x in taken if x.has_default_value()}
        arguments |= dict(zip((x.name for x in taken), args, strict=False)) | (kwargs or {})
        name = func.overloadpacket.__name__
        if torch.Tag.nondeterministic_seeded in func.tags and arguments.get("p") not in (0, 1):
            raise Unsupported(RANDOM)
        out = func(*args, **(kwargs or {}))
        inputs = [x for x in tree_leaves(args) if isinstance(x, Tensor)]
        if any(self.tokens in x.shape for x in inputs) and not self._is_tokenwise(func, name, inputs, arguments, out):
            where = max(self.modules.parents - {"Global"}, key=len, default="the model")
            raise Unpacked(f"mixes tokens outside attention ({name} in {where})")
        return out

    def _is_tokenwise(self, func: Any, name: str, inputs: list[Tensor], arguments: dict[str, Any], out: Any) -> bool:
        first = inputs[0]
        if torch.Tag.pointwise in func.tags:
            return True
        if name in PRODUCTS:
            return inputs[-1].shape[-2] != self.tokens  # the dimension that is summed over
        if name in LOOKUPS:
            return self.tokens not in first.shape
        if name in RESHAPES:
            return all(self.tokens in x.shape for x in tree_leaves(out) if isinstance(x, Tensor))
        if "normalized_shape" in arguments:
            return self.tokens not in arguments["normalized_shape"]
        dims = arguments.get("dim", arguments.get("dims"))
        if dims is None or dims == []:
            return False
        along = {first.shape[dim] for dim in (dims if isinstance(dims, list | tuple) else [dims])}
        return self.tokens not in along or (name == "slice" and out.shape == first.shape)


def _tried(act: Callable[[], Any], what: str, kind: type[Unsupported] = Unsupported) -> Any:
    """Call `act` and return its result; convert any error of transformers to `kind`."""
    try:
        return act()
    except Unsupported:
        raise
    except Exception as error:
        if isinstance(error, KeyError) and INSPECTED in str(error):
            raise Unpacked(OWN_ATTENTION) from error
        if "Unrecognized configuration class" in str(error):
            raise Unsupported("has no text-only model of this class in transformers") from error
        raise kind(f"{what}: {type(error).__name__}: {first_line(error)}") from error


def _ropes(config: PretrainedConfig) -> list[dict[str, Any]]:
    """Return the settings of each rotary embedding of `config`: one for all layers, or one per type of layer."""
    found = getattr(config, "rope_parameters", None) or {}
    return [rope for rope in (found, *found.values()) if isinstance(rope, dict) and "rope_type" in rope]


def has_rope(config: PretrainedConfig) -> bool:
    """Return whether the model of `config` has rotary embeddings, which have no last position."""
    return bool(_ropes(config))


def length_limit(config: PretrainedConfig) -> int | None:
    """Return the longest length for which the rotary frequencies do not depend on the batch; None if they never do.

    Beyond it transformers chooses the frequencies by the longest sequence of a batch, so sequences would affect each
    other.
    """
    limits = [
        rope.get("original_max_position_embeddings")
        if rope["rope_type"] == "longrope"
        else config.max_position_embeddings
        for rope in _ropes(config)
        if rope["rope_type"] in BY_LENGTH
    ]
    return min((limit or config.max_position_embeddings for limit in limits), default=None)
