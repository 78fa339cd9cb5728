"""Value model: one number per token instead of a distribution, for reward models and PPO's critic."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from RL2.errors import ModelError
from RL2.models.loading import build
from RL2.models.packed import PackedModel, backbone
from RL2.ops.one_pass import Expected
from RL2.ops.teacher_stats import Teacher
from RL2.types import StatsRequest, TokenBatch

VALUE = StatsRequest(("value",))
"""The only request that a value model accepts."""


class ValueModel(PackedModel):
    """Model of the value at the positions of the action tokens.

    The value at a position depends on the tokens up to it, not on the label: before an action, it is the critic's
    estimate of the rewards to come.
    """

    CHECKED = VALUE
    UNREAD = (r"^(lm_head|embed_out)\.",)  # heads of language models, embed_out that of GPT-NeoX

    @staticmethod
    def build(model_name: str, dequantize: bool = False) -> PreTrainedModel:
        """Build a backbone with a linear head to one number."""
        lm = build(AutoModelForSequenceClassification, model_name, dequantize, num_labels=1)
        head = getattr(lm, "score", None)
        if not isinstance(head, nn.Linear) or head.bias is not None:
            raise ModelError(f"{model_name}: {type(lm).__name__} has no linear head `score` without a bias")
        return lm

    def initial(self, name: str, shape: torch.Size) -> Tensor | None:
        """Return a small random head for a checkpoint of a language model; a checkpoint with a head keeps its own."""
        return torch.randn(shape) * self.lm.config.initializer_range if name == "score.weight" else None

    def stats_of(
        self,
        hidden_ND: Tensor,
        labels_N: Tensor,
        request: StatsRequest,
        teacher: Teacher | None = None,
        expected: Expected | None = None,
    ) -> dict[str, Tensor]:
        """Return `value`, float32 [N]; the request can only be VALUE."""
        assert request == VALUE
        head = self.lm.get_submodule("score")
        assert isinstance(head, nn.Linear)
        # the values are float32 in half precision too: pairs differ by less than its resolution
        return {"value": hidden_ND.float() @ head.weight[0].float()}

    def stats_alone(self, batch: TokenBatch) -> dict[str, Tensor]:
        hidden = backbone(self.lm)(input_ids=batch.token_ids_T[None], use_cache=False).last_hidden_state
        return self.stats_of(hidden[0], batch.labels_T, VALUE)


def mark_padding(lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Set the padding token by which transformers finds the last token of padded rows.

    If a tokenizer pads with the end token, transformers would take the token before it. Without a padding token, it
    accepts only one row at a time.
    """
    pad = tokenizer.pad_token_id
    lm.config.pad_token_id = None if pad == tokenizer.eos_token_id else pad
