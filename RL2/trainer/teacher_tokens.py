"""The check that a teacher reads the tokens of the policy."""

from __future__ import annotations

import json
from typing import Any

from transformers import PreTrainedTokenizerBase

from RL2.config.model import Teacher
from RL2.errors import ConfigError, naming
from RL2.models.policy import load_tokenizer

PARTS = ("normalizer", "pre_tokenizer", "model")
"""Parts of a tokenizer, beside its vocabulary, that decide which ids a text has."""


def refuse_another_tokenizer(teacher: Teacher, model_name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ConfigError unless the teacher's tokenizer gives every text the ids of `tokenizer`, the policy's.

    Contents are compared, not names: the id of each token, added ones too, and how text is cut into them. Templates may
    differ, since a teacher reads the ids of the policy's conversations.
    """
    for key, name in teacher.named.items():
        with naming(key):
            other = load_tokenizer(name)
        if why := difference(tokenizer, other):
            raise ConfigError(
                f"{key}={name} has another tokenizer than actor.model_name={model_name}: {why}; a teacher must give "
                "each token the same id"
            )


def difference(ours: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase) -> str:
    """Describe the first difference of two tokenizers, '' if they are the same."""
    a, b = ours.get_vocab(), theirs.get_vocab()
    if a != b:
        token = min((token for token in a.keys() | b.keys() if a.get(token) != b.get(token)), key=lambda t: (len(t), t))
        here, there = (f"id {ids[token]}" if token in ids else "no id" for ids in (a, b))
        return f"token {token!r} has {there} there and {here} here"
    return next((f"its {part} differs" for part in PARTS if _part(ours, part) != _part(theirs, part)), "")


def _part(tokenizer: PreTrainedTokenizerBase, name: str) -> Any:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return None if backend is None else json.loads(backend.to_str())[name]
