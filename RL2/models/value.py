"""A model with one number at every token instead of a distribution: a reward model, or the critic of PPO."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from RL2.config import ConfigError
from RL2.models.policy import hidden_of_actions, refuse_other_backbones
from RL2.ops.attention import IMPLEMENTATION
from RL2.types import Shared, StatsRequest, TokenBatch

VALUE = StatsRequest(("value",))
"""What a value model is asked for."""


class ValueModel(nn.Module):
    """Packed token ids in, the value at the positions of the action tokens out.

    The value at a position has read the tokens up to this one, and not the label: before an action, it is the critic's
    estimate of the rewards to come.
    """

    def __init__(self, lm: PreTrainedModel) -> None:
        super().__init__()
        self.lm = lm

    @staticmethod
    def load(model_name: str, key: str) -> ValueModel:
        """In float32. `key` named the model, for errors."""
        return ValueModel(load_value_model(model_name, torch.float32, key))

    def forward(self, batch: TokenBatch, shared: Shared | None, request: StatsRequest) -> dict[str, Tensor]:
        """`value`, float32 [number of action tokens]. `shared` is `batch.shared()`; the request can only be VALUE."""
        assert request == VALUE
        hidden_AD = hidden_of_actions(self.lm, batch, shared)
        head = self.lm.get_submodule("score")
        assert isinstance(head, nn.Linear)
        # in half precision too the numbers themselves are float32: pairs differ by less than its steps
        return {"value": hidden_AD.float() @ head.weight[0].float()}


def load_value_model(model_name: str, dtype: torch.dtype, key: str) -> PreTrainedModel:
    """The backbone of a hub name or folder with a linear head to one number, calling packed attention.

    The head of a causal language model gives way to a new one, which is drawn from torch's random numbers; a reward
    model or critic that was saved keeps its own.
    """
    try:
        lm = AutoModelForSequenceClassification.from_pretrained(
            model_name, num_labels=1, dtype=dtype, attn_implementation=IMPLEMENTATION
        )
    except (OSError, RuntimeError) as error:  # nothing there; a classifier of several classes
        raise ConfigError(f"{key}={model_name}: {str(error).splitlines()[0]}") from error
    refuse_other_backbones(lm)
    head = getattr(lm, "score", None)
    if not isinstance(head, nn.Linear) or head.bias is not None:
        raise ConfigError(f"{key}={model_name}: {type(lm).__name__} has no linear head called score, without a bias")
    return lm


def mark_padding(lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Let transformers find the last token of padded rows: it is the last one that is no padding.

    Where a tokenizer pads with the end token, transformers would take the token before it; without a padding token it
    takes rows one at a time.
    """
    pad = tokenizer.pad_token_id
    lm.config.pad_token_id = None if pad == tokenizer.eos_token_id else pad
