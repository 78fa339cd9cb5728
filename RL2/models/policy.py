"""A causal language model as backbone and head, from which token statistics come instead of logits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from RL2.config import ConfigError
from RL2.ops.attention import IMPLEMENTATION, PackedAttention
from RL2.ops.token_stats import token_stats
from RL2.types import Shared, StatsRequest, TokenBatch


class Policy(nn.Module):
    """Packed token ids in, statistics of the action tokens out. Logits never leave `token_stats`."""

    def __init__(self, lm: PreTrainedModel) -> None:
        super().__init__()
        self.lm = lm

    @staticmethod
    def load(model_name: str, key: str) -> Policy:
        """In float32. `key` named the model, for errors."""
        return Policy(load_model(model_name, torch.float32, key))

    def forward(self, batch: TokenBatch, shared: Shared | None, request: StatsRequest) -> dict[str, Tensor]:
        """The token statistics by name, each [number of action tokens]. `shared` is `batch.shared()`."""
        stats = token_stats(
            hidden_of_actions(self.lm, batch, shared),
            head(self.lm).weight,
            batch.labels_T[batch.action_T],
            temperature=request.temperature,
            fields=request.fields,
            top_k=request.top_k,
            budget_mib=request.budget_mib,
        )
        return {name: getattr(stats, name) for name in request.fields}


def hidden_of_actions(lm: PreTrainedModel, batch: TokenBatch, shared: Shared | None) -> Tensor:
    """The backbone's last hidden state at the positions of the actions, [number of action tokens, D]."""
    ids, positions = batch.token_ids_T, batch.position_ids_T
    actions = batch.action_T.nonzero()[:, 0]
    if shared is not None:  # what sequences have in common runs through the backbone once
        ids, positions = ids[shared.distinct_U], positions[shared.distinct_U]
    hidden_UD = backbone(lm)(
        input_ids=ids[None],
        position_ids=positions[None],
        use_cache=False,
        attend=PackedAttention(batch.cu_seqlens, shared),
    ).last_hidden_state[0]
    return hidden_UD.index_select(0, actions if shared is None else shared.place_T[actions])


def backbone(lm: PreTrainedModel) -> nn.Module:
    return lm.base_model


def head(lm: PreTrainedModel) -> nn.Linear:
    return lm.get_output_embeddings()


def layers(lm: PreTrainedModel) -> nn.ModuleList:
    found = backbone(lm).layers
    assert isinstance(found, nn.ModuleList)
    return found


def load_model(model_name: str, dtype: torch.dtype, key: str = "actor.model_name") -> PreTrainedModel:
    """The causal LM of a hub name or folder, in `dtype`, calling packed attention. `key` named it, for errors."""
    try:
        lm = AutoModelForCausalLM.from_pretrained(model_name, dtype=dtype, attn_implementation=IMPLEMENTATION)
    except OSError as error:
        raise ConfigError(f"{key}={model_name}: {str(error).splitlines()[0]}") from error
    _refuse_what_we_would_miss(lm)
    return lm


def empty_model(like: PreTrainedModel, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """A model of the same shape whose weights are yet to be loaded."""
    lm = AutoModelForCausalLM.from_config(like.config, dtype=dtype, attn_implementation=IMPLEMENTATION)
    return lm.to(device).eval().requires_grad_(False)


def load_tokenizer(model_name: str, key: str = "actor.model_name") -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(model_name)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{key}={model_name} has no tokenizer: {str(error).splitlines()[0]}") from error


def max_length(model_name: str) -> int:
    """Positions that the model was made for; read from its configuration alone."""
    try:
        config = AutoConfig.from_pretrained(model_name)
    except (OSError, ValueError) as error:
        raise ConfigError(f"actor.model_name={model_name}: {str(error).splitlines()[0]}") from error
    return positions(config)


def positions(config: PretrainedConfig) -> int:
    """Positions of a model with this configuration; some set no limit."""
    return getattr(config, "max_position_embeddings", None) or 2**31


def end_tokens(lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Ids that end a response: the tokenizer's and those of the model's generation configuration."""
    ids = {tokenizer.eos_token_id}
    generation = lm.generation_config.eos_token_id if lm.generation_config is not None else None
    ids |= set(generation) if isinstance(generation, list) else {generation}
    return tuple(sorted(i for i in ids if i is not None))


def named_weights(lm: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Every weight by its transformers name, whole (collective under sharding), tied ones once."""
    for name, parameter in lm.named_parameters():
        yield name, parameter.full_tensor() if isinstance(parameter, DTensor) else parameter.detach()


def export(lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, write: bool) -> None:
    """A folder that `AutoModelForCausalLM.from_pretrained` loads. Collective; the process with `write` writes."""
    weights = {}
    for name, weight in named_weights(lm):
        if write:
            weights[name] = weight.cpu()
    if write:
        lm.save_pretrained(folder, state_dict=weights)
        tokenizer.save_pretrained(folder)


def _refuse_what_we_would_miss(lm: PreTrainedModel) -> None:
    for knob in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(lm.config, knob, None) not in (None, 1.0):
            raise ConfigError(f"{type(lm).__name__} changes its logits after the head ({knob}), which is not supported")
    refuse_other_backbones(lm)
    if head(lm).bias is not None:
        raise ConfigError(f"{type(lm).__name__} has a bias in its head, which is not supported")


def refuse_other_backbones(lm: PreTrainedModel) -> None:
    """Raise `ConfigError` for what packed attention would compute wrongly, or not at all."""
    if not isinstance(getattr(backbone(lm), "layers", None), nn.ModuleList) or not hasattr(
        lm.config, "num_key_value_heads"
    ):
        raise ConfigError(f"{type(lm).__name__} is not built like Llama or Qwen, which is what is supported")
    if getattr(lm.config, "sliding_window", None):
        raise ConfigError(f"{type(lm).__name__} uses a sliding window, which packed attention does not have")
