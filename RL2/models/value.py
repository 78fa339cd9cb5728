"""A model with one number at every token instead of a distribution: a reward model, or the critic of PPO."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from RL2.errors import ConfigError
from RL2.models.loading import build
from RL2.models.packed import PackedModel, backbone
from RL2.types import SharedPrefix, StatsRequest, TokenBatch

VALUE = StatsRequest(("value",))
"""What a value model is asked for."""


class ValueModel(PackedModel):
    """The value at the positions of the action tokens.

    The value at a position has read the tokens up to this one, and not the label: before an action, it is the critic's
    estimate of the rewards to come.
    """

    CHECKED = VALUE
    UNREAD = (r"^lm_head\.",)

    @staticmethod
    def build(model_name: str, key: str) -> PreTrainedModel:
        """A backbone with a linear head to one number."""
        lm = build(AutoModelForSequenceClassification, model_name, key, num_labels=1)
        head = getattr(lm, "score", None)
        if not isinstance(head, nn.Linear) or head.bias is not None:
            raise ConfigError(f"{key}={model_name}: {type(lm).__name__} has no linear head `score` without a bias")
        return lm

    def initial(self, name: str, shape: torch.Size) -> Tensor | None:
        """A head of small random numbers on what was a language model; one that was saved with its head keeps it."""
        return torch.randn(shape) * self.lm.config.initializer_range if name == "score.weight" else None

    def forward(
        self, batch: TokenBatch, shared: SharedPrefix | None, request: StatsRequest, alone: bool = False
    ) -> dict[str, Tensor]:
        """Return `value`, float32; the request can only be VALUE."""
        assert request == VALUE
        if alone:
            hidden = backbone(self.lm)(input_ids=batch.token_ids_T[None], use_cache=False).last_hidden_state
            return {"value": self._value(hidden[0])}
        hidden_ND, is_mine_A = self.hidden_of_actions(batch, shared)
        return self.on_all({"value": self._value(hidden_ND)}, is_mine_A)

    def _value(self, hidden_ND: Tensor) -> Tensor:
        head = self.lm.get_submodule("score")
        assert isinstance(head, nn.Linear)
        # in half precision too the numbers themselves are float32: pairs differ by less than its steps
        return hidden_ND.float() @ head.weight[0].float()


def mark_padding(lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Let transformers find the last token of padded rows: it is the last one that is no padding.

    Where a tokenizer pads with the end token, transformers would take the token before it; without a padding token it
    takes rows one at a time.
    """
    pad = tokenizer.pad_token_id
    lm.config.pad_token_id = None if pad == tokenizer.eos_token_id else pad
