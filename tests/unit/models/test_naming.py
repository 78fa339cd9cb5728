"""The configuration key in the message of a model that cannot be used."""

from __future__ import annotations

import pytest

from RL2.errors import MAX_ERROR, ConfigError, ModelError, naming


def message(error: Exception) -> str:
    with pytest.raises(ConfigError) as caught, naming("critic.model_name"), naming("actor.model_name"):
        raise error
    return str(caught.value)


def test_the_innermost_key_is_prepended_once() -> None:
    assert message(ModelError("F has no config.json")) == "actor.model_name=F has no config.json"


def test_other_errors_keep_their_message() -> None:
    assert message(ConfigError("actor.lora.rank=1 needs peft")) == "actor.lora.rank=1 needs peft"


@pytest.mark.parametrize("length", [MAX_ERROR - 5, MAX_ERROR, MAX_ERROR + 5])
def test_a_long_message_is_cut_as_one(length: int) -> None:
    assert message(ModelError("a" * length)) == str(ConfigError(f"actor.model_name={'a' * length}"))
